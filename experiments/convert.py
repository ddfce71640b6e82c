"""python -m experiments.convert --from=DIR --to=DIR [--dtype=bfloat16] [--step=N] [--like=DIR] [--as=orbax|adapters]

From a run (its directory, or its name below runs/) or the folder of a Hugging Face checkpoint, to a folder that
transformers and vLLM load and that ``--config.weights`` starts from. Every tensor's name and shape is checked.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import sys
import typing
from collections.abc import Mapping, Sequence

from absl import logging

from experiments import config_files
from experiments.evaluate import config_of, fit_mesh, policy_of
from rl_reason.models.hf_config import CONFIG, first_of, model_keys, read_json

if typing.TYPE_CHECKING:
    from jaxtyping import PyTree

    from configs.common import Config
    from rl_reason.data.tokenizer import Tokenizer
    from rl_reason.models.transformer import ModelConfig
    from rl_reason.report.console import Display

DTYPES = ("bfloat16", "float16", "float32")
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# What no checkpoint settles, and conversion does not ask.
HOW = dict(dtype="float32", scan_layers=False, scan_decode=False, remat="none")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.convert", description=(__doc__ or "").partition("\n\n")[2], allow_abbrev=False
    )
    add = parser.add_argument
    add("--from", dest="source", required=True, metavar="DIR", help="a run, or the folder of a checkpoint")
    add("--to", dest="target", required=True, metavar="DIR", help="the folder to make")
    add("--dtype", choices=DTYPES, help="of the tensors (default: as they are)")
    add(
        "--as",
        dest="form",
        choices=("safetensors", "orbax", "adapters"),
        default="safetensors",
        help="orbax: only for us, on pods; adapters: of a run with some, those alone, in PEFT's format",
    )
    add("--like", metavar="DIR", help="the checkpoint whose config.json, tokenizer and towers go along (default: of a "
        "run its config.weights, of a checkpoint itself)")  # fmt: skip
    add("--step", type=int, help="of a run: the checkpoint's step (default: the newest)")
    add("--policy", help="of a cohort: which of its policies")
    return parser.parse_args(argv)


class Opened(typing.NamedTuple):
    """Parameters, their type as they were stored, and what goes along with them."""

    params: "PyTree"
    model: "ModelConfig"
    dtype: str
    like: pathlib.Path | None = None
    extra: Mapping[str, typing.Any] = {}
    files: Mapping[str, pathlib.Path | str] = {}


def open_checkpoint(args: argparse.Namespace, folder: pathlib.Path, display: "Display") -> Opened:
    """A Hugging Face checkpoint, or one that was converted with ``--as=orbax``."""
    from rl_reason.models import hf_files, hf_names, hf_weights
    from rl_reason.models.transformer import ModelConfig

    if args.step is not None or args.policy is not None:
        raise ValueError(f"--step and --policy are of runs; {folder} is a checkpoint.")
    config = read_json(folder / CONFIG)
    if (folder / hf_files.PARAMS).is_dir():
        stored = config.get("torch_dtype") or config["dtype"]
    else:
        checkpoint = hf_files.Checkpoint(folder)
        embeddings = [name for name in checkpoint.names if name.endswith(hf_names.OUTSIDE["embed"].name)]
        stored = hf_files.DTYPES.get(checkpoint.described(embeddings[0]).dtype) if embeddings else None
    dtype = args.dtype or stored or "float32"
    model = ModelConfig.of(model_keys(config, str(folder / CONFIG)) | HOW | dict(param_dtype=dtype))
    with display.phase("read", unit="tensor") as phase:
        loaded = hf_weights.read(folder, model, None, phase.count)
    for what, names in (("left in place", loaded.towers), ("not used", loaded.unused)):
        if names:
            display.info(f"{folder}: {len(names)} tensors {what}: {first_of(names)}")
    return beside(Opened(loaded.params, model, dtype), pathlib.Path(args.like or folder))


def beside(opened: Opened, like: pathlib.Path) -> Opened:
    """With what goes along from a checkpoint; of one by Orbax, whose config.json may tell of towers that it lacks, the
    tokenizer alone."""
    from rl_reason.models import hf_export, hf_files

    if not (like / hf_files.PARAMS).is_dir():
        return opened._replace(like=like)
    config = read_json(like / CONFIG)
    ids = {key: config[key] for key in TOKEN_IDS if key in config}
    return opened._replace(extra=ids, files=hf_export.companions(like))


def open_run(args: argparse.Namespace, run: pathlib.Path, display: "Display") -> Opened:
    """The policy of a run."""
    from rl_reason import evaluate

    config = policy_of(config_of(run), args.policy)
    fit_mesh(config, display)
    setup = evaluate.setup_of(config)
    with display.phase("read"):
        step, params = evaluate.restore_policy(run / "checkpoints", setup, args.step, args.policy)
    display.info(f"{run}: step {step}")
    dtype = args.dtype or config.model.param_dtype
    own = config.cohort[args.policy] if args.policy else config
    weights = args.like or own.get("weights", "")
    if weights and (args.like or (pathlib.Path(weights) / CONFIG).is_file()):
        return beside(Opened(params, setup.model, dtype), pathlib.Path(weights))
    if weights:
        display.warn(f"{weights}, which the run started from, is gone: its towers do not come along (--like=DIR)")
    longest = config.data.max_prompt_len_tokens + config.rollout.completion_len
    model = dataclasses.replace(setup.model, max_position=setup.model.max_position or longest)
    ids = token_ids(setup.tokenizer)
    files = tokenizer_files(config) | {"generation_config.json": json.dumps(ids, indent=2) + "\n"}
    return Opened(params, model, dtype, None, ids, files)


def token_ids(tokenizer: "Tokenizer") -> dict[str, int]:
    """Special ids in the words of config.json; those that there are."""
    ids = dict(zip(TOKEN_IDS, (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id), strict=True))
    return {key: value for key, value in ids.items() if value is not None and value >= 0}


def tokenizer_files(config: "Config") -> dict[str, pathlib.Path | str]:
    """The files of the run's tokenizer, by the names that transformers looks for."""
    from rl_reason.data.sentencepiece_tokenizer import EMBEDDED
    from rl_reason.models import hf_export

    path = EMBEDDED if config.tokenizer == "embedded" else pathlib.Path(config.tokenizer)
    return hf_export.companions(path) if path.is_dir() else {"tokenizer.model": path}


def convert(args: argparse.Namespace, source: pathlib.Path, of_run: bool, display: "Display") -> None:
    """Reads, checks and writes."""
    from rl_reason.models import hf_export, hf_files, peft
    from rl_reason.report.console import human

    target = pathlib.Path(args.target)
    hf_files.refuse_to_overwrite(target)
    opened = (open_run if of_run else open_checkpoint)(args, source, display)
    if args.form == "adapters":
        peft.write(target, opened.params, opened.model, base=str(opened.like or source))
        display.info(f"{target}: adapters of {opened.like or source}")
        return
    with display.phase("write", unit="tensor") as phase:
        export = hf_export.write(
            target,
            opened.params,
            opened.model,
            dtype=opened.dtype,
            like=opened.like,
            extra=opened.extra,
            files=opened.files,
            orbax=args.form == "orbax",
            on_tensor=phase.count,
        )
    size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    kind = export.config["architectures"][0]
    display.info(f"{target}: {kind}, {len(export.sizes)} tensors in {opened.dtype}, {human(size)}B")


def main(argv: Sequence[str] | None = None) -> int:
    """Converts; returns the exit status."""
    args = parse_args(argv)
    source = pathlib.Path(args.source)
    if not source.exists() and "/" not in args.source and (pathlib.Path("runs") / source).exists():
        source = pathlib.Path("runs") / source
    config_files.prepare_host()
    logging.set_verbosity(logging.ERROR)  # Orbax also warns where all is well
    try:
        described = read_json(source / CONFIG)
        # A run's config.json has a section of that name, a checkpoint's has none.
        of_run = isinstance(described.get("model"), dict)
        if of_run and described["model"]["param_dtype"] == "float64":
            os.environ["JAX_ENABLE_X64"] = "1"
        from rl_reason.report.console import Display

        convert(args, source, of_run, Display())
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What ``experiments.evaluate`` asks: a run's held-out problems, those of other tasks, or the prompts of a file."""

import argparse
import pathlib
import typing
from collections.abc import Mapping

if typing.TYPE_CHECKING:
    from rl_reason.data.example import Source
    from rl_reason.evaluate import Setup

UNVERIFIED = "none:none"  # the verifier of rows that nobody judges; never called


def source_of(args: argparse.Namespace, setup: "Setup") -> tuple["Source", str]:
    """(prompts to evaluate on, the name of that choice).

    Raises:
        ValueError: naming the flag or key, and the cure.
    """
    from rl_reason import build
    from rl_reason.data.sources import make_source

    if args.tasks:
        names = [name.strip() for name in args.tasks.split(",") if name.strip()]
        levels = None
        if args.levels:
            try:
                levels = [[int(level) for level in args.levels.split(",")]] * len(names)
            except ValueError:
                raise ValueError(f"--levels={args.levels}: want whole numbers separated by commas.") from None
        source = make_source(seed=setup.config.seed, split="heldout", tasks=names, levels=levels)
        return source, "-".join(name.rpartition(":")[2] for name in names)
    if args.prompts:
        return file_source(args, setup), pathlib.Path(args.prompts).stem
    return build.make_source_of(setup.config, setup.tokenizer, "heldout"), ""


def file_source(args: argparse.Namespace, setup: "Setup") -> "Source":
    """All rows of a file, in their order."""
    from rl_reason.data.row_source import Reading, RowSource
    from rl_reason.data.schema import Keys
    from rl_reason.verifier_pool import check_verifier

    data = setup.config.data
    verifier = args.verifier or (data.verifier.to_dict() if hasattr(data.verifier, "to_dict") else data.verifier)
    answer_key: str | None = args.answer_key or data.answer_key
    if verifier in (None, "none"):
        verifier, answer_key = UNVERIFIED, None
    else:
        for name in verifier.values() if isinstance(verifier, Mapping) else (verifier,):
            check_verifier(name)
    keys = Keys(
        prompt=data.prompt_key,
        answer=None if answer_key == "none" else answer_key,
        data_source=data.data_source_key,
        split=None,
    )
    reading = Reading(split="heldout", verifier=verifier, keys=keys, chat=data.chat, on_bad_row=data.on_bad_row)
    try:
        return RowSource([], reading, seed=0, heldout_files=[args.prompts], shuffle=False)
    except ValueError as error:
        text = str(error).replace("data.files: ", "--prompts: ").replace(", or set data.on_bad_row='skip'", "")
        text = text.replace("set data.answer_key", "set --answer_key").replace("to None", "to none")
        raise ValueError(text) from error

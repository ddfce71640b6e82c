"""--config=clipcov.py:arg from any working directory, and errors that name the cure."""

import difflib
import logging as logging_format
import os
import pathlib
import re
import typing
from collections.abc import Mapping

from absl import flags, logging
from ml_collections import config_flags

from configs.common import Config
from rl_reason.models import hf_config

CONFIGS = pathlib.Path(__file__).parent.parent / "configs"
HELPERS = ("__init__.py", "common.py", "models.py", "paper.py")
# The --config flag. Unknown keys are refused with the nearest name, wrong types with both types.
CONFIG = config_flags.DEFINE_config_file(
    "config", None, "A file of configs/, with an optional :arg.", lock_config=True
)


def known() -> list[str]:
    """The configs there are."""
    return sorted(p.name for p in CONFIGS.glob("*.py") if p.name not in HELPERS)


def resolved(argv: list[str]) -> list[str]:
    """Lets ``--config=clipcov.py`` and ``--config clipcov`` mean configs/clipcov.py."""
    out, rest = [], list(argv)
    while rest:
        word = rest.pop(0)
        if word in ("--config", "-config") and rest:
            word = f"--config={rest.pop(0)}"
        if word.startswith(("--config=", "-config=")):
            word = f"--config={_find(word.partition('=')[2])}"
        out.append(word)
    return out


def _find(value: str) -> str:
    name, colon, arg = value.partition(":")
    for path in (pathlib.Path(name), CONFIGS / name, CONFIGS / f"{name}.py"):
        if path.suffix == ".py" and path.is_file():
            return f"{path}{colon}{arg}"
    close = difflib.get_close_matches(name, known(), n=1, cutoff=0.5)
    hint = f" Did you mean {close[0]}?" if close else ""
    raise SystemExit(f"error: --config={value}: no such file.{hint} In configs/ there are: {', '.join(known())}")


def name_of(argv: list[str]) -> str:
    """'clipcov' or 'clipcov-smoke', to name a run after."""
    for word in argv:
        if word.startswith(("--config=", "-config=")):
            name, _, arg = word.partition("=")[2].partition(":")
            return "-".join(filter(None, (pathlib.Path(name).stem, arg)))
    return "run"


def checked(config: Config | None) -> Config:
    """The config, or an exit that lists what there is."""
    if config is None:
        raise SystemExit(f"error: say which experiment: --config=NAME.py. In configs/ there are: {', '.join(known())}")
    return config


def settled(config: Config, asked: Mapping[str, typing.Any]) -> Config:
    """The config with what its weights settle; ``asked`` are the command line's values, by dotted key.

    A checkpoint's config.json is ``config.model``, and there is no warm-up but one that the command line asks for.

    Raises:
        WeightsError: no checkpoint there, none that can be read, or a model that is asked for and is not its own.
    """
    if config.weights:
        keys = _keys_of_weights(config.weights, "config.weights")
        for key, value in keys.items():
            if asked.get(f"model.{key}", value) != value:
                raise hf_config.WeightsError(
                    f"--config.model.{key}={asked[f'model.{key}']}: config.weights={config.weights!r} has {value}; leave it "
                    "out."
                )
        config.model.update(keys)
        if "warmup.num_steps" not in asked:
            config.warmup.num_steps = 0
    for name, own in config.cohort.items():
        if own.get("weights"):
            keys = _keys_of_weights(own.weights, f"config.cohort.{name}.weights")
            with own.unlocked():
                own.model = {**own.get("model", {}), **keys}
    models = []
    for number, entry in enumerate(config.preference.models):
        if entry.get("weights"):
            keys = _keys_of_weights(entry["weights"], f"config.preference.models[{number}].weights")
            entry = dict(entry, model={**entry.get("model", {}), **keys})
        models.append(entry)
    config.preference.models = tuple(models)
    return config


def _keys_of_weights(folder: str, key: str) -> dict[str, typing.Any]:
    file = pathlib.Path(folder) / hf_config.CONFIG
    try:
        return hf_config.model_keys(hf_config.read_json(file), str(file))
    except hf_config.WeightsError as error:
        raise hf_config.WeightsError(f"{key}={folder!r}: {error}") from None


def prepare_host() -> None:
    """Before jax is imported: plain warnings only, and room for callbacks when a CPU plays several devices."""
    logging.set_verbosity(logging.WARNING)  # Orbax tells its life story otherwise
    logging.get_absl_handler().setFormatter(logging_format.Formatter("warning: %(message)s"))
    forced = re.search(r"xla_force_host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", ""))
    if forced:  # jax 0.10 hangs without
        os.environ.setdefault("NPROC", str(int(forced[1]) + (os.cpu_count() or 1)))


def parse(argv: list[str]) -> list[str]:
    """Parses flags; what is wrong with one is said in a line, with the cure.

    Raises:
        SystemExit: an unknown flag or key, a value of another type, or a config file that refuses its argument.
    """
    words = resolved(argv)
    try:
        return flags.FLAGS(words)
    except flags.Error as error:
        raise SystemExit(f"error: {_shorter(str(error))}") from None
    except (AttributeError, KeyError) as error:  # how ml_collections refuses a key
        key, hint = re.search(r"\w+", str(error)), re.search(r"Did you mean [^?]*\?", str(error))
        given = next((word for word in words if key and word.startswith("--config.") and key[0] in word), "--config")
        cure = hint[0] if hint else "configs/base.py has every key there is."
        raise SystemExit(f"error: {given}: there is no key {key[0] if key else '?'!r}. {cure}") from None
    except (TypeError, ValueError) as error:
        raise SystemExit(f"error: {_shorter(str(error))}") from None


def _shorter(text: str) -> str:
    """One line; of a traceback that ml_collections wraps, the exception and where it was raised."""
    if "Traceback (most recent call last)" in text:
        text, _, trace = text.partition("Error whilst parsing config file")
        file, line = re.findall(r'File "([^"]+)", line (\d+)', trace)[-1]
        text += f"{trace.strip().splitlines()[-1]} ({os.path.basename(file)}:{line})"
    return re.sub(r"\s+", " ", text).strip()

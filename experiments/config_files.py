"""--config=clipcov.py:arg from any working directory, and errors that name the cure."""

import difflib
import os
import pathlib
import re
import sys

import ml_collections
from absl import flags
from ml_collections import config_flags

CONFIGS = pathlib.Path(__file__).parent.parent / "configs"
HELPERS = ("__init__.py", "common.py")


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


def define_flag():
    """The --config flag. Unknown keys are refused with the nearest name, wrong types with both types."""
    return config_flags.DEFINE_config_file("config", None, "A file of configs/, with an optional :arg.", lock_config=True)


def checked(config: ml_collections.ConfigDict | None) -> ml_collections.ConfigDict:
    """The config, or an exit that lists what there is."""
    if config is None:
        raise SystemExit(f"error: say which experiment: --config=NAME.py. In configs/ there are: {', '.join(known())}")
    return config


def prepare_host() -> None:
    """Before jax is imported: room for callbacks when a CPU plays several devices (jax 0.10 hangs without)."""
    forced = re.search(r"xla_force_host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", ""))
    if forced:
        os.environ.setdefault("NPROC", str(int(forced[1]) + (os.cpu_count() or 1)))


def parse(argv: list[str]) -> list[str]:
    """Parses flags with absl's errors shortened to one line that names the cure."""
    try:
        return flags.FLAGS(resolved(argv))
    except flags.Error as error:
        raise SystemExit(f"error: {error}") from error
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        text = re.sub(r"\s+", " ", str(error)).strip('"')
        raise SystemExit(f"error: {text}") from error


__all__ = ["checked", "define_flag", "known", "name_of", "parse", "resolved", "sys"]

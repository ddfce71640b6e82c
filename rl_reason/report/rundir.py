"""The directory of a run: ``runs/<name>/`` with the config it was started with.

A directory belongs to one run. It is entered again only on purpose (``--resume``) and only with the config that it
holds, but for the keys that the caller lets change.
"""

import dataclasses
import datetime
import fnmatch
import json
import pathlib
import re
import typing
from collections.abc import Mapping, Sequence

from rl_reason.report.files import is_leftover, jsonable, to_json, write_atomic

ABSENT = "(absent)"


class RunError(ValueError):
    """A run directory cannot be used as asked; the message says how to proceed."""


@dataclasses.dataclass(frozen=True)
class RunDir:
    """Where everything of a run lies. ``resumed`` is True when it was there before."""

    path: pathlib.Path
    resumed: bool = False

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def config(self) -> pathlib.Path:
        return self.path / "config.json"

    @property
    def metrics(self) -> pathlib.Path:
        return self.path / "metrics.jsonl"

    @property
    def tensorboard(self) -> pathlib.Path:
        return self.path / "tensorboard"

    @property
    def rollouts(self) -> pathlib.Path:
        return self.path / "rollouts"

    @property
    def checkpoints(self) -> pathlib.Path:
        return self.path / "checkpoints"

    @property
    def summary(self) -> pathlib.Path:
        return self.path / "summary.json"

    @property
    def plots(self) -> pathlib.Path:
        return self.path / "plots"

    @property
    def report(self) -> pathlib.Path:
        return self.path / "report.html"

    def written(self) -> dict[str, pathlib.Path]:
        """What is there by now, by what it is called; extra entries of the directory come last."""
        known = ("report", "plots", "metrics", "tensorboard", "rollouts", "checkpoints", "config", "summary")
        paths = {name: getattr(self, name) for name in known}
        for entry in sorted(self.path.iterdir()) if self.path.is_dir() else ():
            if entry not in paths.values() and not entry.name.startswith("."):
                paths[entry.name if entry.stem in paths else entry.stem] = entry
        return {name: path for name, path in paths.items() if path.exists()}


def flatten(config: Mapping[str, typing.Any], prefix: str = "") -> dict[str, typing.Any]:
    """Nested dicts as dotted keys; lists and empty dicts stay whole.

    >>> flatten({"a": {"b": 1, "c": [2, 3]}})
    {'a.b': 1, 'a.c': [2, 3]}
    """
    flat = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def diff_configs(
    old: Mapping[str, typing.Any], new: Mapping[str, typing.Any]
) -> dict[str, tuple[typing.Any, typing.Any]]:
    """Dotted keys whose values differ, with both; a key that one side lacks is ``"(absent)"`` there."""
    flat_old, flat_new = flatten(_config_json(old)), flatten(_config_json(new))
    keys = [*flat_old, *(key for key in flat_new if key not in flat_old)]
    pairs = {key: (flat_old.get(key, ABSENT), flat_new.get(key, ABSENT)) for key in keys}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def load_config(path: pathlib.Path) -> dict[str, typing.Any]:
    """The config of a run.

    Raises:
        RunError: when the directory holds no run.
    """
    file = pathlib.Path(path) / "config.json"
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunError(f"{path} holds no run: there is no {file}.{_candidates(pathlib.Path(path).parent)}") from None
    except json.JSONDecodeError as error:
        raise RunError(f"{file} is not JSON ({error}); restore it, or start another run.") from None


def open_run(
    config: Mapping[str, typing.Any],
    *,
    config_name: str,
    run: str | None = None,
    root: str | pathlib.Path = "runs",
    resume: bool = False,
    may_change: Sequence[str] = (),
    may_grow: Sequence[str] = ("num_steps",),
    write: bool = True,
) -> RunDir:
    """The directory of a new run, or of one to go on with.

    Args:
        config: what the run is trained with; anything that ``files.jsonable`` takes.
        config_name: names the directory when ``run`` does not: ``<config_name>-<timestamp>``.
        run: the directory's name below ``root``, or a path when it holds a slash.
        resume: go on with the run that ``run`` names.
        may_change: dotted keys, or patterns of them, that may differ on resume.
        may_grow: those that are numbers and may become larger, never smaller.
        write: False on every process but the first, which then must be told ``run``: nothing is checked or created.

    Raises:
        RunError: when the directory is taken, is no run, or holds a run of another config.
    """
    root = pathlib.Path(root)
    path = None if run is None else (pathlib.Path(run) if "/" in run else root / run)
    if not write:
        if path is None:
            raise RunError("Only process 0 names a run: broadcast its path, and pass it as run= with write=False.")
        return RunDir(path, resumed=resume)
    if resume:
        if path is None:
            raise RunError(f"--resume needs --run=NAME, the run to go on with.{_candidates(root)}")
        return _resume(path, config, may_change, may_grow)
    path = _fresh_path(root, config_name) if path is None else path
    if (path / "config.json").exists():
        raise RunError(
            f"{path} already holds a run. To go on with it, add --resume; to start another, choose another name with "
            "--run=NAME or leave --run out."
        )
    if path.exists() and not path.is_dir():
        raise RunError(f"{path} is a file; choose another name with --run=NAME.")
    if path.is_dir() and any(not is_leftover(entry) for entry in path.iterdir()):
        raise RunError(f"{path} is not empty and holds no run (no config.json); choose another name with --run=NAME.")
    write_atomic(path / "config.json", to_json(_config_json(config), indent=2) + "\n")
    return RunDir(path)


def _resume(
    path: pathlib.Path, config: Mapping[str, typing.Any], may_change: Sequence[str], may_grow: Sequence[str]
) -> RunDir:
    """Checks that ``path`` holds a run of this config, and notes in resumes.jsonl what was let change."""
    changes = diff_configs(load_config(path), config)
    refused = {
        key: pair
        for key, pair in changes.items()
        if not any(fnmatch.fnmatchcase(key, pattern) for pattern in may_change)
        and not (any(fnmatch.fnmatchcase(key, pattern) for pattern in may_grow) and _grows(*pair))
    }
    if refused:
        raise RunError(_refusal(path, refused, may_change, may_grow))
    if changes:
        log = path / "resumes.jsonl"
        before = log.read_text(encoding="utf-8") if log.exists() else ""
        note = {"time": _now().isoformat(timespec="seconds"), "changed": changes}
        write_atomic(log, before + to_json(note) + "\n")
        write_atomic(path / "config.json", to_json(_config_json(config), indent=2) + "\n")
    return RunDir(path, resumed=True)


def _refusal(
    path: pathlib.Path,
    refused: Mapping[str, tuple[typing.Any, typing.Any]],
    may_change: Sequence[str],
    may_grow: Sequence[str],
) -> str:
    width = min(40, max(map(len, refused)))
    lines = [f"  {key:<{width}}  {_show(old)} -> {_show(new)}" for key, (old, new) in refused.items()]
    settable = {key: old for key, (old, _) in refused.items() if old != ABSENT}
    keep = " ".join(f"--config.{key}={_show(old)}" for key, old in settable.items())
    allowed = [*may_change, *(f"{pattern} (upwards)" for pattern in may_grow)]
    return "\n".join(
        [
            f"{path} was started with another config (run -> asked for):",
            *lines,
            f"To go on with it, ask for its own values{f': {keep}' if keep else ', with the code it was started by'}.",
            "To train with the new ones, start another run: drop --resume, and leave --run out or name another.",
            f"On resume these may change: {', '.join(allowed) or 'none'}.",
        ]
    )


def _show(value: typing.Any) -> str:
    return value if value == ABSENT else to_json(value)


def _grows(old: typing.Any, new: typing.Any) -> bool:
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in (old, new))
    return numbers and new > old


def _config_json(config: Mapping[str, typing.Any]) -> dict[str, typing.Any]:
    """As config.json holds it; infinities are kept as text, since JSON has none and null would mean 'unset'."""

    def spell(value: typing.Any) -> typing.Any:
        if isinstance(value, Mapping):
            return {str(key): spell(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [spell(item) for item in value]
        plain = jsonable(value)
        return str(value) if plain is None and value is not None else plain

    return spell(config)


def _fresh_path(root: pathlib.Path, config_name: str) -> pathlib.Path:
    """``root/<config>-<timestamp>``, created here so that two runs of one second do not share it."""
    stem = re.sub(r"\.py\b", "", pathlib.PurePath(config_name).name)
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-.") or "run"
    stamp = f"{stem}-{_now():%Y%m%d-%H%M%S}"
    for attempt in range(1, 1000):
        path = root / (stamp if attempt == 1 else f"{stamp}-{attempt}")
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            continue
        return path
    raise RunError(f"{root} holds a thousand runs named {stamp}; choose a name with --run=NAME.")


def _candidates(root: pathlib.Path) -> str:
    """A sentence that lists the latest runs below ``root``."""
    runs = [file.parent for file in root.glob("*/config.json")] if root.is_dir() else []
    runs.sort(key=lambda path: (path / "config.json").stat().st_mtime, reverse=True)
    return f" Runs there, latest first: {', '.join(path.name for path in runs[:5])}." if runs else ""


def _now() -> datetime.datetime:
    return datetime.datetime.now()

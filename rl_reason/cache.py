"""What runs share on disk: prerequisites that were trained once, under the hash of everything that made them."""

import hashlib
import json
import os
import pathlib
import shutil
import typing
from collections.abc import Callable, Sequence

import jax
from jaxtyping import PyTree

import rl_reason
from rl_reason import checkpoint, processes

ROOT = pathlib.Path(rl_reason.__file__).parent


class Kept(typing.NamedTuple):
    """Arrays, and whether they came from the cache."""

    tree: PyTree
    cached: bool


def cache_root() -> pathlib.Path:
    """RL_REASON_CACHE, or ~/.cache/rl_reason: trained prerequisites and compiled programs."""
    return pathlib.Path(os.environ.get("RL_REASON_CACHE", "~/.cache/rl_reason")).expanduser()


def fingerprint(values: dict[str, typing.Any], made_by: Sequence[str]) -> str:
    """A name for what these values and these files or folders of ``rl_reason`` make, with this jax and backend."""
    digest = hashlib.sha256()
    values = values | dict(jax=jax.__version__, backend=jax.default_backend())
    digest.update(json.dumps(values, sort_keys=True, default=str).encode())
    for name in made_by:
        files = sorted((ROOT / name).rglob("*.py")) if (ROOT / name).is_dir() else [ROOT / name]
        for file in files:
            digest.update(file.read_bytes())
    return digest.hexdigest()[:20]


def read_or_make(place: pathlib.Path, like: PyTree, make: Callable[[], PyTree]) -> Kept:
    """The tree at ``place``, in the shapes and shardings of ``like``; else what ``make`` gives, which is put there.

    Where processes do not share that directory, nothing is read or put there: each would hold a part only.
    """
    if processes.blind_to(place.parent):
        return Kept(make(), False)
    if processes.every_process(place.exists()):
        try:
            return Kept(checkpoint.restore_tree(place, like), True)
        except (ValueError, OSError, KeyError):
            if processes.is_first():
                shutil.rmtree(place, ignore_errors=True)  # a damaged entry is made again
    tree = make()
    _keep(place, tree)
    return Kept(tree, False)


def _keep(place: pathlib.Path, tree: PyTree) -> None:
    """Puts an entry into the cache by a rename: whole or absent, whoever is killed or makes the same one meanwhile."""
    unfinished = place.with_name(processes.broadcast_text(f"{place.name}.{os.getpid()}.tmp"))
    checkpoint.save_tree(unfinished, tree)
    if processes.is_first():
        try:
            unfinished.rename(place)
        except OSError:  # another run was faster
            shutil.rmtree(unfinished, ignore_errors=True)

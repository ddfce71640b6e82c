"""Saving and restoring with Orbax: a checkpoint is complete or it is not there."""

import pathlib
import typing
from collections.abc import Mapping

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from jaxtyping import PyTree

from rl_reason import processes


class CheckpointError(ValueError):
    """A checkpoint that is missing or does not fit."""


def _is_key(x: typing.Any) -> bool:
    return hasattr(x, "dtype") and jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)


def _unwrap(tree: PyTree) -> PyTree:
    """Typed keys as their words."""
    return jax.tree.map(lambda x: jax.random.key_data(x) if _is_key(x) else x, tree)


def _wrap(tree: PyTree, like: PyTree) -> PyTree:
    return jax.tree.map(lambda x, ref: jax.random.wrap_key_data(x) if _is_key(ref) else x, tree, like)


def _abstract(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), _unwrap(tree))


def _plain(tree: PyTree) -> dict[str, PyTree]:
    """A flat dict by path: None leaves vanish, and class names never enter the files."""
    return {jax.tree_util.keystr(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}


class Checkpoints:
    """The checkpoints of one run. All processes call every method together."""

    def __init__(self, directory: str | pathlib.Path, *, keep: int):
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, create=True, enable_async_checkpointing=False, step_prefix="step"
        )
        self._directory = pathlib.Path(directory).absolute()
        self._manager = ocp.CheckpointManager(self._directory, options=options)

    def save(self, step: int, tree: PyTree, extra: Mapping[str, typing.Any]) -> None:
        """Saves arrays and JSON as one checkpoint; returns when it is committed."""
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(_plain(_unwrap(tree))), extra=ocp.args.JsonSave(dict(extra))
            ),
            force=True,
        )
        self._manager.wait_until_finished()

    def latest(self) -> int | None:
        """The newest complete step that the first process sees."""
        return int(processes.broadcast_text(str(self._manager.latest_step() or 0))) or None

    def steps(self) -> list[int]:
        """All complete steps."""
        return sorted(self._manager.all_steps())

    def extra(self, step: int) -> dict[str, typing.Any]:
        """The JSON of a checkpoint."""
        restored = self._manager.restore(step, args=ocp.args.Composite(extra=ocp.args.JsonRestore()))
        return dict(restored["extra"])

    def restore(self, step: int, like: PyTree) -> PyTree:
        """The arrays of a checkpoint in the structure, dtypes and shardings of ``like``.

        Raises:
            CheckpointError: when the shapes or names differ: it was saved by another model or optimizer.
        """
        wanted = _plain(_abstract(like))
        try:
            _assert_whole(self._directory / f"step_{step}" / "state")
            restored = self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(wanted)))[
                "state"
            ]
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"Checkpoint {step} of {self._manager.directory} does not fit this config's model, optimizer or loop "
                f"mode: {str(error)[:500]}"
            ) from error
        return _rebuild(restored, like)

    def close(self) -> None:
        """Waits for writes."""
        self._manager.close()


def _rebuild(flat: Mapping[str, typing.Any], like: PyTree) -> PyTree:
    paths, treedef = jax.tree_util.tree_flatten_with_path(like)
    leaves = [flat[jax.tree_util.keystr(path)] for path, _ in paths]
    return _wrap(jax.tree_util.tree_unflatten(treedef, leaves), like)


def save_tree(path: pathlib.Path, tree: PyTree) -> None:
    """Arrays alone, whole or absent: what the caches hold."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path.absolute(), _plain(_unwrap(tree)), force=True)


def restore_tree(path: pathlib.Path, like: PyTree) -> PyTree:
    """What ``save_tree`` wrote, in the structure and shardings of ``like``."""
    _assert_whole(path)
    with ocp.StandardCheckpointer() as checkpointer:
        return _rebuild(checkpointer.restore(path.absolute(), _plain(_abstract(like))), like)


def restore_named(path: pathlib.Path, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """Some arrays of a saved tree by the names of their paths (``keystr``); nothing else of it is read or touched.

    Raises:
        CheckpointError: arrays that are not there, or have other shapes.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path} is missing; put it back.")
    _assert_whole(path)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        found: typing.Any = checkpointer.metadata(path).item_metadata
        wrong = [
            f"{name} is {tuple(found[name].shape) if name in found else 'not there'}, the config's is {leaf.shape}"
            for name, leaf in wanted.items()
            if name not in found or tuple(found[name].shape) != leaf.shape
        ]
        if wrong:
            raise CheckpointError(
                f"{path} does not fit the model of the run's config.json: {'; '.join(wrong[:3])}"
                f"{f' and {len(wrong) - 3} more' if len(wrong) > 3 else ''}. Restore the config.json of its run."
            )
        arguments = ocp.args.PyTreeRestore(
            item=dict(wanted),
            restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
            partial_restore=True,
        )
        return checkpointer.restore(path, args=arguments)


def restore_part(path: pathlib.Path, like: PyTree, above: tuple = ()) -> PyTree:
    """What a saved tree has below the tree path ``above``, in the structure, shapes, dtypes and shardings of ``like``.

    Raises:
        CheckpointError: arrays that are not there, or have other shapes.
    """
    paths, treedef = jax.tree_util.tree_flatten_with_path(like)
    wanted = {jax.tree_util.keystr((*above, *path)): leaf for path, leaf in paths}
    found = restore_named(path, wanted)
    return jax.tree_util.tree_unflatten(treedef, [found[name] for name in wanted])


def _assert_whole(path: pathlib.Path) -> None:
    """Reads the index of a saved tree. Orbax would for all arrays at once: after one failure it closes its event loop under
    the others, and each of them prints a trace.

    Raises:
        ValueError: when it is missing or damaged.
    """
    store = tensorstore.KvStore.open({"driver": "ocdbt", "base": f"file://{path.absolute()}/"}).result()
    if not store.list().result():
        raise ValueError(f"{path} holds no arrays, or has lost its manifest.ocdbt")


def host_copy(tree: PyTree) -> PyTree:
    """Numpy arrays of everything, typed keys as words; for comparisons."""
    return jax.tree.map(np.asarray, _unwrap(tree))

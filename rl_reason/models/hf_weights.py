"""Hugging Face checkpoints, read straight into sharded arrays, tensor by tensor.

Beside the parameters themselves this needs memory for one of them (stacked over layers) and one tensor. Every name and
shape is checked against the model before a byte of data is read.
"""

import dataclasses
import pathlib
import typing
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding
from jaxtyping import PyTree

from rl_reason.checkpoint import restore_tree
from rl_reason.models import hf_names
from rl_reason.models.hf_config import CONFIG, WeightsError, first_of, model_keys, read_json
from rl_reason.models.hf_files import DTYPES, PARAMS, Checkpoint
from rl_reason.models.hf_names import HEAD, HEADS, PREFIXES, Piece, Plan
from rl_reason.models.transformer import ModelConfig, param_shapes
from rl_reason.sharding import by_path

COMPUTED = "rotary_emb.inv_freq"  # old Llama checkpoints have it
OnTensor = Callable[[int, int], None]  # hears how many tensors of how many are done


class Layout(typing.NamedTuple):
    """Where a checkpoint has its language model, and what else there is."""

    config: dict[str, typing.Any]  # its config.json
    prefix: str
    plan: Plan
    towers: list[str]
    unused: list[str]


class Loaded(typing.NamedTuple):
    """Parameters, and the names of what else their checkpoint has: towers, and tensors that nobody uses."""

    params: PyTree
    towers: list[str]
    unused: list[str]


def read(
    folder: str | pathlib.Path,
    model: ModelConfig,
    shardings: PyTree | None = None,
    on_tensor: OnTensor = lambda done, total: None,
) -> Loaded:
    """A checkpoint's language model in the shapes, dtype and shardings (None: one device) of ours.

    Raises:
        WeightsError: a checkpoint of another model, or one that is not whole; names the file or tensor.
    """
    shapes = param_shapes(model)
    if shardings is None:
        shardings = jax.tree.map(lambda _: SingleDeviceSharding(jax.devices()[0]), shapes)
    if (pathlib.Path(folder) / PARAMS).is_dir():
        return Loaded(_restore(pathlib.Path(folder), model, shardings), [], [])
    leaves, places = by_path(shapes), by_path(shardings)
    checkpoint = Checkpoint(folder)
    layout = check(checkpoint, model)
    arrays, done, total = {}, 0, sum(map(len, layout.plan.values()))
    # The largest first: its copy on the host is gone before the other arrays are there.
    for path in sorted(leaves, key=lambda path: -leaves[path].size):
        arrays[path] = _read_parameter(checkpoint, layout.plan[path], leaves[path], places[path])
        done += len(layout.plan[path])
        on_tensor(done, total)
    params = jax.tree.unflatten(jax.tree.structure(shapes), [arrays[path] for path in leaves])
    return Loaded(params, layout.towers, layout.unused)


def _restore(folder: pathlib.Path, model: ModelConfig, shardings: PyTree) -> PyTree:
    """Parameters by Orbax: every process reads what its devices hold."""
    config_of(folder, model)
    place = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    try:
        return restore_tree(folder / PARAMS, jax.tree.map(place, param_shapes(model), shardings))
    except (ValueError, OSError, KeyError) as error:
        raise WeightsError(f"{folder / PARAMS} cannot be read ({str(error)[:300]}); convert it again.") from error


def keys_of(model: ModelConfig) -> dict[str, typing.Any]:
    """A model in the words of ``config.model``; of RoPE's scaling what its kind has."""
    scaling = dataclasses.asdict(model)["rope_scaling"]
    return vars(model) | dict(rope_scaling=scaling and {key: value for key, value in scaling.items() if value})


def config_of(folder: pathlib.Path, model: ModelConfig) -> dict[str, typing.Any]:
    """The config.json of a checkpoint.

    Raises:
        WeightsError: there is none, or it describes another model than this one.
    """
    file = folder / CONFIG
    config, ours = read_json(file), keys_of(model)
    theirs = model_keys(config, str(file))
    if differing := [f"{key}={ours[key]!r} (there {value!r})" for key, value in theirs.items() if ours[key] != value]:
        raise WeightsError(f"{file} is of another model than this one, which has {', '.join(differing)}.")
    return config


def _read_parameter(
    checkpoint: Checkpoint, pieces: Sequence[Piece], leaf: jax.ShapeDtypeStruct, sharding: Sharding
) -> jax.Array:
    """One stacked parameter: each of its pieces is read once, if a device of this process wants any of it."""

    def bounds(index: typing.Any) -> tuple[tuple[int, int], ...]:
        return tuple(own.indices(size)[:2] for own, size in zip(index, leaf.shape, strict=True))

    wanted = {bounds(index) for index in sharding.addressable_devices_indices_map(leaf.shape).values()}
    blocks = {block: np.empty([stop - start for start, stop in block], leaf.dtype) for block in wanted}
    for piece in pieces:
        depth = len(piece.place)
        takers = [block for block in blocks if all(a <= i < z for i, (a, z) in zip(piece.place, block, strict=False))]
        if not takers:
            continue
        whole = piece.tensor.to_ours(checkpoint.read(piece.name, piece.part), leaf.shape[depth:])
        for block in takers:
            at = tuple(i - start for i, (start, _) in zip(piece.place, block, strict=False))
            blocks[block][at] = whole[tuple(slice(*span) for span in block[depth:])]
    array = jax.make_array_from_callback(leaf.shape, sharding, lambda index: blocks[bounds(index)])
    return jax.block_until_ready(array)  # before the blocks of the next one are made


def check(checkpoint: Checkpoint, model: ModelConfig) -> Layout:
    """Every parameter has its tensors, of the right shape, and every tensor of the language model its parameter.

    Raises:
        WeightsError: with the first of what is missing, misshapen, quantised or left over.
    """
    config = config_of(checkpoint.folder, model)
    names = set(checkpoint.names)
    prefix = hf_names.prefix_of(names)
    if prefix is None:
        raise WeightsError(
            f"{checkpoint.folder} has no embed_tokens.weight below any of {', '.join(PREFIXES)}; its first tensors are "
            f"{', '.join(checkpoint.names[:3]) or 'none'}."
        )
    plan = hf_names.plan(param_shapes(model), model, prefix, hf_names.is_fused(names, prefix))
    expected = {piece.name: piece.shape for pieces in plan.values() for piece in pieces}
    if missing := [name for name in expected if name not in names]:
        raise WeightsError(
            f"{checkpoint.folder} lacks {first_of(missing)} of the {len(expected)} tensors that its {CONFIG} calls for; "
            "fetch it again."
        )
    for name, shape in expected.items():
        found, file = checkpoint.described(name), checkpoint.file_of(name)
        if found.shape != shape:
            raise WeightsError(
                f"{file}: {name} is {list(found.shape)}, and {CONFIG} makes it {list(shape)}; are they of one model?"
            )
        if found.dtype not in DTYPES:
            raise WeightsError(f"{file}: {name} is {found.dtype}; there are {', '.join(DTYPES)}, nothing quantised.")
    head = HEADS.get(prefix, HEAD)
    rest = sorted(names - set(expected))
    unused = [name for name in rest if name.endswith(COMPUTED) or (model.tie_embeddings and name == head)]
    # A language model alone has all there is; beside towers, what is below its prefix.
    own = lambda name: prefix == PREFIXES[-1] or name.startswith((prefix, head))
    if left := [name for name in rest if own(name) and name not in unused]:
        raise WeightsError(
            f"{checkpoint.file_of(left[0])} has {first_of(left)}, of which the model that {CONFIG} describes has no use; "
            "are they of one model?"
        )
    return Layout(config, prefix, plan, [name for name in rest if not own(name)], unused)

"""The mesh, and the one table that says how each parameter is cut over it.

Axes: ``data``, ``fsdp`` and ``expert`` cut the rows of a batch; ``tensor`` and ``fsdp`` cut the weights, ``expert`` the
experts and, with ``fsdp``, all other weights. All are ``AxisType.Auto``: the compiler propagates, and the few constraints
below pin what it must not guess; experts are multiplied inside ``shard_map`` (models/experts.py).
"""

import math
import re
import typing
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, PyTree

AXES = ("data", "fsdp", "tensor", "expert")
ROWS = ("data", "fsdp", "expert")  # what a batch's rows are cut over
FSDP = ("fsdp", "expert")  # what the weights outside of experts are cut over, to be gathered where they are used

# First match wins. Layer parameters carry a leading stacked axis, which is never cut. MoE kernels are [L, E, in, out].
PARTITION_RULES: tuple[tuple[str, P], ...] = (
    (r"^embed$", P("tensor", FSDP)),
    (r"^unembed$", P(FSDP, "tensor")),
    (r"layers/attention/(q|k|v)/kernel$", P(None, FSDP, "tensor", None)),
    (r"layers/attention/(q|k|v)/bias$", P(None, "tensor", None)),
    (r"layers/attention/out/kernel$", P(None, "tensor", None, FSDP)),
    (r"layers/mlp/(gate|up)/kernel$", P(None, FSDP, "tensor")),
    (r"layers/mlp/down/kernel$", P(None, "tensor", FSDP)),
    (r"layers/(attention/(q|k|v)|mlp/(gate|up))/lora_a$", P(None, FSDP)),
    (r"layers/(attention/(q|k|v)|mlp/(gate|up))/lora_b$", P(None, None, "tensor")),
    (r"layers/(attention/out|mlp/down)/lora_a$", P(None, "tensor")),
    (r"layers/(attention/out|mlp/down)/lora_b$", P(None, None, FSDP)),
    (r"/lora_scale$", P()),
    (r"layers/moe/router$", P(None, FSDP, None)),
    (r"layers/moe/(gate|up)$", P(None, "expert", "fsdp", "tensor")),
    (r"layers/moe/down$", P(None, "expert", "tensor", "fsdp")),
    (r"norm(/scale)?$", P()),
)


def make_mesh(sizes: Mapping[str, int], devices: list | None = None) -> Mesh:
    """A mesh of the four axes over all devices; one size may be -1 for "what is left".

    Raises:
        ValueError: unknown axes, or sizes whose product is not the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    if unknown := set(sizes) - set(AXES):
        raise ValueError(f"mesh: unknown axes {sorted(unknown)}; the axes are {', '.join(AXES)}.")
    shape = [sizes.get(axis, 1) for axis in AXES]
    rest = math.prod(s for s in shape if s != -1)
    if shape.count(-1) == 1 and len(devices) % rest == 0:
        shape = [len(devices) // rest if s == -1 else s for s in shape]
    if math.prod(shape) != len(devices):
        given = ", ".join(f"{a}={sizes.get(a, 1)}" for a in AXES)
        raise ValueError(f"mesh({given}) does not cover {len(devices)} devices; make the product {len(devices)}.")
    # An axis of ours may be a part of one of a pod's torus, as 2 of 4 chips are: jax.make_mesh refuses that.
    placed = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(placed, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def num_row_shards(mesh: Mesh | AbstractMesh) -> int:
    """Into how many pieces a batch's rows are cut."""
    return math.prod(mesh.shape[axis] for axis in ROWS)


def path_name(path: tuple) -> str:
    """'layers/attention/q/kernel' for a tree path."""
    return "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)


def by_path(tree: PyTree) -> dict[str, typing.Any]:
    """The leaves of a tree by the names of their paths."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def path_matches(path: tuple, patterns: Iterable[str]) -> bool:
    """Whether any of the patterns is found in a tree path's name."""
    return any(re.search(pattern, path_name(path)) for pattern in patterns)


def param_spec(name: str, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> P:
    """The table's spec for one parameter, less the axes that do not divide its shape; of two axes the last goes first.

    Raises:
        ValueError: no rule matches; add one to PARTITION_RULES.
    """
    spec = next((spec for pattern, spec in PARTITION_RULES if re.search(pattern, name)), None)
    if spec is None:
        raise ValueError(f"No partition rule matches parameter {name!r} {shape}; add one to sharding.PARTITION_RULES.")
    parts = list(spec) + [None] * (len(shape) - len(spec))
    return P(*(_dividing(part, size, mesh) for part, size in zip(parts, shape, strict=True)))


def _dividing(
    part: str | tuple[str, ...] | None, size: int, mesh: Mesh | AbstractMesh
) -> str | tuple[str, ...] | None:
    """As many of the axes as divide a dimension together."""
    axes = (part,) if isinstance(part, str) else part or ()
    while axes and size % math.prod(mesh.shape[axis] for axis in axes):
        axes = axes[:-1]
    return axes if len(axes) > 1 else next(iter(axes), None)


def param_shardings(params: PyTree, mesh: Mesh) -> PyTree:
    """A NamedSharding for every parameter of a tree (arrays or shapes)."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: NamedSharding(mesh, param_spec(path_name(path), x.shape, mesh)), params
    )


def resident_spec(spec: P) -> P:
    """The decoding layout of what the table cuts so: whole over ``fsdp``, so that no step gathers it; ``tensor`` cuts on,
    and ``expert`` the experts."""
    return P(*(None if part in ("fsdp", FSDP) else part for part in spec))


def make_resident(params: PyTree) -> PyTree:
    """Parameters in the decoding layout on the mesh in use, gathered once; without a mesh they stay as they are.

    Layers may be stacked, or a list of layers.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return params

    def place(path, x):
        name, alone = re.subn(r"^layers/\d+/", "layers/", path_name(path))
        spec = resident_spec(param_spec(name, (1,) * alone + x.shape, mesh))
        return constrain(x, *spec[alone:])

    return jax.tree_util.tree_map_with_path(place, params)


def bytes_per_device(
    params: PyTree, mesh: Mesh | AbstractMesh, dtype: str | None = None, resident: bool = False
) -> dict[str, int]:
    """What each parameter (arrays or shapes) takes of a device, in its own type or ``dtype``; ``resident``: in the decoding
    layout."""

    def size(path, x):
        spec = param_spec(path_name(path), x.shape, mesh)
        shard = NamedSharding(mesh, resident_spec(spec) if resident else spec).shard_shape(x.shape)
        return math.prod(shard) * np.dtype(dtype or x.dtype).itemsize

    return by_path(jax.tree_util.tree_map_with_path(size, params))


def like_params(
    tree: PyTree, params: PyTree, mesh: Mesh, others: Mapping[str, PyTree] = MappingProxyType({})
) -> PyTree:
    """Shardings for a state tree: leaves that mirror a parameter (by path suffix and shape) follow it, others replicate.

    Optimizer moments carry the parameters' paths below their own, so the longest matching suffix names the parameter.
    ``others`` are parameters of other models, by the path below which leaves follow those.
    """
    own, elsewhere = by_path(params), {prefix: by_path(params) for prefix, params in others.items()}

    def place(path, leaf):
        name = path_name(path)
        known = next((names for prefix, names in elsewhere.items() if name.startswith(prefix)), own)
        for start in (0, *(m.end() for m in re.finditer("/", name))):
            if name[start:] in known and known[name[start:]].shape == leaf.shape:
                return NamedSharding(mesh, param_spec(name[start:], leaf.shape, mesh))
        return NamedSharding(mesh, P())

    return jax.tree_util.tree_map_with_path(place, tree)


def constrain(x: PyTree, *spec) -> PyTree:
    """Pins every leaf to ``P(*spec)`` of the mesh in use; without a mesh (``jax.set_mesh``) it does nothing."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.tree.map(lambda leaf: jax.lax.with_sharding_constraint(leaf, P(*spec)), x)


def heads_axis(num_heads: int) -> str | None:
    """The axis of the mesh in use that cuts attention heads, ``tensor``, as it cuts the projections that make them; None
    where it does not divide them."""
    ways = dict(jax.sharding.get_abstract_mesh().shape).get("tensor", 1)
    return "tensor" if num_heads % ways == 0 else None


def constrain_rows(x: PyTree) -> PyTree:
    """Cuts the leading axis over data, fsdp and expert."""
    return constrain(x, ROWS)


def by_rows(function: Callable, *arrays: Array) -> PyTree:
    """``function`` of arrays whose rows have nothing to do with each other, on each device of its own rows: for operations
    that the compiler would gather all rows for, as ``top_k``. Of all at once without a mesh, or where it does not divide.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.manual_axes or len(arrays[0]) % num_row_shards(mesh):
        return function(*arrays)
    return jax.shard_map(function, in_specs=P(ROWS), out_specs=P(ROWS))(*arrays)

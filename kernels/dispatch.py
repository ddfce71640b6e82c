"""Choosing among the implementations of one operation."""

import re
from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import AxisType

F = TypeVar("F")


def named(op: str, implementations: Mapping[str, F], name: str) -> F:
    """The implementation called ``name``; a ``ValueError`` that lists the others when there is none."""
    if name not in implementations:
        known = ", ".join(f'"{known}"' for known in implementations)
        raise ValueError(
            f'{op}: implementation="{name}" does not exist; use one of {known}, or None to choose by size'
        )
    return implementations[name]


def on_one_device() -> bool:
    """Whether operands are a device's own: without a mesh of several in use (``jax.set_mesh``), or in ``shard_map``."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.size <= 1 or all(kind == AxisType.Manual for kind in mesh.axis_types)


def varying(x: jax.Array, *operands: jax.Array) -> jax.Array:
    """x, typed as what is computed from the operands: in ``shard_map`` what differs between devices has a type of its own,
    which a loop's first carry and a kernel's result have to be given. Its gradient is summed over those devices."""
    differ = lambda x: jax.typeof(x).manual_axis_type.varying
    axes = frozenset().union(*map(differ, operands)) - differ(x)
    return jax.lax.pcast(x, tuple(sorted(axes)), to="varying") if axes else x


def alike(*operands: jax.Array) -> tuple[jax.Array, ...]:
    """All of them, each typed as what is computed from all: what a derivative written by hand has to be given."""
    return tuple(varying(x, *operands) for x in operands)


def result(shape: tuple[int, ...], dtype: Any, *operands: jax.Array) -> jax.ShapeDtypeStruct:
    """What a kernel of these operands returns, typed in the same way."""
    return jax.eval_shape(lambda *operands: varying(jnp.zeros(shape, dtype), *operands), *operands)


def platform() -> str:
    """What a program traced now is for, "cpu", "gpu" or "tpu": by the mesh in use, whose devices need not be here, else this
    process's default. Where it is lowered, ``jax.lax.platform_dependent`` knows better."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def gpu() -> Any:
    """The GPU that a program traced now is for: that of a mesh in use (``jax.sharding.AbstractDevice``), else this
    process's first CUDA device; None where nothing tells."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is not None and device.platform == "gpu":
        return device
    try:
        return jax.devices("cuda")[0]
    except RuntimeError:  # there are none
        return None


def on_hopper() -> bool | None:
    """Whether that GPU is of compute capability 9.x; None without one: a machine without a GPU cannot know for which one
    it lowers, and kernels for Hopper have to be asked for by name there."""
    device = gpu()
    if device is None:
        return None
    if capability := getattr(device, "compute_capability", ""):
        return capability.startswith("9.")
    return re.search(r"\bG?H\d", device.device_kind) is not None  # H100, H200, H800, H20, GH200

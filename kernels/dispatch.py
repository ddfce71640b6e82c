"""Choosing among the implementations of one operation."""

from collections.abc import Mapping
from typing import TypeVar

import jax
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


def on_hopper() -> bool:
    """Whether all of this process's devices are GPUs of compute capability 9.0.

    Lowering tells CUDA from other platforms but not one GPU from another. So a process that compiles for a Hopper GPU
    without having one is not recognised, and has to ask for its kernels by name.
    """
    return all(getattr(device, "compute_capability", None) == "9.0" for device in jax.local_devices())

"""Grouped matrix product: consecutive groups of rows, each with its own matrix."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels import dispatch
from kernels.grouped_matmul import batched_xla, blocked_xla, pallas_hopper, pallas_tpu, ragged_dot


class Implementation(NamedTuple):
    """``product(lhs, rhs, group_sizes, transpose_rhs, dtype)`` and ``weight_gradient(lhs, g, group_sizes, dtype)``."""

    product: Callable[..., jax.Array]
    weight_gradient: Callable[..., jax.Array]  # [E, K, N]: lhs^T g within each group
    swiglu: Callable[..., jax.Array] | None = (
        None  # ``swiglu(lhs, gate, up, group_sizes, dtype)``; None: two products, joined
    )


# A backend is one more file and one more line here, chosen by platform in `_run`.
IMPLEMENTATIONS = {
    "ragged_dot": Implementation(ragged_dot.product, ragged_dot.weight_gradient),
    "batched_xla": Implementation(batched_xla.product, batched_xla.weight_gradient),
    "blocked_xla": Implementation(blocked_xla.product, blocked_xla.weight_gradient),
    "pallas_tpu": Implementation(pallas_tpu.product, pallas_tpu.weight_gradient),
    "pallas_hopper": Implementation(pallas_hopper.product, pallas_hopper.weight_gradient, pallas_hopper.swiglu),
}


def grouped_matmul(
    lhs: Float[Array, "M K"],
    rhs: Float[Array, "E _ _"],
    group_sizes: Int[Array, " G"],
    *,
    group_offset: int | Int[Array, ""] | None = None,
    transpose_rhs: bool = False,
    preferred_element_type: Any = None,
    implementation: str | None = None,
) -> Float[Array, "M N"]:
    """``out[i] = lhs[i] @ rhs[e]`` where row i lies in group e: the e-th run of ``group_sizes[e]`` rows.

    rhs is [E, K, N], or [E, N, K] with ``transpose_rhs``. Groups may be empty and may sum to less than M: the rows
    beyond are exact zeros, get zero gradient, and may hold anything. A sum above M is an error that is not checked:
    what lies past M is not read. Accumulates in fp32 at least; the result has ``preferred_element_type``, by default
    the promoted type of the operands, and gradients have the type of their operand.

    ``group_offset``: rhs has the matrices of groups ``group_offset .. group_offset + E - 1`` alone, of the G that
    ``group_sizes`` describes, and rows of other groups are zeros: a device's part of the sum over an expert axis of
    ``shard_map``, for lhs that all of its devices have. Rows are rolled to and fro, a copy each; None, all groups, costs
    nothing.

    ``implementation``: "pallas_tpu" and "pallas_hopper" (kernels for TPUs and for Hopper GPUs, compiled for them alone;
    the second for 16-bit operands and axes in multiples of 64), "ragged_dot" (``jax.lax.ragged_dot``: a kernel on TPU,
    dense elsewhere), "blocked_xla" (a loop over blocks of rows: what CPUs want), "batched_xla" (one batched product of
    blocks: other GPUs) or None, by the platform that it is compiled for, and on GPUs by ``pallas_hopper.refusal`` and
    ``dispatch.on_hopper``, when traced. No compiler cuts a kernel over devices: where a mesh of several is in use
    (``jax.set_mesh``), None is "ragged_dot" on TPU and "batched_xla" on GPUs, but inside ``shard_map``.
    """
    depth = rhs.shape[2 if transpose_rhs else 1]
    if depth != lhs.shape[1]:
        layout = "[E, N, K]" if transpose_rhs else "[E, K, N]"
        raise ValueError(
            f"grouped_matmul: lhs {lhs.shape} has K={lhs.shape[1]} columns, but rhs {rhs.shape} read as {layout} has "
            f"K={depth}; pass transpose_rhs={not transpose_rhs} if its axes are the other way round"
        )
    if implementation is not None:
        dispatch.named("grouped_matmul", IMPLEMENTATIONS, implementation)
    dtype = jnp.dtype(preferred_element_type or jnp.result_type(lhs, rhs))
    static, group_sizes, groups = (implementation, transpose_rhs, dtype), group_sizes.astype(jnp.int32), rhs.shape[0]
    if group_offset is None:
        if groups != group_sizes.shape[0]:
            raise ValueError(
                f"grouped_matmul: rhs has {groups} matrices and group_sizes {group_sizes.shape[0]} groups; of some groups "
                "alone, say from which on: group_offset="
            )
        return _grouped(static, *dispatch.alike(lhs, rhs, group_sizes))
    before = jnp.sum(jnp.where(jnp.arange(group_sizes.shape[0]) < group_offset, group_sizes, 0))
    own = jax.lax.dynamic_slice_in_dim(group_sizes, group_offset, groups)
    operands = dispatch.alike(jnp.roll(lhs, -before, axis=0), rhs, own)
    return jnp.roll(_grouped(static, *operands), before, axis=0)


def _run(name: str | None, method: str, *operands: jax.Array, **static) -> jax.Array:
    def bound(name):
        return functools.partial(call, name=name, method=method, **static)

    if name is not None:
        return bound(name)(*operands)
    lhs, other, _ = operands
    hopper = pallas_hopper.is_default(static["dtype"], lhs, other)
    # Decided when lowered, not when traced: a CPU machine may be compiling for a TPU.
    return jax.lax.platform_dependent(
        *operands,
        cpu=bound("blocked_xla"),
        cuda=bound("pallas_hopper" if hopper else "batched_xla"),
        tpu=bound("pallas_tpu" if dispatch.on_one_device() else "ragged_dot"),
        default=bound("ragged_dot"),
    )


# Under jit of its own, so that a model's layers lower it once: a kernel takes half a second.
@functools.partial(jax.jit, static_argnames=("name", "method", "transpose_rhs", "dtype"))
def call(*operands: jax.Array, name: str, method: str, **static) -> jax.Array:
    return getattr(IMPLEMENTATIONS[name], method)(*operands, **static)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped(static, lhs, rhs, group_sizes):
    name, transpose_rhs, dtype = static
    return _run(name, "product", lhs, rhs, group_sizes, transpose_rhs=transpose_rhs, dtype=dtype)


def _forward(static, lhs, rhs, group_sizes):
    return _grouped(static, lhs, rhs, group_sizes), (lhs, rhs, group_sizes)


def _backward(static, residuals, g):
    name, transpose_rhs, _ = static
    lhs, rhs, group_sizes = residuals
    return *gradients(name, lhs, rhs, group_sizes, g, transpose_rhs), None


def gradients(
    name: str | None, lhs: jax.Array, rhs: jax.Array, group_sizes: jax.Array, g: jax.Array, transpose_rhs: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Of lhs and rhs, each in its operand's type, where the product has the cotangent g."""
    g = g.astype(jnp.result_type(lhs, rhs))
    d_lhs = _run(name, "product", g, rhs, group_sizes, transpose_rhs=not transpose_rhs, dtype=lhs.dtype)
    operands = (g, lhs) if transpose_rhs else (lhs, g)
    return d_lhs, _run(name, "weight_gradient", *operands, group_sizes, dtype=rhs.dtype)


_grouped.defvjp(_forward, _backward)

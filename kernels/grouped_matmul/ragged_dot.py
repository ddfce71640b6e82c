"""``jax.lax.ragged_dot``: a kernel on TPU, a dense masked product elsewhere; the meaning of the operation."""

import jax
import jax.numpy as jnp

_WEIGHT_GRADIENT = jax.lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
)


def product(
    lhs: jax.Array, rhs: jax.Array, group_sizes: jax.Array, *, transpose_rhs: bool, dtype: jnp.dtype
) -> jax.Array:
    """[M, N] in ``dtype``."""
    lhs, rhs, accumulate = _promote(lhs, rhs)
    rhs = jnp.swapaxes(rhs, 1, 2) if transpose_rhs else rhs
    out = jax.lax.ragged_dot(lhs, rhs, group_sizes, preferred_element_type=accumulate).astype(dtype)
    return jnp.where(_in_a_group(lhs, group_sizes), out, 0)


def weight_gradient(lhs: jax.Array, g: jax.Array, group_sizes: jax.Array, *, dtype: jnp.dtype) -> jax.Array:
    """[E, K, N] in ``dtype``: lhs^T g within each group."""
    lhs, g, accumulate = _promote(lhs, g)
    inside = _in_a_group(lhs, group_sizes)
    lhs, g = jnp.where(inside, lhs, 0), jnp.where(inside, g, 0)
    out = jax.lax.ragged_dot_general(lhs, g, group_sizes, _WEIGHT_GRADIENT, preferred_element_type=accumulate)
    return out.astype(dtype)


def _promote(a, b):
    dtype = jnp.result_type(a, b)
    return a.astype(dtype), b.astype(dtype), jnp.promote_types(dtype, jnp.float32)


def _in_a_group(rows, group_sizes):
    row = jax.lax.broadcasted_iota(jnp.int32, (rows.shape[0], 1), 0)
    return row < jnp.sum(group_sizes, dtype=jnp.int32)

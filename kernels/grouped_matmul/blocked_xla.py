"""A loop over the groups, and within each over blocks of its rows: large blocks while they fit, then small ones.

Trip counts depend on the group sizes, so empty groups and rows beyond the last one cost nothing. A block is cut at its
group's end by a select, never by a gather. Measured on a 2-core CPU in fp32, forward: T=4096 E=16 256->128 takes 2.3
ms against 35 ms of ``ragged_dot`` (dense there) and 0.9-1.4 ms of one dense product of the same size; blocks of 64
alone take 2.8 ms, of 256 and 64 2.9 ms, gathered blocks in a batched product 4.4 ms.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from kernels import dispatch

BLOCK_ROWS = 128, 32  # large and small


def product(
    lhs: jax.Array, rhs: jax.Array, group_sizes: jax.Array, *, transpose_rhs: bool, dtype: jnp.dtype
) -> jax.Array:
    """[M, N] in ``dtype``."""
    operands = jnp.result_type(lhs, rhs)
    accumulate = jnp.promote_types(operands, jnp.float32)
    contract = (((1,), (1 if transpose_rhs else 0,)), ((), ()))
    starts, ends = _bounds(group_sizes, lhs.shape[0])

    def group(e, out):
        weight = jax.lax.dynamic_index_in_dim(rhs, e, 0, keepdims=False).astype(operands)

        def block(first, inside, out):
            rows = jax.lax.dynamic_slice_in_dim(lhs, first, inside.shape[0]).astype(operands)
            y = jax.lax.dot_general(rows, weight, contract, preferred_element_type=accumulate).astype(dtype)
            old = jax.lax.dynamic_slice_in_dim(out, first, inside.shape[0])
            return jax.lax.dynamic_update_slice_in_dim(out, jnp.where(inside, y, old), first, axis=0)

        return _each_block(block, starts[e], ends[e], lhs.shape[0], BLOCK_ROWS, out)

    out = dispatch.varying(
        jnp.zeros((lhs.shape[0], rhs.shape[1 if transpose_rhs else 2]), dtype), lhs, rhs, group_sizes
    )
    return jax.lax.fori_loop(jnp.int32(0), jnp.int32(rhs.shape[0]), group, out)


def weight_gradient(
    lhs: jax.Array,
    g: jax.Array,
    group_sizes: jax.Array,
    *,
    dtype: jnp.dtype,
    block_rows: tuple[int, int] = BLOCK_ROWS,
) -> jax.Array:
    """[E, K, N] in ``dtype``: lhs^T g within each group."""
    operands = jnp.result_type(lhs, g)
    accumulate = jnp.promote_types(operands, jnp.float32)
    starts, ends = _bounds(group_sizes, lhs.shape[0])

    def group(e, out):
        def block(first, inside, total):
            cut = lambda x: jax.lax.dynamic_slice_in_dim(x, first, inside.shape[0])
            a, b = (jnp.where(inside, cut(x), 0).astype(operands) for x in (lhs, g))
            return total + jax.lax.dot_general(a, b, (((0,), (0,)), ((), ())), preferred_element_type=accumulate)

        total = dispatch.varying(jnp.zeros((lhs.shape[1], g.shape[1]), accumulate), lhs, g, group_sizes)
        total = _each_block(block, starts[e], ends[e], lhs.shape[0], block_rows, total)
        return jax.lax.dynamic_update_index_in_dim(out, total.astype(dtype), e, axis=0)

    out = jnp.zeros((group_sizes.shape[0], lhs.shape[1], g.shape[1]), dtype)
    out = dispatch.varying(out, lhs, g, group_sizes)
    return jax.lax.fori_loop(jnp.int32(0), jnp.int32(group_sizes.shape[0]), group, out)


def _bounds(group_sizes: jax.Array, num_rows: int) -> tuple[jax.Array, jax.Array]:
    ends = jnp.cumsum(group_sizes, dtype=jnp.int32)
    return jnp.minimum(ends - group_sizes, num_rows), jnp.minimum(ends, num_rows)


def _each_block(body: Callable, start: jax.Array, end: jax.Array, num_rows: int, block_rows, carry) -> jax.Array:
    """Folds ``body(first row, inside [size, 1], carry)`` over blocks that cover rows ``start .. end - 1`` once each.

    ``inside`` marks the rows that are the block's own: the last block of the array is moved back to fit into it.
    """

    def step(size, state):
        at, carry = state
        first = jnp.minimum(at, num_rows - size)
        row = first + jax.lax.broadcasted_iota(jnp.int32, (size, 1), 0)
        return at + size, body(first, (row >= at) & (row < end), carry)

    large, small = (min(rows, num_rows) for rows in block_rows)
    if num_rows == 0:
        return carry
    state = start, carry
    if large > small:
        # A large block pays as long as less than one small block of it would be empty.
        state = jax.lax.while_loop(lambda s: s[0] + (large - small) < end, lambda s: step(large, s), state)
    return jax.lax.while_loop(lambda s: s[0] < end, lambda s: step(small, s), state)[1]

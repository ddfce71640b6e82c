"""TPU kernels: tiles of sorted rows against their group's matrix, in the order in which groups and tiles follow each other.

A *visit* is a pair (tile of rows, group) that overlap. Tiles do not respect groups: a tile that several groups share is
visited once by each, in turn, and each writes the rows that are its own. The visits are found outside of the kernel, by
cumulative sums over E + 1 groups (the last one is what lies beyond all groups, and writes zeros), and prefetched as scalars,
so that the index maps fetch exactly the blocks that a visit needs. Their number is at most tiles + E; those left over repeat
the last visit's blocks, which fetches nothing, and compute nothing.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels import dispatch
from kernels.tpu import LANES, VMEM_BYTES, keep


class Tiles(NamedTuple):
    """Rows, contracted columns and columns of a block."""

    m: int
    k: int
    n: int


# Rows by generation: larger tiles feed a 256-wide systolic array, and cost v5p half its speed.
ROWS = {"v5e": 128, "v5p": 128, "v6e": 256, "tpu7x": 256}


class Visits(NamedTuple):
    """What each step of the grid works on; all [V] but the bounds, [E + 1]."""

    tile: jax.Array
    group: jax.Array
    active: jax.Array  # 0: a repetition
    first: jax.Array  # 1: the tile's first visit, or the group's
    last: jax.Array
    starts: jax.Array
    ends: jax.Array


def product(
    lhs: jax.Array,
    rhs: jax.Array,
    group_sizes: jax.Array,
    *,
    transpose_rhs: bool,
    dtype: jnp.dtype,
    tiles: Tiles | None = None,
    interpret: object = False,
) -> jax.Array:
    """[M, N] in ``dtype``."""
    num_rows, depth = lhs.shape
    groups, width = rhs.shape[0], rhs.shape[1 if transpose_rhs else 2]
    if num_rows == 0:
        return jnp.zeros((0, width), dtype)
    operands = jnp.result_type(lhs, rhs)
    t = tiles or choose_tiles(num_rows, depth, width, operands)
    visits = by_tile(group_sizes, num_rows, t.m)
    k_steps = pl.cdiv(depth, t.k)
    contract = (((1,), (1 if transpose_rhs else 0,)), ((), ()))

    def kernel(tile, group, active, first, last, starts, ends, lhs_ref, rhs_ref, out_ref, total):
        del last
        v, k = pl.program_id(1), pl.program_id(2)

        @pl.when(active[v] == 1)
        def _():
            @pl.when(k == 0)
            def _():
                total[...] = jnp.zeros_like(total)

            @pl.when(group[v] < groups)
            def _():
                rows, weight = lhs_ref[...].astype(operands), rhs_ref[...].astype(operands)
                if depth % t.k:  # what lies past the contracted axis may be anything
                    inside = depth - k * t.k
                    rows = keep(rows, 1, inside)
                    weight = keep(weight, 1 if transpose_rhs else 0, inside)
                total[...] += _dot(rows, weight, contract)

            @pl.when(k == k_steps - 1)
            def _():
                row = tile[v] * t.m + jax.lax.broadcasted_iota(jnp.int32, (t.m, 1), 0)
                own = (row >= starts[group[v]]) & (row < ends[group[v]])
                before = jnp.where(first[v] == 1, jnp.zeros_like(total), out_ref[...].astype(total.dtype))
                out_ref[...] = jnp.where(own, total[...], before).astype(out_ref.dtype)

    matrix = lambda v, group: jnp.minimum(group[v], groups - 1)
    if transpose_rhs:
        rhs_spec = pl.BlockSpec((None, t.n, t.k), lambda n, v, k, tile, group, *_: (matrix(v, group), n, k))
    else:
        rhs_spec = pl.BlockSpec((None, t.k, t.n), lambda n, v, k, tile, group, *_: (matrix(v, group), k, n))
    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=7,
        grid=(pl.cdiv(width, t.n), visits.tile.shape[0], k_steps),
        in_specs=[pl.BlockSpec((t.m, t.k), lambda n, v, k, tile, *_: (tile[v], k)), rhs_spec],
        out_specs=pl.BlockSpec((t.m, t.n), lambda n, v, k, tile, *_: (tile[v], n)),
        scratch_shapes=[pltpu.VMEM((t.m, t.n), jnp.promote_types(operands, jnp.float32))],
    )
    return pl.pallas_call(
        kernel,
        grid_spec=grid,
        out_shape=dispatch.result((num_rows, width), dtype, lhs, rhs, group_sizes),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary", "arbitrary")),
        interpret=interpret,
        name="grouped_matmul",
    )(*visits, lhs, rhs)


def weight_gradient(
    lhs: jax.Array,
    g: jax.Array,
    group_sizes: jax.Array,
    *,
    dtype: jnp.dtype,
    tiles: Tiles | None = None,
    interpret: object = False,
) -> jax.Array:
    """[E, K, N] in ``dtype``: lhs^T g within each group."""
    num_rows, depth = lhs.shape
    groups, width = group_sizes.shape[0], g.shape[1]
    if num_rows == 0:
        return jnp.zeros((groups, depth, width), dtype)
    operands = jnp.result_type(lhs, g)
    t = tiles or choose_tiles(num_rows, depth, width, operands, gradient=True)
    visits = by_group(group_sizes, num_rows, t.m)

    def kernel(tile, group, active, first, last, starts, ends, lhs_ref, g_ref, out_ref, total):
        v = pl.program_id(2)

        @pl.when(active[v] == 1)
        def _():
            @pl.when(first[v] == 1)
            def _():
                total[...] = jnp.zeros_like(total)

            @pl.when(starts[group[v]] < ends[group[v]])
            def _():
                row = tile[v] * t.m + jax.lax.broadcasted_iota(jnp.int32, (t.m, 1), 0)
                own = (row >= starts[group[v]]) & (row < ends[group[v]])
                cut = lambda ref: jnp.where(own, ref[...].astype(operands), 0)
                total[...] += _dot(cut(lhs_ref), cut(g_ref), (((0,), (0,)), ((), ())))

            @pl.when(last[v] == 1)
            def _():
                out_ref[...] = total[...].astype(out_ref.dtype)

    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=7,
        grid=(pl.cdiv(depth, t.k), pl.cdiv(width, t.n), visits.tile.shape[0]),
        in_specs=[
            pl.BlockSpec((t.m, t.k), lambda k, n, v, tile, *_: (tile[v], k)),
            pl.BlockSpec((t.m, t.n), lambda k, n, v, tile, *_: (tile[v], n)),
        ],
        out_specs=pl.BlockSpec((None, t.k, t.n), lambda k, n, v, tile, group, *_: (group[v], k, n)),
        scratch_shapes=[pltpu.VMEM((t.k, t.n), jnp.promote_types(operands, jnp.float32))],
    )
    return pl.pallas_call(
        kernel,
        grid_spec=grid,
        out_shape=dispatch.result((groups, depth, width), dtype, lhs, g, group_sizes),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=interpret,
        name="grouped_matmul_weight_gradient",
    )(*visits, lhs, g)


def by_tile(group_sizes: jax.Array, num_rows: int, tile_rows: int) -> Visits:
    """The visits of ``product``: every tile at least once, those of one tile after each other."""
    ends = jnp.minimum(jnp.cumsum(group_sizes, dtype=jnp.int32), num_rows)
    ends = jnp.append(ends, jnp.int32(num_rows))
    starts = jnp.append(jnp.int32(0), ends[:-1])
    lengths = jnp.where(ends > starts, (ends - 1) // tile_rows - starts // tile_rows + 1, 0)
    tile, group, active = _unrolled(starts // tile_rows, lengths, pl.cdiv(num_rows, tile_rows) + len(group_sizes))
    first = jnp.append(jnp.ones(1, jnp.int32), (tile[1:] != tile[:-1]).astype(jnp.int32))
    return Visits(tile, group, active, first, first, starts, ends)


def by_group(group_sizes: jax.Array, num_rows: int, tile_rows: int) -> Visits:
    """The visits of ``weight_gradient``: every group at least once, because an empty one's gradient is to be zero."""
    ends = jnp.minimum(jnp.cumsum(group_sizes, dtype=jnp.int32), num_rows)
    starts = jnp.append(jnp.int32(0), ends[:-1])
    lengths = jnp.where(ends > starts, (ends - 1) // tile_rows - starts // tile_rows + 1, 1)
    at = jnp.minimum(starts, num_rows - 1) // tile_rows
    tile, group, active = _unrolled(at, lengths, pl.cdiv(num_rows, tile_rows) + len(group_sizes))
    turns = (group[1:] != group[:-1]).astype(jnp.int32)
    ending = active * jnp.append(jnp.maximum(turns, 1 - active[1:]), jnp.int32(1))
    return Visits(tile, group, active, jnp.append(jnp.ones(1, jnp.int32), turns), ending, starts, ends)


def _unrolled(first_tile: jax.Array, lengths: jax.Array, visits: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(tile, group, active) of each visit, for groups that visit so many tiles from the first on."""
    until = jnp.cumsum(lengths, dtype=jnp.int32)
    index = jnp.arange(visits, dtype=jnp.int32)
    at = jnp.minimum(index, until[-1] - 1)
    group = jnp.searchsorted(until, at, side="right", method="compare_all").astype(jnp.int32)
    tile = first_tile[group] + at - (until - lengths)[group]
    return tile.astype(jnp.int32), group, (index < until[-1]).astype(jnp.int32)


def choose_tiles(
    num_rows: int, depth: int, width: int, dtype: jnp.dtype, generation: str | None = None, *, gradient: bool = False
) -> Tiles:
    """Tiles for a shape: rows by generation, then as much of the other two axes as memory holds.

    ``gradient``: of ``weight_gradient``, whose running sum is a block of k by n and is held twice while it grows.
    """
    size = jnp.dtype(dtype).itemsize
    m = min(ROWS.get(generation or "", 128), -(-num_rows // 16) * 16)
    k, n = _largest(depth, 2048), _largest(width, 1024)

    def used(k: int, n: int) -> int:
        return 2 * size * (m * k + k * n + m * n) + (8 * k * n if gradient else 4 * m * n)

    while used(k, n) > VMEM_BYTES and k > LANES:
        k = _largest(depth, k // 2)
    while used(k, n) > VMEM_BYTES and n > LANES:
        n = _largest(width, n // 2)
    return Tiles(m, k, n)


def _largest(axis: int, limit: int) -> int:
    """The largest multiple of a register's lanes up to the limit that divides the axis, else the limit; small axes whole."""
    if axis <= limit:
        return axis
    limit -= limit % LANES
    return next((size for size in range(limit, LANES - 1, -LANES) if axis % size == 0), limit)


def _dot(a: jax.Array, b: jax.Array, contract: tuple) -> jax.Array:
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    wide = jnp.promote_types(a.dtype, jnp.float32)
    return jax.lax.dot_general(a, b, contract, precision=precision, preferred_element_type=wide)

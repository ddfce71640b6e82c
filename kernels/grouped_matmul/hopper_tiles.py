"""Which tiles ``pallas_hopper`` works on, and in which order: found outside of the kernels, by a few small reductions."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

TEAM = 2  # warpgroups that multiply
SLAB = 64  # rows that one of them has of a tile: those of a wgmma
BAND = 12  # rows of tiles before the next column: some 12 by 12 run at a time, and share what they load in the cache


class RowTiles(NamedTuple):
    """Two slabs of one group, at any rows; all [R] but the count."""

    group: jax.Array  # E or more: beyond all groups
    first: jax.Array  # row where a slab begins
    second: jax.Array  # the same; ``end`` where there is no second one
    end: jax.Array  # of the group
    count: jax.Array  # [1], how many of R there are


def row_tiles(group_sizes: jax.Array, num_rows: int, at_once: int) -> RowTiles:
    """The row tiles of all groups and of what lies beyond them: of ``at_once`` groups all of two slabs, then all of one."""
    ends = jnp.append(jnp.minimum(_running_sum(group_sizes), num_rows), jnp.int32(num_rows))
    ends = jnp.pad(ends, (0, -len(ends) % at_once), mode="edge")
    starts = jnp.append(jnp.int32(0), ends[:-1])
    pairs, rest = (ends - starts) // (TEAM * SLAB), (ends - starts) % (TEAM * SLAB)
    double, single = pairs + (rest > SLAB), ((rest > 0) & (rest <= SLAB)).astype(jnp.int32)
    lengths = jnp.stack([double.reshape(-1, at_once), single.reshape(-1, at_once)], axis=1).reshape(-1)
    until = _running_sum(lengths)
    index = jnp.arange(num_rows // (TEAM * SLAB) + len(group_sizes) + 1, dtype=jnp.int32)
    entry = jnp.minimum(jnp.sum(until[None] <= index[:, None], axis=1, dtype=jnp.int32), len(lengths) - 1)
    group = entry // (2 * at_once) * at_once + entry % at_once
    start, end = starts[group], ends[group]
    nth = jnp.where(entry // at_once % 2 == 0, index - (until - lengths)[entry], double[group])
    row, last = start + nth * TEAM * SLAB, jnp.maximum(end - SLAB, start)
    second = jnp.where(row + SLAB < end, jnp.minimum(row + SLAB, last), end)
    return RowTiles(group, jnp.minimum(row, last), second, end, until[-1:])


class Groups(NamedTuple):
    """Groups from the largest to the smallest, so that the last tiles are short; all [E] but the total."""

    group: jax.Array
    start: jax.Array
    end: jax.Array
    total: jax.Array  # [1], rows of all groups


def by_size(group_sizes: jax.Array, num_rows: int) -> Groups:
    """Ties by index."""
    ends = jnp.minimum(_running_sum(group_sizes), num_rows)
    starts = jnp.append(jnp.int32(0), ends[:-1])
    sizes, index = ends - starts, jnp.arange(len(ends), dtype=jnp.int32)
    tie = (sizes[None] == sizes[:, None]) & (index[None] < index[:, None])
    rank = jnp.sum((sizes[None] > sizes[:, None]) | tie, axis=1, dtype=jnp.int32)
    here = rank[None] == index[:, None]
    group, start, end = (jnp.sum(jnp.where(here, x[None], 0), axis=1, dtype=jnp.int32) for x in (index, starts, ends))
    return Groups(group, start, end, ends[-1:])


def _running_sum(x: jax.Array) -> jax.Array:
    """``jnp.cumsum``, which a GPU would run as several small kernels, as one."""
    index = jnp.arange(len(x))
    return jnp.sum(jnp.where(index[None] <= index[:, None], x[None], 0), axis=1, dtype=jnp.int32)


def place(index: jax.Array, rows: jax.Array | int, columns: int) -> tuple[jax.Array, jax.Array]:
    """(row, column) of the index-th of rows x columns tiles: band by band, and column by column within."""
    above = divide(index, BAND * columns) * BAND
    height = jnp.minimum(BAND, rows - above)
    inside = remainder(index, BAND * columns)
    return above + jax.lax.rem(inside, height), jax.lax.div(inside, height)


def divide(a: jax.Array, b: int) -> jax.Array:
    """Towards zero; what kernels have, where ``//`` is a few instructions more."""
    return jax.lax.div(a, jnp.int32(b))


def remainder(a: jax.Array, b: int) -> jax.Array:
    """Of ``divide``."""
    return jax.lax.rem(a, jnp.int32(b))

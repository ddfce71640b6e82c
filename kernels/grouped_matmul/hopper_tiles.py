"""Which tiles ``pallas_hopper`` works on, and in which order: found outside of the kernels, by a few small reductions."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels.integers import div, in_order, ranks, rem

TEAM = 2  # warpgroups that multiply
SLAB = 64  # rows that one of them has of a tile: those of a wgmma
BAND = 12  # rows of tiles before the next column: some 12 by 12 run at a time, and share what they load in the cache


class RowTiles(NamedTuple):
    """Slabs of one group, at any rows: tiles of two slabs, and behind ``num_doubles`` places those of one. Each kind is in
    the order of the groups; all [R] but counts.
    """

    group: jax.Array  # E or more: beyond all groups
    first: jax.Array  # row where a slab begins
    second: jax.Array  # the same; ``end`` where there is no second one
    end: jax.Array  # of the group
    counts: jax.Array  # [2], how many there are of either kind


def num_doubles(num_rows: int, num_groups: int) -> int:
    """Places for tiles of two slabs; there are as many as groups, and one more, for those of one."""
    return num_rows // (TEAM * SLAB) + num_groups + 1


def row_tiles(group_sizes: jax.Array, num_rows: int) -> RowTiles:
    """The tiles of all groups, and of what lies beyond them as if it were one. Two reductions, each a kernel on a GPU."""
    num_groups = len(group_sizes)
    kinds = jnp.stack(_tiles_of(group_sizes))
    total = lambda x: jnp.sum(x, axis=-1, dtype=jnp.int32)
    until = _running_sum(kinds)  # [2, E]

    places = num_doubles(num_rows, num_groups)
    slot = jnp.arange(places + num_groups + 1, dtype=jnp.int32)
    kind = (slot >= places).astype(jnp.int32)
    nth = slot - kind * places
    until_here, number = (jnp.where(kind[:, None] == 0, x[0], x[1]) for x in (until, kinds))
    before = until_here <= nth[:, None]
    here = ~before & (until_here - number <= nth[:, None])
    group, nth = total(before), nth - total(jnp.where(before, number, 0))
    begin = total(jnp.where(before, group_sizes, 0))
    size = total(jnp.where(here, group_sizes, 0))
    start = jnp.minimum(begin, num_rows)
    end = jnp.where(group < num_groups, jnp.minimum(begin + size, num_rows), num_rows)
    ahead = jnp.where(kind == 0, nth, _tiles_of(end - start)[0])  # tiles of two slabs before this one in its group
    first = start + ahead * TEAM * SLAB
    last = jnp.maximum(end - SLAB, start)
    second = jnp.where(kind == 0, jnp.minimum(first + SLAB, last), end)
    beyond = jnp.stack(_tiles_of(num_rows - jnp.minimum(total(group_sizes), num_rows)))
    return RowTiles(group, jnp.minimum(first, last), second, end, until[:, -1] + beyond)


def _tiles_of(rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Tiles of two slabs and of one of so many consecutive rows."""
    whole, rest = rows // (TEAM * SLAB), rows % (TEAM * SLAB)
    return whole + (rest > SLAB), ((rest > 0) & (rest <= SLAB)).astype(jnp.int32)


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
    rank = ranks(starts - ends)
    group, start, end = (in_order(rank, x) for x in (jnp.arange(len(ends), dtype=jnp.int32), starts, ends))
    return Groups(group, start, end, ends[-1:])


def _running_sum(x: jax.Array) -> jax.Array:
    """``jnp.cumsum`` of the last axis, which a GPU would run as several small kernels, as one."""
    index = jnp.arange(x.shape[-1])
    return jnp.sum(jnp.where(index[None] <= index[:, None], x[..., None, :], 0), axis=-1, dtype=jnp.int32)


def place(index: jax.Array, rows: jax.Array | int, columns: int) -> tuple[jax.Array, jax.Array]:
    """(row, column) of the index-th of rows x columns tiles: band by band, and column by column within."""
    above = div(index, BAND * columns) * BAND
    height = jnp.minimum(BAND, rows - above)
    inside = rem(index, BAND * columns)
    return above + jax.lax.rem(inside, height), jax.lax.div(inside, height)

"""Which rows see the same prompt, for kernels that read it once for several of them, and what is then to be merged."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels.decode_attention import spans
from kernels.integers import in_order, ranks, rem

LOWEST = -1e30  # the level of what sees nothing: below every score, and finite, so that it less itself is 0
LOG2E = math.log2(math.e)


class Seen(NamedTuple):
    """What rows that are taken together see of one entry of a cache; T times."""

    entry: jax.Array  # [T]
    start: jax.Array  # [T] positions start .. stop - 1 are seen by at least one of them
    stop: jax.Array  # [T]
    since: jax.Array | None  # [T, rows]: from where each row does; None for from the start


class Parts(NamedTuple):
    """Rows that see the same entry of the prompts' cache, a few at a time: C parts, of B rows."""

    order: jax.Array  # [B] the rows, those of one entry side by side
    entry: jax.Array  # [C]
    first: jax.Array  # [C] its rows are order[first : first + count]
    count: jax.Array  # [C] 0 beyond the last part
    part: jax.Array  # [B] where a row is, and its place there; anything for a row that sees no prompt
    place: jax.Array  # [B]

    def members(self, most: int) -> jax.Array:
        """[C, most]: a part's rows, its last one again where it has fewer."""
        nth = jnp.minimum(jnp.arange(most)[None], self.count[:, None] - 1)
        return self.order[self.first[:, None] + jnp.maximum(nth, 0)]


def share_prompts(
    lengths: jax.Array,
    lens: jax.Array,
    index: jax.Array,
    size: int,
    most: int,
    *,
    num_shards: int,
    window: jax.Array | None,
) -> tuple[Parts, Seen]:
    """Parts of at most ``most`` of the rows with ``lengths`` [B] of their own, and what they see of a cache of prompts with
    ``size`` positions, by the arguments of ``decode_attention``."""
    row = jnp.arange(len(lengths), dtype=jnp.int32)
    entry = spans.prompt_entry(row, index, len(lengths), len(lens), num_shards)
    parts = share(entry, lengths > 0, len(lens), most)
    members = parts.members(most)
    starts, stops = spans.bounds(lens[entry], size, lens[entry] + lengths, window)
    since, stop = starts[members], jnp.where(parts.count > 0, stops[members[:, 0]], 0)
    return parts, Seen(parts.entry, jnp.min(since, axis=1), stop, None if window is None else since)


def share(entries: jax.Array, seen: jax.Array, num_entries: int, most: int) -> Parts:
    """Parts of at most ``most`` rows by the rows' ``entries`` [B], of those that have ``seen`` [B] set."""
    num_rows = len(entries)
    row = jnp.arange(num_rows, dtype=jnp.int32)
    total = lambda x: jnp.sum(x, axis=1, dtype=jnp.int32)
    entries = jnp.where(seen, entries, num_entries)
    same, earlier = entries[None] == entries[:, None], row[None] < row[:, None]
    nth, size = total(same & earlier), jnp.where(seen, total(same), 0)
    rank = ranks(entries)

    place = rem(nth, most)
    leads = seen & (place == 0)
    order = in_order(rank, row)
    part = total(leads[None] & (rank[None] <= rank[:, None])) - 1

    index = jnp.arange(num_parts(num_rows, num_entries, most), dtype=jnp.int32)
    here = leads[None] & (part[None] == index[:, None])
    of_leader = lambda x: total(jnp.where(here, x[None], 0))
    count = of_leader(jnp.minimum(size - nth, most))
    return Parts(order, of_leader(entries), of_leader(rank), count, jnp.maximum(part, 0), place)


def num_parts(num_rows: int, num_entries: int, most: int) -> int:
    """How many parts there can be: a full one for every ``most`` rows and one more an entry, and no more than rows."""
    return min(num_rows, num_rows // most + num_entries)


def merged(averages: list[jax.Array], levels: list[jax.Array], seen: jax.Array) -> jax.Array:
    """[B, H, hd] from averages [B, H, hd] over parts of what a row sees, and their fp32 log2-sum-exp2 [B, H].

    Rows that are not ``seen`` [B] are zeros, whatever their parts hold.
    """
    highest = functools.reduce(jnp.maximum, levels)
    weights = [jnp.exp2(level - highest) for level in levels]
    total = sum(weights)
    out = sum((weight / total)[..., None] * average for weight, average in zip(weights, averages, strict=True))
    return jnp.where(seen[:, None, None], out, 0).astype(averages[0].dtype)

"""Whether a completion says the same n words again and again, in graph.

Words are RLPR's: ``[w for part in text.split() for w in part.split("_")]``, so that ``a__b`` is three words of which one is
empty; blanks are ASCII's. They are compared by hashes: a polynomial of the bytes in two rings of 2^32, mixed, then a
polynomial of n words. Two n-grams that differ agree with odds of about 2^-64 unless somebody constructs them, and a
text is wrongly called repetitive only if that happens beside an n-gram that is already one short of the limit.
"""

import functools
import itertools
import typing
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, UInt32

from rl_reason.tags import WHITESPACE, written

BYTE_BASES = (0x9E3779B1, 0x85EBCA77)  # odd, so that a byte never loses its say to a later one
WORD_BASES = (0xC2B2AE3D, 0x27D4EB2F)
WORDS_PER_TOKEN = 4  # beyond so many words a token on average the rest of a completion is not looked at


class Pieces(typing.NamedTuple):
    """How each token goes on with words, on the host; the last row is for ids that write nothing.

    A token without a separator lengthens the word at hand. One with separators ends it with its head, may hold whole words
    (``inner``), and begins the next with its tail.
    """

    splits: Bool[np.ndarray, " V"]
    at_underscore: Bool[np.ndarray, " V"]  # its first separator is one, and ends even an empty word
    starts: Bool[np.ndarray, " V"]  # its head is not empty
    head: UInt32[np.ndarray, "V 2"]  # hash of what stands before the first separator, or of all
    power: UInt32[np.ndarray, "V 2"]  # what that multiplies an earlier hash by
    tail: UInt32[np.ndarray, "V 2"]
    open_after: Bool[np.ndarray, " V"]  # whether its end, if there is one, is within a part between blanks
    inner_count: Int[np.ndarray, " V"]
    inner_start: Int[np.ndarray, " V"]
    inner: UInt32[np.ndarray, "words 2"]


def _hash(word: bytes) -> tuple[list[int], list[int]]:
    """A word's two hashes, and the powers that shift an earlier one past it: h(xy) = h(x) * power(y) + h(y)."""
    value, power = [0, 0], [1, 1]
    for byte in word:
        for k, base in enumerate(BYTE_BASES):
            value[k] = (value[k] * base + byte + 1) % 2**32
            power[k] = power[k] * base % 2**32
    return value, power


@functools.lru_cache(maxsize=4)
def pieces(piece_bytes: tuple[bytes, ...]) -> Pieces:
    """The tables of a vocabulary."""
    rows: list[tuple] = []
    inner: list[list[int]] = []
    for piece in (*piece_bytes, b""):
        before = len(inner)
        ends = [c for c, byte in enumerate(piece) if byte in WHITESPACE or byte == ord("_")]
        head, power = _hash(piece[: ends[0]] if ends else piece)
        tail, open_after = _hash(piece[ends[-1] + 1 :])[0] if ends else [0, 0], False
        for c, after in itertools.pairwise(ends):
            # A blank ends a word that has a letter, or that an underscore began; an underscore ends any.
            if piece[after] == ord("_") or after > c + 1 or piece[c] == ord("_"):
                inner.append(_hash(piece[c + 1 : after])[0])
        if ends:
            open_after = ends[-1] + 1 < len(piece) or piece[ends[-1]] == ord("_")
        starts = bool(piece) and (not ends or ends[0] > 0)
        at_underscore = bool(ends) and piece[ends[0]] == ord("_")
        rows.append((bool(ends), at_underscore, starts, head, power, tail, open_after, len(inner) - before, before))
    columns = list(zip(*rows, strict=True))
    kinds = (bool, bool, bool, np.uint32, np.uint32, np.uint32, bool, np.int32, np.int32)
    arrays = [np.array(column, kind) for column, kind in zip(columns, kinds, strict=True)]
    return Pieces._make([*arrays, np.array(inner or [[0, 0]], np.uint32)])


def _mixed(x: UInt32[Array, "N W 2"]) -> UInt32[Array, "N W 2"]:
    """Murmur3's finalizer, one to one: words that differ little then have hashes that differ much."""
    x = x ^ (x >> 16)
    x = x * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def words(
    tokens: Int[Array, "N T"], mask: Bool[Array, "N T"], piece_bytes: Sequence[bytes]
) -> tuple[UInt32[Array, "N W 2"], Int[Array, " N"]]:
    """The hashes of each row's words, from column 0, and how many there are."""
    table = pieces(tuple(piece_bytes))
    owners = written(tokens, mask, len(piece_bytes))
    take = lambda x: jnp.asarray(x)[owners]
    splits = take(table.splits)
    columns = (splits, take(table.at_underscore), take(table.starts), take(table.open_after))
    hashes = (take(table.head), take(table.power), take(table.tail))

    def step(carry, column):
        sofar, is_open = carry
        split, at_underscore, starts, open_after, head, power, tail = column
        joined = sofar * power + head
        ends = split & (at_underscore | is_open | starts)
        carry = jnp.where(split[:, None], tail, joined), jnp.where(split, open_after, is_open | starts)
        return carry, (joined, ends)

    start = jnp.zeros((tokens.shape[0], 2), jnp.uint32), jnp.zeros(tokens.shape[0], bool)
    by_column = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (*columns, *hashes))
    (rest, is_open), (joined, ends) = jax.lax.scan(step, start, by_column)
    # The end of the text ends a word too: one more column.
    joined = jnp.concatenate([jnp.moveaxis(joined, 0, 1), rest[:, None]], axis=1)
    ends = jnp.concatenate([ends.T, is_open[:, None]], axis=1)

    inner = jnp.pad(jnp.where(splits, take(table.inner_count), 0), ((0, 0), (0, 1)))
    count = ends + inner
    until = jnp.cumsum(count, axis=1, dtype=jnp.int32)
    most = 1 + int(table.inner_count.max())
    slots = jnp.arange(min(tokens.shape[1] * min(most, WORDS_PER_TOKEN) + 1, tokens.shape[1] * most + 1))
    column = jax.vmap(lambda row: jnp.searchsorted(row, slots, side="right"))(until)
    column = jnp.minimum(column, tokens.shape[1])
    pick = lambda x: jnp.take_along_axis(x, column, axis=1)
    nth = (
        slots[None, :] - pick(until - count) - pick(ends.astype(jnp.int32))
    )  # of the inner words; -1: the one ended first
    first = jnp.take_along_axis(joined, column[..., None], axis=1)
    at = pick(jnp.pad(take(table.inner_start), ((0, 0), (0, 1)))) + nth
    within = jnp.asarray(table.inner)[jnp.clip(at, 0, len(table.inner) - 1)]
    return jnp.where((nth < 0)[..., None], first, within), jnp.minimum(until[:, -1], len(slots))


def repeats(
    tokens: Int[Array, "N T"], mask: Bool[Array, "N T"], piece_bytes: Sequence[bytes], *, ngram: int, times: int
) -> Bool[Array, " N"]:
    """Whether some ``ngram`` consecutive words occur ``times`` times or more in a completion, overlapping ones too."""
    hashes, count = words(tokens, mask, piece_bytes)
    grams = hashes.shape[1] - ngram + 1
    if grams < times:
        return jnp.zeros(tokens.shape[0], bool)
    mixed = _mixed(hashes)
    bases = jnp.array(WORD_BASES, jnp.uint32)[None, None, :]
    gram = jnp.zeros_like(mixed[:, :grams])
    for k in range(ngram):
        gram = gram * bases + mixed[:, k : k + grams]
    past = jnp.arange(grams)[None, :] > (count - ngram)[:, None]
    past, high, low = jax.lax.sort((past.astype(jnp.uint8), gram[..., 0], gram[..., 1]), dimension=1, num_keys=3)
    ahead = times - 1  # in sorted order equal ones are neighbours
    same = (high[:, : grams - ahead] == high[:, ahead:]) & (low[:, : grams - ahead] == low[:, ahead:])
    return jnp.any(same & (past[:, ahead:] == 0), axis=1)

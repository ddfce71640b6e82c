"""Exact selection of the largest values without a sort: a bisection over the bits of the k-th largest.

Floats map to unsigned integers of the same order; the k-th largest is found a few bits at a time by counting how many
lie at or above each candidate, and ties are settled by the same bisection over the flat index. Every pass is an
elementwise comparison and a sum, so a sharded batch exchanges a handful of counts a pass and is never gathered.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

_ROUNDING = 1 + 2.0**-22  # see fraction_of


def select_top_fraction(
    values: Float[Array, "N T"],
    mask: Bool[Array, "N T"],
    fraction: float | Float[Array, ""],
    *,
    axis_names: tuple[str, ...] = (),
) -> Bool[Array, "N T"]:
    """The ``max(1, floor(fraction * masked count))`` largest masked values; nothing when the mask is empty.

    Exact: equal values (+0 and -0 are equal) are taken in the order of their flat index, lowest first. NaN counts in
    the masked count but is never selected; nothing off the mask is. ``fraction`` may be traced. Inside ``shard_map``,
    name the axes of the rows in ``axis_names``; shards count as consecutive blocks of rows, in the order of
    ``jax.lax.axis_index(axis_names)``.

    >>> import jax.numpy as jnp
    >>> select_top_fraction(jnp.array([[1.0, 3.0], [3.0, 2.0]]), jnp.ones((2, 2), bool), 0.25)
    Array([[False,  True],
           [False, False]], dtype=bool)
    """
    count = _total(mask, axis_names)
    return _select(values, mask, jnp.minimum(jnp.maximum(fraction_of(fraction, count), 1), count), axis_names)


def select_random_subset(
    candidates: Bool[Array, "N T"],
    count: int | Int[Array, ""],
    scores: Float[Array, "N T"],
    *,
    axis_names: tuple[str, ...] = (),
) -> Bool[Array, "N T"]:
    """``count`` of the candidates, or all when there are fewer: those of highest score, ties by lowest flat index.

    With independent uniform ``scores`` every subset of that size is equally likely. ``count`` may be traced; 0 or less
    selects nothing. ``axis_names`` as in :func:`select_top_fraction`.
    """
    return _select(scores, candidates, jnp.asarray(count).astype(jnp.int32), axis_names)


def fraction_of(fraction: float | Float[Array, ""], count: Int[Array, ""]) -> Int[Array, ""]:
    """``floor(fraction * count)`` of the decimal fraction that was meant, the same with and without x64.

    The product is formed in fp32 and raised by 2**-22 of itself (four roundings) before the floor: 0.29 of 100 is 29,
    where doubles give 28.999999999999996. So a true product less than 2**-22 of itself below an integer counts as it.
    """
    product = jnp.asarray(fraction).astype(jnp.float32) * count.astype(jnp.float32)
    return jnp.floor(product * jnp.float32(_ROUNDING)).astype(jnp.int32)


def _total(x: jax.Array, axis_names: tuple[str, ...]) -> jax.Array:
    count = jnp.sum(x, dtype=jnp.int32)
    return jax.lax.psum(count, axis_names) if axis_names else count


def _ordered(values: jax.Array, include: jax.Array) -> jax.Array:
    """Unsigned integers in the order of the floats; 0 for what is excluded or NaN, which no float maps to."""
    if values.dtype not in (jnp.float32, jnp.float64):
        values = values.astype(jnp.float32)  # exact for bf16 and fp16
    unsigned = jnp.uint64 if values.dtype == jnp.float64 else jnp.uint32
    sign = jnp.array(1, unsigned) << jnp.array(values.dtype.itemsize * 8 - 1, unsigned)
    bits = jax.lax.bitcast_convert_type(values, unsigned)
    bits = jnp.where(bits == sign, jnp.array(0, unsigned), bits)  # -0 is +0
    keys = jnp.where(bits >= sign, ~bits, bits | sign)
    return jnp.where(include & ~jnp.isnan(values), keys, jnp.array(0, unsigned))


def _select(values: jax.Array, include: jax.Array, k: jax.Array, axis_names: tuple[str, ...]) -> jax.Array:
    keys = _ordered(values, include)
    num_bits = keys.dtype.itemsize * 8
    k = jnp.minimum(k, _total(keys > 0, axis_names))

    def raise_bit(i, threshold):
        bit = jnp.array(1, keys.dtype) << (num_bits - 1 - i).astype(keys.dtype)
        enough = _total(keys >= (threshold | bit), axis_names) >= k
        return jnp.where(enough, threshold | bit, threshold)

    threshold = jax.lax.fori_loop(0, num_bits, raise_bit, jnp.array(0, keys.dtype))
    above, tied = keys > threshold, keys == threshold
    wanted = k - _total(above, axis_names)  # of the tied, at least 1 when k > 0
    index = _flat_index(keys.shape, axis_names)
    num_elements = keys.size * jax.lax.psum(1, axis_names) if axis_names else keys.size

    def halve(bounds):
        low, high = bounds
        middle = low + (high - low) // 2
        enough = _total(tied & (index < middle), axis_names) >= wanted
        return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)

    # The smallest cut such that enough of the tied lie before it; usually all of them are wanted and no pass is made.
    all_wanted = _total(tied, axis_names) <= wanted
    end = jnp.array(num_elements, jnp.int32)
    low, _ = jax.lax.while_loop(lambda b: b[0] < b[1], halve, (jnp.where(all_wanted, end, 0), end))
    return (above | (tied & (index < low))) & (keys > 0) & (k > 0)


def _flat_index(shape: tuple[int, ...], axis_names: tuple[str, ...]) -> jax.Array:
    """Position [N T] in the global batch, built from iotas so that a sharded batch needs no exchange."""
    row = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    if axis_names:
        row = row + jax.lax.axis_index(axis_names).astype(jnp.int32) * shape[0]
    return row * shape[1] + jax.lax.broadcasted_iota(jnp.int32, shape, 1)

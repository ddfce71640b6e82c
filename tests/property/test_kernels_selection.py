"""Selection against a stable sort, on random values with ties, infinities, NaN and both zeros."""

import fractions

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings

from kernels.entropy_covariance import select_random_subset, select_top_fraction

SHAPE = (4, 9)
numbers = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, -1.0, float("inf"), float("-inf"), float("nan")]), st.floats(width=32)
)


def sort_select(values, mask, k):
    flat = np.where(mask & ~np.isnan(values), values, np.nan).ravel()
    order = np.argsort(-flat, kind="stable")  # NaN last; -0 == 0
    chosen = [i for i in order[:k] if not np.isnan(flat[i])]
    out = np.zeros(flat.size, bool)
    out[chosen] = True
    return out.reshape(values.shape)


select = jax.jit(select_top_fraction)
subset = jax.jit(select_random_subset)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_top_fraction_is_a_stable_sort(data):
    size = SHAPE[0] * SHAPE[1]
    dtype = data.draw(st.sampled_from([np.float32, np.float64]))
    values = np.array(data.draw(st.lists(numbers, min_size=size, max_size=size)), dtype).reshape(SHAPE)
    mask = np.array(data.draw(st.lists(st.booleans(), min_size=size, max_size=size))).reshape(SHAPE)
    thousandths = data.draw(st.integers(0, 1000))
    k = int(fractions.Fraction(thousandths, 1000) * int(mask.sum()))
    k = min(max(k, 1), int(mask.sum()))
    with jax.enable_x64(dtype == np.float64):
        got = select(jnp.asarray(values), jnp.asarray(mask), thousandths / 1000)
    np.testing.assert_array_equal(got, sort_select(values, mask, k))


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**31), st.integers(-2, 40), st.integers(1, 40))
def test_random_subset_has_its_size_and_stays_inside(seed, count, levels):
    rng = np.random.default_rng(seed)
    candidates = rng.random(SHAPE) < 0.5
    scores = np.floor(rng.random(SHAPE) * levels).astype(np.float32)  # ties
    got = np.asarray(subset(jnp.asarray(candidates), jnp.int32(count), jnp.asarray(scores)))
    assert got.sum() == min(max(count, 0), candidates.sum())
    np.testing.assert_array_equal(got, sort_select(scores, candidates, max(count, 0)))

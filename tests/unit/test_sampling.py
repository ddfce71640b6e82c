"""Drawing tokens: truncation against numpy, log-probabilities, frequencies, and no recompilation."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from rl_reason.sampling import make_sampling, sample, truncation_mask

ROWS, VOCAB = 3, 7
mask_of = jax.jit(truncation_mask)
draw = jax.jit(sample)


def log_softmax(x):
    x = np.asarray(x, np.float64)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def numpy_mask(row, top_k=0, top_p=1.0, min_p=0.0):
    """One row token by token: top-k, top-p of what is left, min-p, ties surviving; and how near a threshold came."""
    ranked = sorted(row, reverse=True)[: top_k or len(row)]
    mass = np.exp(ranked) / np.exp(ranked).sum()
    before = np.concatenate([[0.0], np.cumsum(mass)[:-1]])
    size = max(int((before < top_p).sum()), 1)
    floor = ranked[0] + np.log(min_p) if min_p else -np.inf
    margin = min(np.abs(before - top_p).min(), np.abs(row - floor).min())
    return row >= max(ranked[size - 1], floor) - 1e-9, margin


# Small integers make ties, the rest does not.
LOGITS = st.one_of(
    hnp.arrays(np.float32, (ROWS, VOCAB), elements=st.integers(-3, 3).map(float)),
    hnp.arrays(np.float32, (ROWS, VOCAB), elements=st.floats(-8, 8, width=16)),
)


@settings(max_examples=150, deadline=None)
@given(
    logits=LOGITS,
    top_k=st.integers(0, VOCAB + 2),
    top_p=st.one_of(st.just(1.0), st.floats(0.01, 1.0)),
    min_p=st.one_of(st.just(0.0), st.floats(0.01, 0.99)),
)
def test_truncation_equals_numpy(logits, top_k, top_p, min_p):
    logprobs = log_softmax(logits)
    gap = np.abs(logprobs[:, :, None] - logprobs[:, None, :])
    assume(not ((gap > 0) & (gap < 1e-5)).any())  # nearly tied: fp32 may or may not tell them apart
    want, margins = zip(*(numpy_mask(row, top_k, top_p, min_p) for row in logprobs), strict=True)
    assume(min(margins) > 1e-5)  # else rounding decides
    got = mask_of(jnp.asarray(logprobs, jnp.float32), make_sampling(1.0, top_k, top_p, min_p))
    np.testing.assert_array_equal(got, want)


def test_truncation_by_hand():
    # Probabilities 0.5 0.25 0.125 0.0625 0.0625: top-p 0.7 needs 0.5 + 0.25.
    p = jnp.log(jnp.array([[0.5, 0.25, 0.125, 0.0625, 0.0625]]))
    for knobs, kept in (
        (dict(), 5),
        (dict(top_k=1), 1),
        (dict(top_k=4), 5),  # the fourth is tied with the fifth
        (dict(top_p=0.7), 2),
        (dict(top_p=0.8, top_k=3), 2),  # 0.57 + 0.29 = 0.86 of the top three; of all five it takes 3
        (dict(top_p=0.8), 3),
        (dict(min_p=0.3), 2),  # at least 0.15
        (dict(top_p=1e-6), 1),
        (dict(min_p=1.0), 1),
    ):
        assert int(truncation_mask(p, make_sampling(1.0, **knobs)).sum()) == kept, knobs


KNOBS = [dict(), dict(top_k=3), dict(top_p=0.6), dict(min_p=0.4), dict(top_k=4, top_p=0.9, min_p=0.05)]


@pytest.mark.parametrize("knobs", KNOBS, ids=str)
@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
def test_frequencies_and_logprobs(knobs, temperature):
    # The full log-probability is that of softmax(logits / t); the other is normalised over the kept set.
    count = 4096
    logits = np.random.default_rng(0).normal(size=VOCAB) * 1.5
    full = log_softmax(logits / temperature)
    kept, _ = numpy_mask(full, **knobs)
    keys = jax.random.split(jax.random.key(1), count)
    rows = jnp.tile(jnp.asarray(logits, jnp.float32), (count, 1))
    token, logprob, sampled = map(np.asarray, draw(keys, rows, make_sampling(temperature, **knobs)))
    assert kept[token].all()
    np.testing.assert_allclose(logprob, full[token], atol=1e-5)
    within = full - np.log(np.exp(full[kept]).sum())
    np.testing.assert_allclose(sampled, within[token], atol=1e-5)
    # Chi-square over the kept tokens: 22.5 is exceeded once in a thousand seeds with six degrees of freedom.
    expected = count * np.exp(within[kept])
    observed = np.bincount(token, minlength=VOCAB)[kept]
    assert ((observed - expected) ** 2 / expected).sum() < 22.5


def test_greedy():
    # Temperature 0 takes the likeliest token, the first of ties; reported at temperature 1, and certain as drawn.
    logits = jnp.array([[0.0, 3.0, 1.0], [2.0, 2.0, 1.0]])
    keys = jax.random.split(jax.random.key(0), 2)
    for knobs in KNOBS:
        token, logprob, sampled = sample(keys, logits, make_sampling(0.0, **knobs))
        assert token.tolist() == [1, 0]
        np.testing.assert_allclose(logprob, [log_softmax(logits)[0, 1], log_softmax(logits)[1, 0]], rtol=1e-6)
        np.testing.assert_array_equal(sampled, 0.0)


def test_knobs_do_not_recompile():
    traces = []

    @jax.jit
    def counted(keys, logits, sampling):
        traces.append(1)
        return sample(keys, logits, sampling)

    keys = jax.random.split(jax.random.key(0), ROWS)
    for temperature in (0.0, 0.5, 1.0):
        for knobs in KNOBS:
            counted(keys, jnp.zeros((ROWS, VOCAB)), make_sampling(temperature, **knobs))
    assert len(traces) == 1 and counted._cache_size() == 1


def test_a_row_depends_on_its_own_key_and_logits_only():
    keys = jax.random.split(jax.random.key(3), 64)
    logits = jax.random.normal(jax.random.key(4), (64, VOCAB))
    knobs = make_sampling(1.0, top_p=0.9)
    token, logprob, _ = draw(keys, logits, knobs)
    order = jax.random.permutation(jax.random.key(5), 64)
    moved, moved_logprob, _ = draw(keys[order], logits[order], knobs)
    np.testing.assert_array_equal(moved, token[order])
    np.testing.assert_array_equal(moved_logprob, logprob[order])
    others, _, _ = draw(keys.at[1:].set(jax.random.key(9)), logits.at[1:].set(0.0), knobs)
    assert int(others[0]) == int(token[0])
    same_logits, _, _ = draw(keys, jnp.zeros((64, VOCAB)), knobs)
    assert len(set(same_logits.tolist())) == VOCAB  # different keys draw differently


BAD = [dict(temperature=-0.1), dict(top_k=-1), dict(top_p=0.0), dict(top_p=1.1), dict(min_p=-0.1), dict(min_p=1.5)]


@pytest.mark.parametrize("knobs", BAD, ids=str)
def test_knobs_out_of_range(knobs):
    with pytest.raises(ValueError, match=re.escape("want temperature >= 0, top_k >= 0 (0 is off), 0 < top_p <= 1")):
        make_sampling(**dict(temperature=1.0) | knobs)


def test_float64_stays_float64(x64):
    keys = jax.random.split(jax.random.key(0), 1)
    _, logprob, sampled = sample(keys, jnp.zeros((1, 3), jnp.float64), make_sampling(1.0))
    assert logprob.dtype == sampled.dtype == jnp.float64
    assert float(logprob[0]) == pytest.approx(-np.log(3), abs=1e-15)

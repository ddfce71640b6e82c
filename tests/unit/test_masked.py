"""Reductions over what is valid."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_reason.masked import masked_mean, masked_sum, ranking_accuracy

pytestmark = pytest.mark.usefixtures("no_rank_promotion")

X = jnp.array([[1.0, 2.0, jnp.nan], [4.0, jnp.inf, -jnp.inf], [jnp.nan, jnp.nan, jnp.nan]])
MASK = jnp.array([[True, True, False], [True, False, False], [False, False, False]])


def test_by_hand():
    assert float(masked_sum(X, MASK)) == 7.0
    assert float(masked_mean(X, MASK)) == pytest.approx(7 / 3)
    np.testing.assert_array_equal(masked_sum(X, MASK, axis=1), [3, 4, 0])
    np.testing.assert_array_equal(masked_mean(X, MASK, axis=1), [1.5, 4, 0])
    np.testing.assert_array_equal(masked_mean(X, MASK, axis=0), [2.5, 2, 0])


def test_nothing_valid_gives_zero_and_zero_gradient():
    value, grad = jax.value_and_grad(lambda x: masked_mean(x, jnp.zeros_like(MASK)))(X)
    assert float(value) == 0.0
    np.testing.assert_array_equal(grad, 0.0)


def test_gradient_is_blind_to_what_is_masked():
    np.testing.assert_allclose(jax.grad(lambda x: masked_mean(x, MASK))(X), MASK / 3)


def test_ranking_accuracy_counts_pairs():
    # Over random rows with ties, against the plain count of pairs; what is not valid plays no part.
    rng = np.random.default_rng(0)
    for _ in range(20):
        scores, right, valid = rng.integers(0, 5, 30) / 4, rng.random(30) < 0.4, rng.random(30) < 0.8
        pairs = [(a > b) + (a == b) / 2 for a in scores[valid & right] for b in scores[valid & ~right]]
        scores[~valid] = np.nan
        found = ranking_accuracy(jnp.array(scores), jnp.array(right), jnp.array(valid))
        assert float(found) == pytest.approx(np.mean(pairs), abs=1e-6)


def test_ranking_accuracy_without_a_pair_is_a_half():
    scores, everywhere = jnp.array([1.0, 2.0]), jnp.ones(2, bool)
    for right in (everywhere, ~everywhere):
        assert float(ranking_accuracy(scores, right, everywhere)) == 0.5
    assert float(ranking_accuracy(scores, jnp.array([True, False]), ~everywhere)) == 0.5

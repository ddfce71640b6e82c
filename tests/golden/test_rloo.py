"""Leave-one-out advantages by hand (arXiv:2402.14740)."""

import jax.numpy as jnp
import numpy as np
import pytest

from rl_reason.methods import rloo

pytestmark = pytest.mark.usefixtures("no_rank_promotion")


def test_the_others_are_the_baseline():
    # 1 0 0 0: the first has the others' mean 0 below it, each of them (1 + 0 + 0) / 3 above it.
    # 3 1 2 2: 3 - 5/3, 1 - 7/3, 2 - 6/3, 2 - 6/3.
    rewards = jnp.array([[1.0, 0, 0, 0], [3.0, 1, 2, 2]])
    got = rloo.advantages(rewards, jnp.ones_like(rewards, bool))
    np.testing.assert_allclose(got, [[1, -1 / 3, -1 / 3, -1 / 3], [4 / 3, -4 / 3, 0, 0]], atol=1e-6)


def test_invalid_rows_are_nobodys_baseline():
    # Valid rewards 1 0 1: 1 - 1/2, 0 - 1, 1 - 1/2; the third verifier failed, and its NaN is not looked at.
    valid = jnp.array([[True, True, False, True]])
    got = rloo.advantages(jnp.array([[1.0, 0, jnp.nan, 1]]), valid)
    np.testing.assert_allclose(got, [[0.5, -1, 0, 0.5]], atol=1e-6)


@pytest.mark.parametrize("value", [0.1, 1 / 3, -1.0, 12345.678])
@pytest.mark.parametrize("size", [1, 3, 7, 64])
def test_equal_rewards_give_exactly_zero(value, size):
    # A group of one too: there is nobody to compare it with, so it teaches nothing.
    rewards = jnp.full((2, size), value, jnp.float32)
    np.testing.assert_array_equal(rloo.advantages(rewards, jnp.ones_like(rewards, bool)), 0.0)


def test_one_valid_row_or_none_gives_exactly_zero():
    valid = jnp.array([[False, True, False], [False, False, False]])
    np.testing.assert_array_equal(rloo.advantages(jnp.array([[1.0, 5, 2], [1.0, 2, 3]]), valid), 0.0)


@pytest.mark.parametrize(
    "count, mean, right, wrong",
    [
        (4.0, 0.0, 1.333333, -1.333333),  # +-1, two of four right: 4/3 (1 - 0)
        (16.0, -0.5, 1.6, -0.533333),  # four of sixteen right: 16/15 (1 + 0.5), 16/15 (-1 + 0.5)
        (1.0, 1.0, 0.0, 0.0),  # one sample has no other
    ],
)
def test_a_selected_pair_keeps_the_baseline_of_all_samples(count, mean, right, wrong):
    pair, valid = jnp.array([[1.0, -1.0]]), jnp.ones((1, 2), bool)
    full = lambda x: jnp.full((1, 2), x)
    a = rloo.sampled_advantages(pair, valid, full(mean), full(count))
    np.testing.assert_allclose(a, [[right, wrong]], atol=1e-6)
    np.testing.assert_array_equal(rloo.sampled_advantages(pair, ~valid, full(mean), full(count)), 0.0)

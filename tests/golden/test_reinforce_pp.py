"""REINFORCE++ by hand: returns, whitening over tokens, the group baseline, KL in the reward (arXiv:2501.03262)."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from rl_reason.methods import reinforce_pp

pytestmark = pytest.mark.usefixtures("no_rank_promotion")

# Three and two tokens, the second row's after a prompt of one; R = 1 and 0.
MASK = jnp.array([[True, True, True], [False, True, True]])
REWARDS = jnp.array([[1.0, 0.0]])
VALID = jnp.ones((1, 2), bool)
NAN = jnp.nan

plain = functools.partial(reinforce_pp.advantages, gamma=1.0, var_eps=1e-8)
baseline = functools.partial(reinforce_pp.baseline_advantages, var_eps=1e-8)


def test_whitened_outcomes():
    # Returns 1 1 1 | 0 0: mean 0.6, variance (3 * 0.16 + 2 * 0.36) / 4 = 0.3, std 0.547723; 0.4 and -0.6 over it.
    want = [[0.730297] * 3, [0, -1.095445, -1.095445]]
    np.testing.assert_allclose(plain(REWARDS, MASK, VALID, None), want, atol=1e-6)
    # With the group's mean as baseline: 0.5 and -0.5, token mean 0.1, the same differences to it.
    np.testing.assert_allclose(baseline(REWARDS, MASK, VALID), want, atol=1e-6)


def test_discounted_returns():
    # gamma 0.5: 0.25 0.5 1 | 0 0, mean 0.35, centred -0.1 0.15 0.65 -0.35 -0.35, squares 0.7, variance 0.175.
    got = reinforce_pp.advantages(REWARDS, MASK, VALID, None, gamma=0.5, var_eps=0.0)
    np.testing.assert_allclose(got, [[-0.239046, 0.358569, 1.553797], [0, -0.836660, -0.836660]], atol=1e-6)


def test_token_rewards_are_added_to_the_outcome():
    # 0.5 0 1 | 0 -1 have returns 1.5 1 1 | -1 -1: mean 0.3, centred 1.2 0.7 0.7 -1.3 -1.3, squares 5.8, variance 1.45.
    token_rewards = jnp.array([[0.5, 0, 0], [NAN, 0, -1]])
    got = plain(REWARDS, MASK, VALID, token_rewards)
    np.testing.assert_allclose(got, [[0.996546, 0.581318, 0.581318], [0, -1.079591, -1.079591]], atol=1e-6)


def test_kl_in_the_reward():
    # old - ref 0.1 0.2 0.3 | 0.4 -0.2, coefficient 0.5: rewards -0.05 -0.1 0.85 | -0.2 0.1, returns 0.7 0.75 0.85 |
    # -0.1 0.1, mean 0.46, centred 0.24 0.29 0.39 -0.56 -0.36, squares 0.737, variance 0.18425, std 0.429244.
    old, ref = jnp.array([[-1.0, -1, -1], [NAN, -1, -1]]), jnp.array([[-1.1, -1.2, -1.3], [NAN, -1.4, -0.8]])
    run = functools.partial(reinforce_pp.advantages_with_kl, REWARDS, MASK, VALID, None, gamma=1.0, var_eps=1e-8)
    got = run(old, ref, kl_estimator="k1", kl_coef=0.5)
    np.testing.assert_allclose(got, [[0.559123, 0.675606, 0.908574], [0, -1.304619, -0.838684]], atol=1e-5)
    free = run(old, ref, kl_estimator="k1", kl_coef=0.0)
    np.testing.assert_array_equal(free, plain(REWARDS, MASK, VALID, None))


def test_long_completions_weigh_more_with_the_baseline():
    # Groups 1 0 and 1 1 of 3 2 | 1 2 tokens: 0.5 -0.5 | 0 0, token mean (1.5 - 1) / 8 = 0.0625; squares 3 * 0.4375^2 +
    # 2 * 0.5625^2 + 3 * 0.0625^2 = 1.21875, variance / 7 = 0.174107, std 0.417262. The equal group is not at 0.
    mask = jnp.asarray(np.arange(3) < np.array([[3], [2], [1], [2]]))
    got = baseline(jnp.array([[1.0, 0], [1, 1]]), mask, jnp.ones((2, 2), bool))
    want = jnp.array([[1.048503], [-1.348076], [-0.149786], [-0.149786]])
    np.testing.assert_allclose(got, jnp.where(mask, want, 0.0), atol=1e-6)


def test_invalid_and_empty_rows_are_in_no_statistic():
    # The rows of test_whitened_outcomes with one whose verifier failed between them and one without a token.
    mask = jnp.array([[True, True, True], [True, True, True], [False, True, True], [False] * 3])
    rewards, valid = jnp.array([[1.0, NAN, 0.0, 7.0]]), jnp.array([[True, False, True, True]])
    want = [[0.730297] * 3, [0] * 3, [0, -1.095445, -1.095445], [0] * 3]
    np.testing.assert_allclose(plain(rewards, mask, valid, None), want, atol=1e-6)
    no_tokens = jnp.zeros_like(mask)
    np.testing.assert_array_equal(plain(rewards, no_tokens, valid, None), 0.0)
    np.testing.assert_array_equal(baseline(rewards, no_tokens, valid), 0.0)


@pytest.mark.parametrize("value", [0.1, 1 / 3, -1.0, 12345.678])
@pytest.mark.parametrize("rows", [1, 3, 7])
def test_equal_rewards_give_exactly_zero(value, rows):
    rewards, mask = jnp.full((2, rows), value), jnp.asarray(np.arange(5) < np.arange(1, 2 * rows + 1)[:, None])
    valid = jnp.ones_like(rewards, bool)
    np.testing.assert_array_equal(plain(rewards, mask, valid, None), 0.0)
    np.testing.assert_array_equal(baseline(rewards, mask, valid), 0.0)


def test_groups_of_one():
    # Without baseline they compare with the batch, as above: 1 and 0 on two tokens each give +-sqrt(3) / 2.
    mask, rewards = jnp.ones((2, 2), bool), jnp.array([[1.0], [0.0]])
    valid = jnp.ones_like(rewards, bool)
    got = plain(rewards, mask, valid, None)
    np.testing.assert_allclose(got, [[0.866025] * 2, [-0.866025] * 2], atol=1e-6)
    np.testing.assert_array_equal(baseline(rewards, mask, valid), 0.0)  # verl: their raw rewards, whitened
    one_token = jnp.array([[True, False], [False, False]])
    np.testing.assert_array_equal(plain(rewards, one_token, valid, None), 0.0)  # no variance of one number


def test_refuses():
    with pytest.raises(ValueError, match=r"gamma=1\.5: a discount lies in \[0, 1\]"):
        reinforce_pp.advantages(REWARDS, MASK, VALID, None, gamma=1.5, var_eps=1e-8)
    with pytest.raises(ValueError, match=r"var_eps=-1\.0 must not be below 0"):
        reinforce_pp.baseline_advantages(REWARDS, MASK, VALID, var_eps=-1.0)
    zeros = jnp.zeros(MASK.shape)
    with pytest.raises(ValueError, match="k1, k2 and k3"):
        reinforce_pp.advantages_with_kl(
            REWARDS, MASK, VALID, None, zeros, zeros, gamma=1.0, var_eps=1e-8, kl_estimator="k4", kl_coef=0.1
        )

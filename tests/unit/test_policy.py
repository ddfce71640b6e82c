"""Ratios, clipping and group statistics at their edges; their values by hand are in tests/golden."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_reason import policy

pytestmark = pytest.mark.usefixtures("no_rank_promotion")


def test_ratio_stays_finite():
    # e^20 and e^-20 at most, however far the policies are apart; beyond, the gradient is 0.
    far = jnp.array([[500.0, -500.0, 0.0]])
    ratio = policy.probability_ratio(far, jnp.zeros_like(far))
    np.testing.assert_allclose(ratio, [[np.exp(20.0), np.exp(-20.0), 1.0]], rtol=1e-6)
    grad = jax.grad(lambda lp: policy.probability_ratio(lp, jnp.zeros_like(lp)).sum())(far)
    np.testing.assert_array_equal(grad, [[0.0, 0.0, 1.0]])


@pytest.mark.parametrize(
    "ratio, advantage, loss, clipped",
    [  # eps 0.2 below, 0.3 above
        (1.4, 1.0, -1.3, True),  # a right token rose enough
        (0.5, 1.0, -0.5, False),  # a right token fell: pull it back
        (1.4, -1.0, 1.4, False),  # a wrong token rose: push it down
        (0.5, -1.0, 0.8, True),  # a wrong token fell enough
        (1.0, 1.0, -1.0, False),
        (2.0, 0.0, 0.0, False),
    ],
)
def test_which_side_the_clip_binds(ratio, advantage, loss, clipped):
    x, binds = policy.ppo_losses(jnp.array([[ratio]]), jnp.array([[advantage]]), 0.2, 0.3)
    assert float(x[0, 0]) == pytest.approx(loss) and bool(binds[0, 0]) == clipped


def test_group_statistics():
    # Group 1: 2 4 and an invalid 9: mean 3. Group 2: equal. Group 3: no valid row.
    rewards = jnp.array([[2.0, 4.0, 9.0], [5.0, 5.0, 5.0], [1.0, 2.0, 3.0]])
    valid = jnp.array([[True, True, False], [True, True, True], [False, False, False]])
    centred, count, equal = policy.group_centred(rewards, valid)
    np.testing.assert_array_equal(centred, [[-1, 1, 0], [0, 0, 0], [0, 0, 0]])
    np.testing.assert_array_equal(count, [[2], [3], [0]])
    np.testing.assert_array_equal(equal, [[False], [True], [True]])


def test_metrics_read_valid_tokens_only():
    mask = jnp.array([[True, True, False]])
    metrics = policy.ppo_metrics(
        jnp.array([[-1.0, -2.0, jnp.nan]]), jnp.array([[-1.5, -2.5, 0.0]]), jnp.array([[True, False, True]]), mask
    )
    assert float(metrics["actor/ppo_kl"]) == -0.5 and float(metrics["actor/pg_clipfrac"]) == 0.5

"""LUFFY by hand (arXiv:2504.14945)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_reason.aggregation import aggregate, token_set
from rl_reason.methods import grpo, luffy

pytestmark = pytest.mark.usefixtures("no_rank_promotion")

# One demonstrated row of probabilities 0.9, 0.1, 0.01 and one sampled row whose ratios are 1, 3 and 0.2.
P = np.array([0.9, 0.1, 0.01])
LOGPROBS = jnp.log(jnp.array([P, [0.5, 0.6, 0.1]]))
OLD = jnp.log(jnp.array([[0.3, 0.3, 0.3], [0.5, 0.2, 0.5]]))
ADVANTAGES = jnp.array([[0.875] * 3, [-0.125] * 3])
OFF_POLICY = jnp.array([True, False])
MASK = jnp.ones((2, 3), bool)


def run(logprobs=LOGPROBS, advantages=ADVANTAGES, gamma=0.1, old=OLD, mask=MASK, off_policy=OFF_POLICY):
    return luffy.objective(logprobs, old, advantages, off_policy, mask, shaping_gamma=gamma)


def slopes(**kwargs):
    return jax.grad(lambda lp: run(lp, **kwargs)[0].sum())(LOGPROBS)


def test_failure_makes_the_demonstration_the_lesson():
    # Seven wrong samples and a right demonstration: mean 1/8, no division by the deviation. All right: 0.
    advantages = lambda r: grpo.advantages(r, jnp.ones_like(r, bool), divide_by_std=False, ddof=1, std_eps=1e-6)
    np.testing.assert_allclose(advantages(jnp.array([[0.0] * 7 + [1.0]])), [[-0.125] * 7 + [0.875]])
    np.testing.assert_array_equal(advantages(jnp.ones((1, 8))), 0.0)


def test_shaped_losses():
    # p / (p + 0.1) = 0.9, 0.5, 0.090909; sampled: -A r with r = 1, 3, 0.2 and no clip anywhere.
    losses, metrics = run()
    np.testing.assert_allclose(losses[0], -0.875 * np.array([0.9, 0.5, 0.090909]), rtol=1e-5)
    np.testing.assert_allclose(losses[1], 0.125 * np.array([1.0, 3.0, 0.2]), rtol=1e-5)
    assert float(metrics["actor/off_policy_prob"]) == pytest.approx(P.mean(), rel=1e-6)
    assert float(metrics["actor/off_ratio_mean"]) == pytest.approx((0.9 + 0.5 + 1 / 11) / 3, rel=1e-6)
    assert float(metrics["actor/on_policy_prob"]) == pytest.approx(0.4, rel=1e-6)


def test_slopes():
    # A demonstrated token: -A gamma p / (p + gamma)^2 = -A (0.09, 0.25, 0.082645). A sampled one: -A r.
    np.testing.assert_allclose(slopes()[0], -0.875 * np.array([0.09, 0.25, 0.082645]), rtol=1e-5)
    np.testing.assert_allclose(slopes()[1], 0.125 * np.array([1.0, 3.0, 0.2]), rtol=1e-5)


def test_gain_over_no_shaping():
    # gamma / (p + gamma)^2: 0.1 at p = 0.9, 2.5 at 0.1, 8.264 at 0.01.
    gain = slopes()[0] / slopes(gamma=None)[0]
    np.testing.assert_allclose(gain, 0.1 / (P + 0.1) ** 2, rtol=1e-5)
    np.testing.assert_allclose(gain, [0.1, 2.5, 8.264463], rtol=1e-5)
    np.testing.assert_allclose(slopes(gamma=None)[0], -0.875 * P, rtol=1e-5)


def test_the_demonstrations_old_logprobs_are_never_read():
    strange = OLD.at[0].set(jnp.nan)
    for a, b in zip(run(old=strange)[1].values(), run()[1].values(), strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(slopes(old=strange)[1], slopes()[1])
    np.testing.assert_array_equal(run(old=strange)[0], run()[0])
    np.testing.assert_array_equal(slopes(old=strange), slopes())


def test_a_wrong_demonstration_is_pushed_down():
    assert bool((slopes(advantages=-ADVANTAGES)[0] > 0).all())


def test_an_impossible_token_neither_moves_nor_breaks_anything():
    # p = 0: the loss is 0 and its slope -A gamma p / (p + gamma)^2 = 0.
    logprobs = LOGPROBS.at[0, 1].set(-jnp.inf)
    grad = jax.grad(lambda lp: run(lp)[0].sum())(logprobs)
    assert float(run(logprobs)[0][0, 1]) == 0.0 and float(grad[0, 1]) == 0.0


def test_constant_width():
    # The sum over both rows by 8192, whatever the number of rows or tokens: (0.875 * 1.490909 neg. + 0.125 * 4.2) / 8192.
    losses, _ = run()
    assert float(aggregate(losses, MASK, "sum", 8192.0)) == pytest.approx((-0.875 * 1.490909 + 0.525) / 8192, rel=1e-5)


def test_only_demonstrations_or_only_samples_is_finite():
    for off_policy in (jnp.array([True, True]), jnp.array([False, False])):
        _, metrics = run(off_policy=off_policy)
        assert all(np.isfinite(x) for x in metrics.values())


def test_rl_with_an_sft_loss():
    # Clip 0.2 on the sampled row with A = -0.125: max(0.125 r, 0.125 clip(r)) = 0.125 (1, 3, 0.8). The imitation term is
    # -log p, over the demonstration alone: -(ln .9 + ln .1 + ln .01) / 3 = 2.337705.
    terms, metrics = luffy.imitation_objective(
        LOGPROBS, OLD, ADVANTAGES, OFF_POLICY, MASK, clip_eps_low=0.2, clip_eps_high=0.2
    )
    np.testing.assert_allclose(terms["policy"][1], 0.125 * np.array([1.0, 3.0, 0.8]), rtol=1e-5)
    shown = token_set("off_policy", MASK, jnp.zeros(2), OFF_POLICY)
    assert float(aggregate(terms["imitation"], shown, "token_mean")) == pytest.approx(2.337705, rel=1e-5)
    assert float(metrics["actor/pg_clipfrac"]) == pytest.approx(1 / 3)


def test_statistics_of_sampled_rows_alone():
    # Samples 1, 0, 0 have mean 1/3 and (unbiased) deviation 0.577350; the demonstration's reward plays no part.
    rewards, valid = jnp.array([[1.0, 0.0, 0.0, 5.0]]), jnp.ones((1, 4), bool)
    shown = jnp.array([[False, False, False, True]])
    a = luffy.sampled_advantages(rewards, valid, shown, std_eps=0.0)
    np.testing.assert_allclose(a, [[1.154701, -0.577350, -0.577350, 0.0]], rtol=1e-5)
    np.testing.assert_array_equal(luffy.sampled_advantages(jnp.ones((1, 4)), valid, shown, std_eps=1e-6), 0.0)

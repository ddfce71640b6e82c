"""GRPO by hand: advantages, the clipped loss under each aggregation, its gradient, dual clip."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_reason.aggregation import aggregate
from rl_reason.methods import grpo, verdict

pytestmark = pytest.mark.usefixtures("no_rank_promotion")

verl = functools.partial(grpo.advantages, divide_by_std=True, ddof=1, std_eps=1e-6)
dr_grpo = functools.partial(grpo.advantages, divide_by_std=False, ddof=1, std_eps=1e-6)


def group(*rewards):
    return jnp.array([rewards], jnp.float32)


def all_valid(rewards):
    return jnp.ones_like(rewards, bool)


def test_advantages_divide_by_the_unbiased_std():
    # 1 0 0 1: mean 1/2, centred +-1/2, sum of squares 1, variance 1/3, std 0.577350; 0.5 / 0.577351 = 0.866024.
    r = group(1, 0, 0, 1)
    np.testing.assert_allclose(verl(r, all_valid(r))[0], [0.866024, -0.866024, -0.866024, 0.866024], atol=1e-6)
    # 1 and seven 0: mean 1/8, centred 7/8 and -1/8, sum of squares 49/64 + 7/64 = 7/8, variance 1/8, std 0.353553;
    # 0.875 / 0.353554 = 2.474867 and -0.125 / 0.353554 = -0.353552.
    r = group(1, 0, 0, 0, 0, 0, 0, 0)
    np.testing.assert_allclose(verl(r, all_valid(r))[0], [2.474867] + [-0.353552] * 7, atol=1e-6)


def test_population_std_and_no_std():
    # 1 0 0 1 with ddof 0: std = sqrt(1/4); 0.5 / 0.500001 = 0.999998. Smaller by sqrt(3/4) with ddof 1.
    r = group(1, 0, 0, 1)
    population = grpo.advantages(r, all_valid(r), divide_by_std=True, ddof=0, std_eps=1e-6)
    np.testing.assert_allclose(population[0], [0.999998, -0.999998, -0.999998, 0.999998], atol=1e-6)
    np.testing.assert_allclose(dr_grpo(r, all_valid(r))[0], [0.5, -0.5, -0.5, 0.5])
    # Dr.GRPO on 1 and seven 0: 7/8 and -1/8, exact in binary.
    r = group(1, 0, 0, 0, 0, 0, 0, 0)
    np.testing.assert_array_equal(dr_grpo(r, all_valid(r))[0], [0.875] + [-0.125] * 7)


def test_invalid_rows_teach_nothing():
    # Third verifier failed: valid rewards 1 0 1, mean 2/3, centred 1/3 -2/3 1/3, sum of squares 6/9, ddof 1: 1/3,
    # std 0.577350: A = 0.577350, -1.154701, 0, 0.577350. Its own reward, here NaN, is not looked at.
    valid = jnp.array([[True, True, False, True]])
    advantages = grpo.advantages(group(1, 0, jnp.nan, 1), valid, divide_by_std=True, ddof=1, std_eps=0.0)
    np.testing.assert_allclose(advantages[0], [0.577350, -1.154701, 0, 0.577350], atol=1e-6)


@pytest.mark.parametrize("value", [0.1, 0.7, 1 / 3, -1.0, 0.0, 1e-8, 12345.678])
@pytest.mark.parametrize("size", [1, 3, 7, 8, 64])
@pytest.mark.parametrize("divide_by_std", [True, False])
def test_equal_rewards_give_exactly_zero(value, size, divide_by_std):
    # The fp32 mean of equal numbers rounds away from them; divided by a std of the same rounding it gave 0.19.
    rewards = jnp.full((2, size), value, jnp.float32)
    for ddof in (0, 1):
        advantages = grpo.advantages(rewards, all_valid(rewards), divide_by_std=divide_by_std, ddof=ddof, std_eps=1e-6)
        np.testing.assert_array_equal(advantages, 0.0)


def test_equal_valid_rewards_beside_an_invalid_one_give_exactly_zero():
    rewards = jnp.array([[0.1, 0.1, 0.9, 0.1], [0.3, 0.9, 0.9, 0.9]], jnp.float32)
    valid = jnp.array([[True, True, False, True], [True, False, False, False]])  # and a group of one valid sample
    np.testing.assert_array_equal(verl(rewards, valid), 0.0)
    np.testing.assert_array_equal(verl(rewards, jnp.zeros_like(valid)), 0.0)


# B1: three and two tokens. log ratios 0.2 -0.4 0.5 | -0.1 0.5, ratios 1.221403 0.670320 1.648721 | 0.904837 1.648721.
OLD = jnp.array([[-1.0, -0.5, -2.0], [-0.3, -1.2, 0.0]])
LOGPROBS = jnp.array([[-0.8, -0.9, -1.5], [-0.4, -0.7, 0.0]])
ADVANTAGES = jnp.array([[1.0, 1.0, 1.0], [-0.5, -0.5, -0.5]])
MASK = jnp.array([[True, True, True], [True, True, False]])


def losses(logprobs, dual_clip_ratio=3.0, eps=0.2):
    return grpo.objective(
        logprobs,
        OLD,
        ADVANTAGES,
        MASK,
        clip_eps_low=eps,
        clip_eps_high=eps,
        dual_clip_ratio=dual_clip_ratio,
    )


def test_clipped_losses():
    # A = 1: -min(ratio, clip(ratio, 0.8, 1.2)) = -1.2 (clipped), -0.670320, -1.2 (clipped).
    # A = -0.5: max(0.5 ratio, 0.5 clip(ratio)) = 0.452419, 0.824361 (a wrong token that rose is not clipped).
    x, metrics = losses(LOGPROBS)
    np.testing.assert_allclose(x[MASK], [-1.2, -0.670320, -1.2, 0.452419, 0.824361], atol=1e-6)
    assert float(metrics["actor/pg_clipfrac"]) == pytest.approx(2 / 5)
    # mean of old - new: (-0.2 + 0.4 - 0.5 + 0.1 - 0.5) / 5
    assert float(metrics["actor/ppo_kl"]) == pytest.approx(-0.14)


@pytest.mark.parametrize(
    "how, divisor, value",
    [
        ("token_mean", 1.0, -0.358708),  # (-3.070320 + 1.276780) / 5
        ("seq_mean_token_mean", 1.0, -0.192525),  # (-3.070320 / 3 + 1.276780 / 2) / 2
        ("seq_mean_token_sum", 1.0, -0.896770),  # (-3.070320 + 1.276780) / 2
        ("sum", 8.0, -0.224193),  # (-3.070320 + 1.276780) / 8
    ],
)
def test_aggregated(how, divisor, value):
    assert float(aggregate(losses(LOGPROBS)[0], MASK, how, divisor)) == pytest.approx(value, abs=1e-6)


def test_gradient():
    # d(-A ratio)/dlp = -A ratio where unclipped, exactly 0 where the clip binds; token_mean divides by 5.
    grad = jax.grad(lambda lp: aggregate(losses(lp)[0], MASK, "token_mean"))(LOGPROBS)
    np.testing.assert_allclose(grad * 5, [[0, -0.670320, 0], [0.452419, 0.824361, 0]], atol=1e-6)
    assert float(grad[0, 0]) == 0.0 and float(grad[0, 2]) == 0.0


def test_on_policy_gradient_is_minus_the_advantage():
    # lp = old: ratio exactly 1, the clip does not bind, d(-A ratio)/dlp = -A for both signs, with no 1/2 from a tie.
    grad = jax.grad(lambda lp: losses(lp)[0][MASK].sum())(OLD)
    np.testing.assert_array_equal(grad[MASK], -ADVANTAGES[MASK])


def test_dual_clip():
    # c = 1.5: the last wrong token's 0.824361 stops at 0.5 * 1.5 = 0.75 and loses its gradient; A > 0 is untouched.
    x, _ = losses(LOGPROBS, dual_clip_ratio=1.5)
    np.testing.assert_allclose(x[MASK], [-1.2, -0.670320, -1.2, 0.452419, 0.75], atol=1e-6)
    grad = jax.grad(lambda lp: losses(lp, dual_clip_ratio=1.5)[0][MASK].sum())(LOGPROBS)
    np.testing.assert_allclose(grad[1], [0.452419, 0.0, 0.0], atol=1e-6)
    np.testing.assert_array_equal(losses(LOGPROBS, None)[0], losses(LOGPROBS)[0])  # c = 3 never binds here


def test_verdict_reward():
    # wrong + (right - wrong) * score: 1 -> 1, 0.5 -> 0, 0 -> -1; only a full score is correct; a failed row is wrong.
    rewards = verdict.reward(
        jnp.array([1.0, 0.5, 0.0, jnp.nan]), jnp.array([True, True, True, False]), right=1.0, wrong=-1.0
    )
    np.testing.assert_array_equal(rewards.total, [1, 0, -1, -1])
    np.testing.assert_array_equal(rewards.correct, [1, 0, 0, 0])
    np.testing.assert_array_equal(rewards.valid, [True, True, True, False])


def test_kl_in_the_reward():
    # old - ref 0.1 0.2 0.3 | 0.4 -0.2, k1 sums 0.6 and 0.2, coefficient 0.5: rewards 1 0 become 0.7 -0.1, mean 0.3,
    # centred +-0.4, variance 0.32, std 0.565685. Off the mask nothing is read.
    nan = jnp.nan
    old, ref = jnp.array([[-1.0, -1, -1], [-1, -1, nan]]), jnp.array([[-1.1, -1.2, -1.3], [-1.4, -0.8, nan]])
    r = group(1, 0)
    run = functools.partial(grpo.advantages_with_kl, r, all_valid(r), MASK, old, ref, ddof=1, std_eps=0.0)
    got = run(divide_by_std=False, kl_estimator="k1", kl_coef=0.5)
    np.testing.assert_allclose(got, [[0.4, -0.4]], atol=1e-6)
    got = run(divide_by_std=True, kl_estimator="k1", kl_coef=0.5)
    np.testing.assert_allclose(got, [[0.707107, -0.707107]], atol=1e-6)
    # k2: (0.01 + 0.04 + 0.09) / 2 = 0.07 and (0.16 + 0.04) / 2 = 0.1: 1 - 0.035 and 0 - 0.05, +-0.5075.
    got = run(divide_by_std=False, kl_estimator="k2", kl_coef=0.5)
    np.testing.assert_allclose(got, [[0.5075, -0.5075]], atol=1e-6)
    free = run(divide_by_std=True, kl_estimator="k1", kl_coef=0.0)
    np.testing.assert_array_equal(free, grpo.advantages(r, all_valid(r), divide_by_std=True, ddof=1, std_eps=0.0))


def test_kl_in_the_reward_moves_a_group_of_equal_verdicts():
    # Verdicts 1 1 with k1 sums 0.6 and 0.2: 1 - 0.06 and 1 - 0.02, +-0.02; at the reference itself exactly 0.
    old, ref = jnp.full((2, 3), -1.0), jnp.array([[-1.1, -1.2, -1.3], [-1.4, -0.8, 0]])
    r = group(1, 1)
    run = functools.partial(grpo.advantages_with_kl, r, all_valid(r), MASK, old, divide_by_std=False, ddof=1)
    got = run(ref, std_eps=0.0, kl_estimator="k1", kl_coef=0.1)
    np.testing.assert_allclose(got, [[-0.02, 0.02]], atol=1e-6)
    np.testing.assert_array_equal(run(old, std_eps=0.0, kl_estimator="k1", kl_coef=0.1), 0.0)

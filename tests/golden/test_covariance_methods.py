"""Clip-Cov and KL-Cov by hand (arXiv:2505.22617)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.entropy_covariance import covariance
from rl_reason.aggregation import aggregate
from rl_reason.methods import clip_cov, grpo, kl_cov

pytestmark = pytest.mark.usefixtures("no_rank_promotion")

# B2: log ratios 0.1 0 -0.1 | -0.5 0.1, so -A ratio = -2.210342 -2 -1.809675 | 0.606531 1.105171, sum -4.308315.
OLD = jnp.array([[-0.2, -0.2, -0.2], [-3.5, -0.5, 0.0]])
LOGPROBS = jnp.array([[-0.1, -0.2, -0.3], [-4.0, -0.4, 0.0]])
ADVANTAGES = jnp.array([[2.0, 2.0, 2.0], [-1.0, -1.0, -1.0]])
MASK = jnp.array([[True, True, True], [True, True, False]])
PLAIN = [-2.210342, -2.0, -1.809675, 0.606531, 1.105171]  # also its gradient: d(-A ratio)/dlp = -A ratio


def clip(logprobs, *, low, high=5.0, ratio=2e-4, eps=1.0, seed=0, old=OLD):
    return clip_cov.objective(
        logprobs,
        old,
        ADVANTAGES,
        MASK,
        jax.random.key(seed),
        clip_eps_low=eps,
        clip_eps_high=eps,
        clip_cov_ratio=ratio,
        clip_cov_low=low,
        clip_cov_high=high,
    )


def kl(logprobs, *, coef=1.0, ratio=2e-3, old=OLD):
    return kl_cov.objective(logprobs, old, ADVANTAGES, MASK, kl_cov_ratio=ratio, kl_cov_coef=coef)


def gradient(objective, logprobs=LOGPROBS, **kwargs):
    """Of the sum over valid tokens."""
    return jax.grad(lambda lp: objective(lp, **kwargs)[0][MASK].sum())(logprobs)[MASK]


def token_mean(losses):
    return float(aggregate(losses, MASK, "token_mean"))


def test_covariance():
    # mean A = (6 - 2) / 5 = 0.8, mean lp = (-0.6 - 4.4) / 5 = -1:
    # 1.2 * 0.9, 1.2 * 0.8, 1.2 * 0.7 | -1.8 * -3, -1.8 * 0.6.
    c = covariance(LOGPROBS, ADVANTAGES, MASK)
    np.testing.assert_allclose(c, [[1.08, 0.96, 0.84], [5.4, -1.08, 0]], atol=1e-6)


def test_ppo_with_eps_one():
    # No ratio leaves [0, 2]: nothing is clipped. -4.308315 / 5.
    x, _ = grpo.objective(LOGPROBS, OLD, ADVANTAGES, MASK, clip_eps_low=1.0, clip_eps_high=1.0, dual_clip_ratio=None)
    np.testing.assert_allclose(x[MASK], PLAIN, atol=1e-6)
    assert token_mean(x) == pytest.approx(-0.861663, abs=1e-6)


def test_clip_cov_drops_the_one_candidate():
    # 1 < c < 5 holds for the first token alone (5.4 is out); max(floor(2e-4 * 5), 1) = 1 token is dropped and stays in
    # the denominator: (-4.308315 + 2.210342) / 5. Its gradient is exactly 0, the others' are those of PPO.
    x, metrics = clip(LOGPROBS, low=1.0)
    np.testing.assert_allclose(x[MASK], [0.0, *PLAIN[1:]], atol=1e-6)
    assert token_mean(x) == pytest.approx(-0.419595, abs=1e-6)
    grad = gradient(clip, low=1.0)
    assert float(grad[0]) == 0.0
    np.testing.assert_allclose(grad, [0.0, *PLAIN[1:]], atol=1e-6)
    assert float(metrics["clip_cov/fraction"]) == pytest.approx(0.2)
    assert float(metrics["clip_cov/candidate_fraction"]) == pytest.approx(0.2)
    # (1.08 + 0.96 + 0.84 + 5.4 - 1.08) / 5
    assert float(metrics["clip_cov/covariance_mean"]) == pytest.approx(1.44)


def test_clip_cov_budget():
    # 0.9 < c < 5: two candidates. floor(0.5 * 5) = 2 takes both; floor(1 * 5) = 5 takes both and no more.
    for ratio in (0.5, 1.0):
        np.testing.assert_allclose(clip(LOGPROBS, low=0.9, ratio=ratio)[0][MASK], [0, 0, *PLAIN[2:]], atol=1e-6)


def test_clip_cov_without_a_candidate_is_ppo():
    np.testing.assert_allclose(clip(LOGPROBS, low=4.0)[0][MASK], PLAIN, atol=1e-6)


def test_clip_cov_bounds_are_strict():
    # lp -1 -3 and A 1 -1: means -2 and 0, c = 1 and 1, exact in binary. 1 < c is false, c < 1 is false.
    args = jnp.array([[-1.0, -3.0]]), jnp.array([[-1.0, -3.0]]), jnp.array([[1.0, -1.0]]), jnp.ones((1, 2), bool)
    for low, high, dropped in ((1.0, 5.0, 0), (0.5, 1.0, 0), (0.5, 1.5, 2)):
        x, _ = clip_cov.objective(
            *args,
            jax.random.key(0),
            clip_eps_low=1.0,
            clip_eps_high=1.0,
            clip_cov_ratio=1.0,
            clip_cov_low=low,
            clip_cov_high=high,
        )
        assert int((x == 0).sum()) == dropped


def test_clip_cov_never_takes_what_ppo_clips():
    # eps 0.05: the first token's ratio 1.105 exceeds 1.05, so PPO has it (loss -2 * 1.05) and no candidate is left.
    x, metrics = clip(LOGPROBS, low=1.0, eps=0.05)
    assert float(x[0, 0]) == pytest.approx(-2.1)
    assert float(metrics["clip_cov/candidate_fraction"]) == 0.0


def test_clip_cov_chooses_uniformly():
    # Three candidates (c > 0.8), one is dropped: each by a third of the keys. 300 keys, standard error 8.2.
    x = jax.vmap(lambda seed: clip(LOGPROBS, low=0.8, seed=seed)[0])(jnp.arange(300))
    dropped = (x[:, 0] == 0).sum(0)
    assert int(dropped.sum()) == 300
    np.testing.assert_allclose(dropped, 100, atol=30)


def test_kl_cov_penalises_the_top_token():
    # max(floor(2e-3 * 5), 1) = 1: the token of c = 5.4 pays beta |-4 + 3.5| = 0.5 beta: (-4.308315 + 0.5) / 5.
    x, metrics = kl(LOGPROBS)
    assert token_mean(x) == pytest.approx(-0.761663, abs=1e-6)
    assert token_mean(kl(LOGPROBS, coef=0.1)[0]) == pytest.approx(-0.851663, abs=1e-6)
    # Its gradient: ratio + beta sign(lp - old) = 0.606531 - 1.
    np.testing.assert_allclose(gradient(kl), [*PLAIN[:3], -0.393469, PLAIN[4]], atol=1e-6)
    assert float(metrics["kl_cov/fraction"]) == pytest.approx(0.2)
    assert float(metrics["kl_cov/penalised_gap"]) == pytest.approx(0.5)


def test_kl_cov_takes_the_largest():
    # floor(0.4 * 5) = 2: c = 5.4 and 1.08 pay 0.5 and 0.1: (-4.308315 + 0.6) / 5.
    assert token_mean(kl(LOGPROBS, ratio=0.4)[0]) == pytest.approx(-0.741663, abs=1e-6)


def test_kl_cov_is_not_clipped():
    # Ratio e^3 = 20.085537 at A = 2: the loss is -40.171074 where PPO would stop at -2.4, and the gradient as much.
    old = LOGPROBS.at[0, 1].add(-3.0)
    x, _ = kl(LOGPROBS, old=old)
    assert float(x[0, 1]) == pytest.approx(-40.171074, rel=1e-6)


def test_kl_cov_on_policy_has_no_penalty():
    # lp = old: |log ratio| = 0 and so is its gradient; what remains is -A.
    grad = gradient(kl, old=LOGPROBS, coef=1e6)
    np.testing.assert_array_equal(grad, -ADVANTAGES[MASK])

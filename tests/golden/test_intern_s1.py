"""Intern-S1's objective by hand (arXiv:2508.15763)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_reason.aggregation import aggregate, token_set
from rl_reason.methods import intern_s1

pytestmark = pytest.mark.usefixtures("no_rank_promotion")

# Four completions of one prompt, two right; RLOO of +-1 is 4/3 R. Log ratios 0.1 -0.1 | 0 0.2 0 | -0.5 0 | 0.1.
LOGPROBS = jnp.array([[-0.5, -1.0, 0.0], [-0.2, -0.4, -0.6], [-2.5, -2.0, 0.0], [-0.3, 0.0, 0.0]])
OLD = jnp.array([[-0.6, -0.9, 0.0], [-0.2, -0.6, -0.6], [-2.0, -2.0, 0.0], [-0.4, 0.0, 0.0]])
MASK = jnp.arange(3) < jnp.array([2, 3, 2, 1])[:, None]
REWARDS = jnp.array([1.0, 1.0, -1.0, -1.0])
ADVANTAGES = jnp.where(MASK, 4 / 3 * REWARDS[:, None], 0.0)
RIGHT = MASK & (REWARDS > 0)[:, None]
WRONG = MASK & ~RIGHT
OVER = {"positive": "positive", "negative": "negative", "kl_cov": "completion"}


def run(logprobs=LOGPROBS, old=OLD, ratio=0.25, wrong="one", mask=MASK, rewards=REWARDS):
    return intern_s1.objective(logprobs, old, ADVANTAGES, rewards, mask, wrong_ratio=wrong, kl_cov_ratio=ratio)


def reduced(logprobs=LOGPROBS, coef=1.0, rewards=REWARDS, **kwargs):
    terms, _ = run(logprobs, rewards=rewards, **kwargs)
    over = lambda name: token_set(OVER[name], MASK, rewards, jnp.zeros(4, bool))
    return {name: coef * aggregate(x, over(name), "token_mean") for name, x in terms.items()}


def test_the_three_terms():
    # Positive: (0.5 + 1 + 0.2 + 0.4 + 0.6) / 5 = 0.54, without the advantage. Negative: 4/3 on each of three tokens.
    # Covariance: mean A = 4/3 (5 - 3) / 8 = 1/3, mean lp = -7.5 / 8 = -0.9375. A right token has 1 (lp + 0.9375):
    # 0.4375 -0.0625 | 0.7375 0.5375 0.3375, a wrong one -5/3 (lp + 0.9375): 2.604167 1.770833 | -1.0625.
    # floor(0.25 * 8) = 2 tokens pay: |-0.5| and |0|. (0.5 + 0) / 8 = 0.0625.
    got = reduced()
    assert float(got["positive"]) == pytest.approx(0.54, abs=1e-6)
    assert float(got["negative"]) == pytest.approx(4 / 3, abs=1e-6)
    assert float(got["kl_cov"]) == pytest.approx(0.0625, abs=1e-6)
    _, metrics = run()
    assert float(metrics["intern_s1/positive_fraction"]) == pytest.approx(5 / 8)
    assert float(metrics["kl_cov/fraction"]) == pytest.approx(2 / 8)
    assert float(metrics["kl_cov/penalised_gap"]) == pytest.approx(0.25)
    # mean old - new: (-0.1 + 0.1 - 0.2 + 0.5 - 0.1) / 8
    assert float(metrics["actor/ppo_kl"]) == pytest.approx(0.025)


def test_the_old_ratio():
    # exp of -0.5, 0 and 0.1 is 0.606531, 1, 1.105171: 4/3 * 2.711702 / 3 = 1.205201. The gradient is 4/9 of each.
    got = reduced(wrong="old")
    assert float(got["negative"]) == pytest.approx(1.205201, abs=1e-6)
    grad = jax.grad(lambda lp: reduced(lp, wrong="old")["negative"])(LOGPROBS)
    np.testing.assert_allclose(grad[WRONG], 4 / 9 * np.array([0.606531, 1.0, 1.105171]), atol=1e-6)


def test_gradients():
    # Positive: -1/5 on each right token. Negative: 4/3 / 3 on each wrong one. KL-Cov: sign(-0.5) / 8 on one token; the
    # other one chosen has a ratio of 1, where the slope is 0.
    grads = {name: jax.grad(lambda lp, n=name: reduced(lp)[n])(LOGPROBS) for name in OVER}
    np.testing.assert_allclose(grads["positive"], np.where(RIGHT, -1 / 5, 0), atol=1e-6)
    np.testing.assert_allclose(grads["negative"], np.where(WRONG, 4 / 9, 0), atol=1e-6)
    np.testing.assert_allclose(grads["kl_cov"], np.zeros((4, 3)) + np.eye(4, 3, -2) * [-1 / 8, 0, 0], atol=1e-6)


def test_the_first_update_of_a_step_has_no_penalty():
    # old = lp: exactly 0, whatever the coefficient; so a run with one update a step would not know of KL-Cov.
    for ratio in (2e-3, 0.2, 1.0):
        grad = jax.grad(lambda lp, r=ratio: reduced(lp, coef=1e6, old=LOGPROBS, ratio=r)["kl_cov"])(LOGPROBS)
        np.testing.assert_array_equal(grad, 0.0)


def test_the_share_as_percent_and_as_fraction():
    # The paper's k = 0.2 of 8192 tokens is 16 if it is a percentage, as in KL-Cov's code, and 1638 if it is a fraction.
    rng = np.random.default_rng(0)
    lp, advantages = jnp.asarray(-rng.exponential(size=(8, 1024))), jnp.asarray(rng.normal(size=(8, 1024)))
    for ratio, count in ((0.002, 16), (0.2, 1638)):
        _, metrics = intern_s1.objective(
            lp, lp, advantages, jnp.ones(8), jnp.ones((8, 1024), bool), wrong_ratio="one", kl_cov_ratio=ratio
        )
        assert round(float(metrics["kl_cov/fraction"]) * 8192) == count


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_one_side_alone(sign):
    # All right or all wrong: the other term is 0 with a gradient of 0, not 0 / 0.
    rewards = sign * jnp.ones(4)
    empty = "negative" if sign > 0 else "positive"
    value, grad = jax.value_and_grad(lambda lp: reduced(lp, rewards=rewards)[empty])(LOGPROBS)
    assert float(value) == 0.0
    np.testing.assert_array_equal(grad, 0.0)


def test_a_reward_of_zero_is_a_failure():
    terms, _ = run(rewards=jnp.array([1.0, 0.0, -1.0, -1.0]))
    assert float(terms["positive"][1].sum()) == 0.0 and float(jnp.abs(terms["negative"][1]).sum()) > 0


def test_refuses_an_unknown_ratio():
    with pytest.raises(ValueError, match="there are one, old"):
        run(wrong="new")

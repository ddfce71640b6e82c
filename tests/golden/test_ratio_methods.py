"""GSPO (arXiv:2507.18071) and CISPO (arXiv:2506.13585) by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_reason.aggregation import aggregate
from rl_reason.methods import cispo, gspo

pytestmark = pytest.mark.usefixtures("no_rank_promotion")

# B1: log ratios 0.2 -0.4 0.5 | -0.1 0.5, their means 0.1 and 0.2; ratios 1.221403 0.670320 1.648721 | 0.904837 1.648721.
OLD = jnp.array([[-1.0, -0.5, -2.0], [-0.3, -1.2, jnp.nan]])
LOGPROBS = jnp.array([[-0.8, -0.9, -1.5], [-0.4, -0.7, jnp.nan]])
ADVANTAGES = jnp.array([[1.0, 1.0, 1.0], [-0.5, -0.5, -0.5]])
MASK = jnp.array([[True, True, True], [True, True, False]])


def run(module, logprobs=LOGPROBS, advantages=ADVANTAGES, old=OLD, **clip):
    """(losses, gradient of their sum, metrics), on the valid tokens."""
    losses, metrics = module.objective(logprobs, old, advantages, MASK, **clip)
    total = lambda lp: jnp.where(MASK, module.objective(lp, old, advantages, MASK, **clip)[0], 0.0).sum()
    return losses[MASK], jax.grad(total)(logprobs)[MASK], metrics


def test_gspo_has_one_ratio_a_row():
    # s = e^0.1 = 1.105171 and e^0.2 = 1.221403, inside [0.8, 1.28]: -A s a token, and the same its gradient.
    want = [-1.105171] * 3 + [0.610701] * 2
    losses, grad, metrics = run(gspo, clip_eps_low=0.2, clip_eps_high=0.28)
    np.testing.assert_allclose(losses, want, atol=1e-6)
    np.testing.assert_allclose(grad, want, atol=1e-6)
    # (-1.105171 + 0.610701) / 2 rows
    whole, _ = gspo.objective(LOGPROBS, OLD, ADVANTAGES, MASK, clip_eps_low=0.2, clip_eps_high=0.28)
    assert float(aggregate(whole, MASK, "seq_mean_token_mean")) == pytest.approx(-0.247235, abs=1e-6)
    assert float(metrics["actor/pg_clipfrac"]) == 0.0
    assert float(metrics["actor/ppo_kl"]) == pytest.approx(-0.14)  # mean of old - new over tokens, as everywhere


def test_gspo_clips_a_row_as_a_whole():
    # eps 0.05: the right row stops at 1.05 with no gradient at all; the wrong one rose, and is pushed down unclipped.
    losses, grad, metrics = run(gspo, clip_eps_low=0.05, clip_eps_high=0.05)
    np.testing.assert_allclose(losses, [-1.05] * 3 + [0.610701] * 2, atol=1e-6)
    np.testing.assert_array_equal(grad[:3], 0.0)
    np.testing.assert_allclose(grad[3:], 0.610701, atol=1e-6)
    assert float(metrics["actor/pg_clipfrac"]) == pytest.approx(3 / 5)


def test_gspo_caps_the_log_ratio_at_ten():
    # 12 nats above: a wrong token's loss is 0.5 e^10 = 11013.23, and it has no gradient.
    losses, grad, _ = run(gspo, logprobs=OLD + 12, clip_eps_low=0.2, clip_eps_high=0.28)
    np.testing.assert_allclose(losses[3:], 11013.2329, rtol=1e-6)
    np.testing.assert_array_equal(grad, 0.0)


def test_cispo_bounds_the_weight_and_keeps_the_gradient():
    # weights 1.2 0.670320 1.2 | 0.904837 1.2 times -A l:
    # 1.2 * 0.8, 0.670320 * 0.9, 1.2 * 1.5 | -0.5 * 0.904837 * 0.4, -0.5 * 1.2 * 0.7.
    losses, grad, metrics = run(cispo, clip_eps_low=None, clip_eps_high=0.2)
    np.testing.assert_allclose(losses, [0.96, 0.603288, 1.8, -0.180967, -0.42], atol=1e-6)
    np.testing.assert_allclose(grad, [-1.2, -0.670320, -1.2, 0.452419, 0.6], atol=1e-6)  # -A weight: none is 0
    assert float(metrics["actor/pg_clipfrac"]) == pytest.approx(3 / 5)
    assert float(metrics["actor/ppo_kl"]) == pytest.approx(-0.14)


def test_cispo_with_a_lower_bound():
    # 0.670320 becomes 0.8: loss 0.8 * 0.9, gradient -0.8; no other weight is below 0.8.
    losses, grad, metrics = run(cispo, clip_eps_low=0.2, clip_eps_high=0.2)
    np.testing.assert_allclose(losses, [0.96, 0.72, 1.8, -0.180967, -0.42], atol=1e-6)
    np.testing.assert_allclose(grad, [-1.2, -0.8, -1.2, 0.452419, 0.6], atol=1e-6)
    assert float(metrics["actor/pg_clipfrac"]) == pytest.approx(4 / 5)


@pytest.mark.parametrize(
    "module, clip",
    [(gspo, dict(clip_eps_low=3e-4, clip_eps_high=4e-4)), (cispo, dict(clip_eps_low=None, clip_eps_high=0.0))],
)
def test_on_policy_gradient_is_minus_the_advantage(module, clip):
    _, grad, metrics = run(module, logprobs=OLD, **clip)
    np.testing.assert_array_equal(grad, -ADVANTAGES[MASK])
    assert float(metrics["actor/pg_clipfrac"]) == 0.0


def test_an_empty_row_has_ratio_one():
    nothing = jnp.zeros((1, 3), bool)
    row = lambda x: x[:1]
    losses, metrics = gspo.objective(
        row(LOGPROBS), row(OLD), row(ADVANTAGES), nothing, clip_eps_low=0.2, clip_eps_high=0.2
    )
    np.testing.assert_array_equal(losses, -1.0)  # masked afterwards, and finite until then
    assert all(np.isfinite(value) for value in metrics.values())

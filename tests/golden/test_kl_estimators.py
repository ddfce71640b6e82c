"""KL estimators and regularisers by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_reason.loop.update import Minibatch, loss_of_scores
from rl_reason.models.score import Scores
from rl_reason.policy import kl_estimate
from tests.support import tiny_parts

pytestmark = pytest.mark.usefixtures("no_rank_promotion")


@pytest.mark.parametrize(
    "estimator, value, slope",
    [  # lp = -1, ref = -1.5: d = 0.5
        ("k1", 0.5, 1.0),  # d; 1
        ("k2", 0.125, 0.5),  # d^2 / 2; d
        ("k3", 0.106531, 0.393469),  # e^-0.5 + 0.5 - 1 = 0.606531 - 0.5; 1 - e^-0.5
    ],
)
def test_value_and_gradient(estimator, value, slope):
    got, grad = jax.value_and_grad(lambda lp: kl_estimate(lp, jnp.array([[-1.5]]), estimator).sum())(
        jnp.array([[-1.0]])
    )
    assert float(got) == pytest.approx(value, abs=1e-6)
    assert float(grad[0, 0]) == pytest.approx(slope, abs=1e-6)


def test_equal_policies_are_at_distance_zero():
    lp = jnp.array([[-1.0, -3.0]])
    for estimator in ("k1", "k2", "k3"):
        np.testing.assert_array_equal(kl_estimate(lp, lp, estimator), 0.0)


def test_k3_is_bounded():
    # d = -100: e^100 overflows fp32; the exponent stops at 20 and the value at 10.
    np.testing.assert_array_equal(kl_estimate(jnp.array([[-100.0]]), jnp.array([[0.0]]), "k3"), 10.0)


def test_unknown_estimator():
    with pytest.raises(ValueError, match="k1, k2 and k3"):
        kl_estimate(jnp.zeros((1, 1)), jnp.zeros((1, 1)), "k4")


def test_regularised_loss():
    # Two tokens with A = 0: lp -1 and -2 against ref -1.5 and -2 give k3 0.106531 and 0, token mean 0.053266;
    # entropies 0.5 and 1.5 have mean 1. Loss = 0 + 0.1 * 0.053266 - 0.01 * 1 = -0.004673.
    column = jnp.array([[-1.0], [-2.0]])
    mask, row = jnp.ones((2, 1), bool), jnp.zeros(2)
    batch = Minibatch(
        tokens=jnp.zeros((2, 1), jnp.int32),
        prompt_len=jnp.zeros(2, jnp.int32),
        row_mask=mask,
        completion_mask=mask,
        rollout_logprobs=column,
        advantages=jnp.zeros((2, 1)),
        rewards=row,
        correct=row,
        success_rate=row,
        off_policy=row > 0,
        old_logprobs=None,
        ref_logprobs=jnp.array([[-1.5], [-2.0]]),
    )
    regularisers = dict(
        kl=dict(estimator="k3", coef=0.1, how="token_mean", divisor=1.0),
        entropy=dict(coef=0.01, how="token_mean", divisor=1.0),
    )
    parts = dataclasses.replace(tiny_parts("base"), regularisers=regularisers)
    scores = Scores(logprobs=column, entropy=jnp.array([[0.5], [1.5]]), router=None)
    (loss, metrics), cotangent = jax.value_and_grad(
        lambda scores: loss_of_scores(parts, scores, batch, jax.random.key(0)), has_aux=True
    )(scores)
    assert float(loss) == pytest.approx(-0.004673, abs=1e-6)
    assert float(metrics["actor/kl_loss"]) == pytest.approx(0.053266, abs=1e-6)
    assert float(metrics["actor/entropy_loss"]) == pytest.approx(1.0)
    # Slopes: 0.1 (1 - e^-0.5) / 2 and 0 for the log-probabilities, -0.01 / 2 for each entropy.
    np.testing.assert_allclose(cotangent.logprobs, [[0.019673], [0.0]], atol=1e-6)
    np.testing.assert_allclose(cotangent.entropy, [[-0.005], [-0.005]], atol=1e-8)

"""KL estimators and regularisers by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_reason.policy import kl_estimate

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

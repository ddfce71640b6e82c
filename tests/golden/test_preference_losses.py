"""The preference model's loss by hand (POLAR, arXiv:2507.05197)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_reason.models.reward_head import preference_losses


def loss(better, worse, gamma=0.0):
    return float(preference_losses(jnp.array([better]), jnp.array([worse]), gamma)[0])


def test_bradley_terry():
    # log(1 + e^-d): d = 1, 0, -1 and 10.4601.
    assert loss(1.0, 0.0) == pytest.approx(0.313262, abs=1e-6)
    assert loss(2.0, 2.0) == pytest.approx(0.693147, abs=1e-6)
    assert loss(0.0, 1.0) == pytest.approx(1.313262, abs=1e-6)
    assert loss(-0.5703, -11.0304) == pytest.approx(0.000029, abs=1e-6)


def test_focal():
    # sigmoid(1) = 0.731059: (1 - 2 * 0.231059)^2 = 0.289317 of 0.313262. A pair told wrongly counts in full.
    assert loss(1.0, 0.0, 2.0) == pytest.approx(0.090632, abs=1e-6)
    assert loss(0.0, 1.0, 2.0) == pytest.approx(1.313262, abs=1e-6)


def test_slopes():
    # d/d better = -(1 - sigmoid(d)) = -0.268941 at d = 1, and the opposite for worse; finite far out.
    grad = jax.grad(lambda b, w: preference_losses(b, w, 0.0).sum(), (0, 1))(jnp.array([1.0]), jnp.array([0.0]))
    np.testing.assert_allclose(np.concatenate(grad), [-0.268941, 0.268941], atol=1e-6)
    far = jax.grad(lambda b: preference_losses(b, -b, 2.0).sum())(jnp.array([-300.0, 0.0, 300.0]))
    assert bool(jnp.isfinite(far).all())

"""Reductions over what is valid."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_reason.masked import masked_mean, masked_sum

pytestmark = pytest.mark.usefixtures("no_rank_promotion")

X = jnp.array([[1.0, 2.0, jnp.nan], [4.0, jnp.inf, -jnp.inf], [jnp.nan, jnp.nan, jnp.nan]])
MASK = jnp.array([[True, True, False], [True, False, False], [False, False, False]])


def test_by_hand():
    assert float(masked_sum(X, MASK)) == 7.0
    assert float(masked_mean(X, MASK)) == pytest.approx(7 / 3)
    np.testing.assert_array_equal(masked_sum(X, MASK, axis=1), [3, 4, 0])
    np.testing.assert_array_equal(masked_mean(X, MASK, axis=1), [1.5, 4, 0])
    np.testing.assert_array_equal(masked_mean(X, MASK, axis=0), [2.5, 2, 0])


def test_nothing_valid_gives_zero_and_zero_gradient():
    value, grad = jax.value_and_grad(lambda x: masked_mean(x, jnp.zeros_like(MASK)))(X)
    assert float(value) == 0.0
    np.testing.assert_array_equal(grad, 0.0)


def test_gradient_is_blind_to_what_is_masked():
    np.testing.assert_allclose(jax.grad(lambda x: masked_mean(x, MASK))(X), MASK / 3)

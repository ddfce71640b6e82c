"""Bounded importance weights by hand: truncated or masked, a token or a completion at a time."""

import jax.numpy as jnp
import numpy as np
import pytest

from rl_reason.methods import importance

pytestmark = pytest.mark.usefixtures("no_rank_promotion")

# old / rollout is 2 0.5 3 | 4 1 -, over the completions 3 and 4; a demonstration; an empty row.
RATIO = np.array([[2, 0.5, 3], [4, 1, np.nan], [9, 9, 9], [7, 7, 7]])
MASK = jnp.array([[1, 1, 1], [1, 1, 0], [1, 1, 1], [0, 0, 0]], bool)
OFF_POLICY = jnp.array([False, False, True, False])
ROLLOUT = jnp.full((4, 3), -2.0)
OLD = ROLLOUT + jnp.log(jnp.asarray(RATIO, jnp.float32))
ONES = [1, 1, 1]


@pytest.mark.parametrize(
    "fn, max_weight, want",
    [
        (importance.truncate, 2.5, [[2, 0.5, 2.5], [2.5, 1, 1]]),
        (importance.mask_out, 2.5, [[2, 0.5, 0], [0, 1, 1]]),
        (importance.truncate_sequence, 3.5, [[3, 3, 3], [3.5, 3.5, 1]]),
        (importance.mask_out_sequence, 3.5, [[3, 3, 3], [0, 0, 1]]),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_weights(fn, max_weight, want):
    got = fn(OLD, ROLLOUT, OFF_POLICY, MASK, max_weight=max_weight)
    np.testing.assert_allclose(got, [*want, ONES, ONES], rtol=1e-6)
    # One policy: exactly 1, at the bound too.
    np.testing.assert_array_equal(fn(ROLLOUT, ROLLOUT, OFF_POLICY, MASK, max_weight=1.0), 1.0)
    with pytest.raises(ValueError, match=r"max_weight=0\.0 must be above 0"):
        fn(OLD, ROLLOUT, OFF_POLICY, MASK, max_weight=0.0)


def test_long_rows_stay_finite():
    # 3 * 50 nats: the sum, and not each token, stops at 20. Far below it is e^-20, which no bound touches.
    far = jnp.full((4, 3), 50.0)
    up = importance.truncate_sequence(ROLLOUT + far, ROLLOUT, OFF_POLICY, MASK, max_weight=1e30)
    np.testing.assert_allclose(up[0], np.exp(20.0), rtol=1e-6)
    down = importance.mask_out_sequence(ROLLOUT - far, ROLLOUT, OFF_POLICY, MASK, max_weight=2.0)
    np.testing.assert_allclose(down[0], np.exp(-20.0), rtol=1e-5)
    two_tokens = importance.truncate_sequence(
        ROLLOUT + jnp.array([[15.0, 15.0, -20.0]]), ROLLOUT, OFF_POLICY, MASK, max_weight=1e30
    )
    np.testing.assert_allclose(two_tokens[0], np.exp(10.0), rtol=1e-5)  # 15 + 15 - 20

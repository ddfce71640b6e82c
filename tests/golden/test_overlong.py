"""DAPO's soft overlong punishment by hand (arXiv:2503.14476, eq. 13)."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from rl_reason.methods import overlong
from rl_reason.types import Rollout

pytestmark = pytest.mark.usefixtures("no_rank_promotion")

LENGTH = np.array([0, 5, 6, 7, 8, 10, 12])
PENALTY = [0, 0, 0, -0.25, -0.5, -1, -1.5]  # -(L - 6) / 4 from 6 tokens on
shaped = functools.partial(overlong.reward, right=1.0, wrong=-1.0, max_len_tokens=10, buffer_len_tokens=4)


def rollout():
    column = np.arange(14) - 2  # a prompt of two tokens
    mask = jnp.asarray((column >= 0) & (column < LENGTH[:, None]))
    rows = jnp.zeros(len(LENGTH), jnp.int32)
    logprobs = jnp.zeros(mask.shape)
    return Rollout(
        tokens=jnp.zeros(mask.shape, jnp.int32),
        prompt_len=rows + 2,
        completion_mask=mask,
        rollout_logprobs=logprobs,
        sampled_logprobs=logprobs,
        prompt_id=rows,
        truncated=rows > 0,
        off_policy=rows > 0,
    )


def test_penalty():
    score = jnp.array([1.0, 1, 1, 1, 0, 0, 1])
    valid = jnp.ones(7, bool)
    rewards = shaped(score, valid, rollout(), penalty_factor=1.0)
    # The verdict is 1 or -1, and the rest is length.
    np.testing.assert_allclose(rewards.total, np.array([1, 1, 1, 1, -1, -1, 1]) + PENALTY)
    np.testing.assert_array_equal(rewards.correct, score)  # unshaped
    np.testing.assert_allclose(rewards.parts["overlong"], PENALTY)
    np.testing.assert_array_equal(rewards.valid, valid)
    half = shaped(score, valid, rollout(), penalty_factor=0.5)
    np.testing.assert_allclose(half.parts["overlong"], np.array(PENALTY) / 2)
    none = shaped(score, valid, rollout(), penalty_factor=0.0)
    np.testing.assert_array_equal(none.total, [1, 1, 1, 1, -1, -1, 1])


def test_a_failed_verifier_is_no_verdict():
    rewards = shaped(jnp.full(7, jnp.nan), jnp.zeros(7, bool), rollout(), penalty_factor=1.0)
    np.testing.assert_allclose(rewards.total, np.array(PENALTY) - 1)
    np.testing.assert_array_equal(rewards.correct, 0.0)
    assert not bool(rewards.valid.any())


@pytest.mark.parametrize(
    "changes, says",
    [
        (dict(buffer_len_tokens=0), "buffer_len_tokens=0, max_len_tokens=10: want 0 < buffer <= max"),
        (dict(buffer_len_tokens=11), "buffer_len_tokens=11, max_len_tokens=10"),
        (dict(penalty_factor=-1.0), r"penalty_factor=-1\.0 would reward length"),
    ],
)
def test_refuses(changes, says):
    with pytest.raises(ValueError, match=says):
        shaped(jnp.ones(7), jnp.ones(7, bool), rollout(), **dict(penalty_factor=1.0) | changes)

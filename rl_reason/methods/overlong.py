"""DAPO's soft overlong punishment: the longer a completion exceeds the expected length, the less it earns
(arXiv:2503.14476, section 3.4, eq. 13)."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rl_reason.policy import verdict_rewards
from rl_reason.types import Rewards, Rollout


def reward(
    score: Float[Array, " N"],
    valid: Bool[Array, " N"],
    rollout: Rollout,
    *,
    right: float,
    wrong: float,
    max_len_tokens: int,
    buffer_len_tokens: int,
    penalty_factor: float,
) -> Rewards:
    """The verdict's reward + min(-(L - (max_len - buffer_len)) / buffer_len * factor, 0), L the completion's tokens.

    The penalty starts at max_len - buffer_len tokens and is ``penalty_factor`` at max_len; ``correct`` stays unshaped.
    Logged as ``reward/overlong``.

    Raises:
        ValueError: a buffer that is empty or longer than the limit, or a negative factor.
    """
    if not 0 < buffer_len_tokens <= max_len_tokens:
        raise ValueError(
            f"buffer_len_tokens={buffer_len_tokens}, max_len_tokens={max_len_tokens}: want 0 < buffer <= max; max is "
            "config.rollout.completion_len, or less."
        )
    if penalty_factor < 0:
        raise ValueError(f"penalty_factor={penalty_factor} would reward length; DAPO has 1.")
    rewards = verdict_rewards(score, valid, right, wrong)
    length = rollout.completion_mask.sum(1).astype(rewards.total.dtype)
    exceeded = length - (max_len_tokens - buffer_len_tokens)
    penalty = jnp.minimum(-exceeded / buffer_len_tokens * penalty_factor, 0.0)
    return Rewards(
        total=rewards.total + penalty, correct=rewards.correct, parts={"overlong": penalty}, valid=rewards.valid
    )

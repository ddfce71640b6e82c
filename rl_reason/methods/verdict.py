"""The verifier's verdict as reward: outcome supervision with nothing added."""

from jaxtyping import Array, Bool, Float

from rl_reason.policy import verdict_rewards
from rl_reason.types import Rewards


def reward(score: Float[Array, " N"], valid: Bool[Array, " N"], *, right: float, wrong: float) -> Rewards:
    """wrong + (right - wrong) * score; ``correct`` is whether the score is full. Invalid rows get ``wrong`` and no say."""
    return verdict_rewards(score, valid, right, wrong)

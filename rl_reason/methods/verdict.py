"""The verifier's verdict as reward: outcome supervision with nothing added."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rl_reason.types import Rewards


def reward(score: Float[Array, " N"], valid: Bool[Array, " N"], *, right: float, wrong: float) -> Rewards:
    """wrong + (right - wrong) * score; ``correct`` is whether the score is full. Invalid rows get ``wrong`` and no say."""
    score = jnp.where(valid, score, 0.0)
    return Rewards(total=wrong + (right - wrong) * score, correct=(score >= 1.0).astype(score.dtype), valid=valid)

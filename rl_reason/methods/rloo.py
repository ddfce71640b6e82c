"""RLOO: REINFORCE with the group's other samples as baseline (arXiv:2402.14740)."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rl_reason.policy import group_centred


def advantages(rewards: Float[Array, "B G"], valid: Bool[Array, "B G"]) -> Float[Array, "B G"]:
    """R_i - mean_{j != i} R_j = n / (n - 1) (R_i - mean R), over the n valid samples of each group.

    Exactly 0 where all valid rewards are equal and for invalid rows. A group with one valid sample has no baseline and
    gets 0, where verl gives it its raw reward.

    >>> import jax.numpy as jnp
    >>> advantages(jnp.array([[3.0, 0.0]]), jnp.ones((1, 2), bool)).tolist()
    [[3.0, -3.0]]
    """
    centred, count, _ = group_centred(rewards, valid)
    return centred * count / jnp.maximum(count - 1, 1)

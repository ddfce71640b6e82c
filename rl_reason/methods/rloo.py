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


def sampled_advantages(
    rewards: Float[Array, "B G"],
    valid: Bool[Array, "B G"],
    sampled_mean: Float[Array, "B G"],
    sampled_count: Float[Array, "B G"],
) -> Float[Array, "B G"]:
    """The same with the baseline of all samples of the prompt, those included that selection left out (OREAL's order).

    0 for rows that are not valid and where one sample was all there was. Where all samples are equal, rounding of the mean
    may leave a trace; a selection that drops such groups comes before this.
    """
    others = sampled_count / jnp.maximum(sampled_count - 1, 1)
    return jnp.where(valid & (sampled_count > 1), (rewards - sampled_mean) * others, 0.0)

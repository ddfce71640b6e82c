"""Weights for samples that another policy drew: truncated importance sampling on the sampler's log-probabilities."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rl_reason.policy import probability_ratio


def truncate(
    old_logprobs: Float[Array, "N T"],
    rollout_logprobs: Float[Array, "N T"],
    off_policy: Bool[Array, " N"],
    completion_mask: Bool[Array, "N T"],
    *,
    max_weight: float,
) -> Float[Array, "N T"]:
    """min(exp(old - rollout), max_weight) a token; 1 for demonstrations and off the completion.

    ``old_logprobs`` are the trainer's before the step, ``rollout_logprobs`` the sampler's; on one set of weights they
    differ by rounding alone, and by an update more when rollouts overlap with scoring.
    """
    weight = jnp.minimum(probability_ratio(old_logprobs, rollout_logprobs), max_weight)
    return jnp.where(completion_mask & ~off_policy[:, None], weight, 1.0)

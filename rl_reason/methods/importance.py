"""Weights for samples that another policy drew: importance sampling on the sampler's log-probabilities, bounded.

Two ways to bound a weight, each a token at a time or for the completion as a whole. All four give 1 for demonstrations
(rows that are off policy by nature) and off the completion. ``old_logprobs`` are the trainer's before the step,
``rollout_logprobs`` the sampler's; on one set of weights they differ by rounding alone, and by an update more when
rollouts overlap with scoring. Log-ratios are clamped to +-20 nats, a completion's after the sum (verl's guard).
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rl_reason.masked import masked_sum
from rl_reason.policy import probability_ratio


def truncate(
    old_logprobs: Float[Array, "N T"],
    rollout_logprobs: Float[Array, "N T"],
    off_policy: Bool[Array, " N"],
    completion_mask: Bool[Array, "N T"],
    *,
    max_weight: float,
) -> Float[Array, "N T"]:
    """min(w, max_weight) a token, w = exp(old - rollout).

    Raises:
        ValueError: a max_weight that is not above 0; so do the other three.
    """
    weight = probability_ratio(old_logprobs, rollout_logprobs)
    return _on_policy(_at_most(weight, max_weight), off_policy, completion_mask)


def mask_out(
    old_logprobs: Float[Array, "N T"],
    rollout_logprobs: Float[Array, "N T"],
    off_policy: Bool[Array, " N"],
    completion_mask: Bool[Array, "N T"],
    *,
    max_weight: float,
) -> Float[Array, "N T"]:
    """w a token, or 0 where w > max_weight: such a token teaches nothing, and stays in the denominators."""
    weight = probability_ratio(old_logprobs, rollout_logprobs)
    return _on_policy(_none_above(weight, max_weight), off_policy, completion_mask)


def truncate_sequence(
    old_logprobs: Float[Array, "N T"],
    rollout_logprobs: Float[Array, "N T"],
    off_policy: Bool[Array, " N"],
    completion_mask: Bool[Array, "N T"],
    *,
    max_weight: float,
) -> Float[Array, "N T"]:
    """min(w, max_weight) with one w a completion, exp(sum_t (old - rollout))."""
    weight = _sequence_ratio(old_logprobs, rollout_logprobs, completion_mask)
    return _on_policy(_at_most(weight, max_weight), off_policy, completion_mask)


def mask_out_sequence(
    old_logprobs: Float[Array, "N T"],
    rollout_logprobs: Float[Array, "N T"],
    off_policy: Bool[Array, " N"],
    completion_mask: Bool[Array, "N T"],
    *,
    max_weight: float,
) -> Float[Array, "N T"]:
    """w, one a completion, or 0 for the whole completion where w > max_weight."""
    weight = _sequence_ratio(old_logprobs, rollout_logprobs, completion_mask)
    return _on_policy(_none_above(weight, max_weight), off_policy, completion_mask)


def _sequence_ratio(
    old_logprobs: Float[Array, "N T"], rollout_logprobs: Float[Array, "N T"], completion_mask: Bool[Array, "N T"]
) -> Float[Array, "N T"]:
    total = masked_sum(old_logprobs - rollout_logprobs, completion_mask, axis=1)[:, None]
    return jnp.broadcast_to(probability_ratio(total, jnp.zeros_like(total)), completion_mask.shape)


def _at_most(weight: Float[Array, "N T"], max_weight: float) -> Float[Array, "N T"]:
    return jnp.minimum(weight, _bound(max_weight))


def _none_above(weight: Float[Array, "N T"], max_weight: float) -> Float[Array, "N T"]:
    return jnp.where(weight > _bound(max_weight), 0.0, weight)


def _bound(max_weight: float) -> float:
    if not max_weight > 0:
        raise ValueError(f"max_weight={max_weight} must be above 0: no sample would teach anything.")
    return max_weight


def _on_policy(
    weight: Float[Array, "N T"], off_policy: Bool[Array, " N"], completion_mask: Bool[Array, "N T"]
) -> Float[Array, "N T"]:
    return jnp.where(completion_mask & ~off_policy[:, None], weight, 1.0)

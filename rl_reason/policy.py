"""What several methods share: ratios, clipping, KL estimators and penalties, group statistics, verdicts as rewards."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from kernels.entropy_covariance import covariance, select_top_fraction
from rl_reason.masked import masked_mean, masked_sum
from rl_reason.types import Rewards

LOG_RATIO_LIMIT = 20.0  # nats; exp stays finite in fp32


def probability_ratio(logprobs: Float[Array, "N T"], old_logprobs: Float[Array, "N T"]) -> Float[Array, "N T"]:
    """exp(logprobs - old_logprobs), the exponent clamped to +-20 nats (verl's guard)."""
    return jnp.exp(jnp.clip(logprobs - old_logprobs, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT))


def ppo_losses(
    ratio: Float[Array, "N T"], advantages: Float[Array, "N T"], clip_eps_low: float, clip_eps_high: float
) -> tuple[Float[Array, "N T"], Bool[Array, "N T"]]:
    """max(-A r, -A clip(r, 1 - low, 1 + high)) (arXiv:1707.06347 eq. 7), and where the clip binds."""
    unclipped = -advantages * ratio
    clipped = -advantages * jnp.clip(ratio, 1 - clip_eps_low, 1 + clip_eps_high)
    return jnp.maximum(unclipped, clipped), clipped > unclipped


def dual_clip(
    losses: Float[Array, "N T"], advantages: Float[Array, "N T"], dual_clip_ratio: float
) -> Float[Array, "N T"]:
    """min(loss, -A c) where A < 0 (arXiv:1912.09729): bounds the push on a wrong token that became likely."""
    return jnp.where(advantages < 0, jnp.minimum(losses, -advantages * dual_clip_ratio), losses)


def kl_estimate(
    logprobs: Float[Array, "N T"], ref_logprobs: Float[Array, "N T"], estimator: str
) -> Float[Array, "N T"]:
    """Per-token estimate of KL(policy || reference), d = logprobs - ref_logprobs: k1 d, k2 d^2/2, k3 e^-d + d - 1.

    Only k2's sample gradient is that of the reverse KL. k3's exponent is clamped to +-20, its value to +-10 (verl).
    """
    delta = logprobs - ref_logprobs
    if estimator == "k1":
        return delta
    if estimator == "k2":
        return delta**2 / 2
    if estimator == "k3":
        delta = jnp.clip(delta, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
        return jnp.clip(jnp.expm1(-delta) + delta, -10.0, 10.0)  # exp(-d) - 1 would round a small d away
    raise ValueError(f"estimator={estimator!r}: the KL estimators are k1, k2 and k3.")


def covariance_penalty(
    logprobs: Float[Array, "N T"],
    old_logprobs: Float[Array, "N T"],
    advantages: Float[Array, "N T"],
    completion_mask: Bool[Array, "N T"],
    kl_cov_ratio: float,
) -> tuple[Float[Array, "N T"], dict[str, Float[Array, ""]]]:
    """|logprobs - old_logprobs| on the max(1, floor(kl_cov_ratio * valid)) tokens of highest covariance, 0 elsewhere.

    KL-Cov's penalty in nats (arXiv:2505.22617, 4.3, as in its code), and its metrics. Its value and its gradient are 0
    where the ratio is 1. With constant advantages every covariance is 0 and the first tokens in row order are chosen.
    """
    cov = covariance(logprobs, advantages, completion_mask)
    chosen = select_top_fraction(cov, completion_mask, kl_cov_ratio)
    delta = logprobs - old_logprobs
    gap = delta * jnp.sign(delta)  # |delta| with slope 0 at 0, where jnp.abs has slope 1
    return jnp.where(chosen, gap, 0.0), {
        "kl_cov/fraction": masked_mean(chosen.astype(cov.dtype), completion_mask),
        "kl_cov/penalised_gap": masked_mean(gap, chosen),
        "kl_cov/covariance_mean": masked_mean(cov, completion_mask),
    }


def ppo_metrics(
    logprobs: Float[Array, "N T"],
    old_logprobs: Float[Array, "N T"],
    clipped: Bool[Array, "N T"],
    completion_mask: Bool[Array, "N T"],
) -> dict[str, Float[Array, ""]]:
    """verl's actor/ppo_kl (mean of old - new, nats) and actor/pg_clipfrac (share of tokens whose clip binds)."""
    delta = jax.lax.stop_gradient(old_logprobs - logprobs)
    return {
        "actor/ppo_kl": masked_mean(delta, completion_mask),
        "actor/pg_clipfrac": masked_mean(clipped.astype(delta.dtype), completion_mask),
    }


def group_centred(
    rewards: Float[Array, "B G"], valid: Bool[Array, "B G"]
) -> tuple[Float[Array, "B G"], Float[Array, "B 1"], Bool[Array, "B 1"]]:
    """(reward - group mean, number of valid rows, whether all valid rewards are equal).

    Exactly 0 for a group whose rewards are all equal, for rows that are not valid, and for groups of one.
    """
    count = valid.sum(-1, keepdims=True)
    highest = jnp.max(jnp.where(valid, rewards, -jnp.inf), axis=-1, keepdims=True)
    lowest = jnp.min(jnp.where(valid, rewards, jnp.inf), axis=-1, keepdims=True)
    mean = masked_sum(rewards, valid, axis=-1)[:, None] / jnp.maximum(count, 1)
    equal = highest <= lowest  # the mean of equal rewards may round away from them
    return jnp.where(valid & ~equal, rewards - mean, 0.0), count.astype(rewards.dtype), equal


def group_std(
    rewards: Float[Array, "B G"], valid: Bool[Array, "B G"], ddof: int
) -> tuple[Float[Array, "B G"], Float[Array, "B 1"]]:
    """(reward - group mean, standard deviation of the valid rows); the deviation is 1 where all are equal."""
    centred, count, equal = group_centred(rewards, valid)
    variance = (centred**2).sum(-1, keepdims=True) / jnp.maximum(count - ddof, 1)
    return centred, jnp.sqrt(jnp.where(equal, 1.0, variance))


def full_marks(score: Float[Array, " N"], valid: Bool[Array, " N"]) -> Float[Array, " N"]:
    """1 where a verifier gave the whole score, else 0; 0 where it failed."""
    return (jnp.where(valid, score, 0.0) >= 1.0).astype(score.dtype)


def verdict_rewards(score: Float[Array, " N"], valid: Bool[Array, " N"], right: float, wrong: float) -> Rewards:
    """wrong + (right - wrong) * score; ``correct`` is whether the score is full. Invalid rows get ``wrong``."""
    total = wrong + (right - wrong) * jnp.where(valid, score, 0.0)
    return Rewards(total=total, correct=full_marks(score, valid), valid=valid)

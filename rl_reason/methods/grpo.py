"""GRPO: group-relative advantages and the clipped policy gradient (arXiv:2402.03300)."""

from jaxtyping import Array, Bool, Float

from rl_reason.masked import masked_sum
from rl_reason.policy import dual_clip, group_std, kl_estimate, ppo_losses, ppo_metrics, probability_ratio
from rl_reason.types import Metrics


def advantages(
    rewards: Float[Array, "B G"],
    valid: Bool[Array, "B G"],
    *,
    divide_by_std: bool,
    ddof: int,
    std_eps: float,
) -> Float[Array, "B G"]:
    """(r - mean) / (std + std_eps) over the valid samples of each group (section 4.1.2); r - mean is Dr.GRPO's.

    Exactly 0 where all valid rewards are equal, where a group has one valid sample, and for invalid rows.
    ``ddof`` 1 is verl's unbiased standard deviation, 0 the population's.
    """
    centred, std = group_std(rewards, valid, ddof)
    return centred / (std + std_eps) if divide_by_std else centred


def advantages_with_kl(
    rewards: Float[Array, "B G"],
    valid: Bool[Array, "B G"],
    completion_mask: Bool[Array, "N T"],
    old_logprobs: Float[Array, "N T"],
    ref_logprobs: Float[Array, "N T"],
    *,
    divide_by_std: bool,
    ddof: int,
    std_eps: float,
    kl_estimator: str,
    kl_coef: float,
) -> Float[Array, "B G"]:
    """``advantages`` of R - kl_coef sum_t KL_t, estimates of KL(old || ref) in nats: KL in the reward (verl: k1, 0.001).

    A group of equal verdicts then has a gradient, towards the reference.
    """
    kl = masked_sum(kl_estimate(old_logprobs, ref_logprobs, kl_estimator), completion_mask, axis=1)
    penalised = rewards - kl_coef * kl.reshape(rewards.shape)
    return advantages(penalised, valid, divide_by_std=divide_by_std, ddof=ddof, std_eps=std_eps)


def objective(
    logprobs: Float[Array, "N T"],
    old_logprobs: Float[Array, "N T"],
    advantages: Float[Array, "N T"],
    completion_mask: Bool[Array, "N T"],
    *,
    clip_eps_low: float,
    clip_eps_high: float,
    dual_clip_ratio: float | None,
) -> tuple[Float[Array, "N T"], Metrics]:
    """Clipped surrogate a token, to be minimised (eq. 3 without its KL term); ``dual_clip_ratio`` None switches that off."""
    losses, clipped = ppo_losses(probability_ratio(logprobs, old_logprobs), advantages, clip_eps_low, clip_eps_high)
    if dual_clip_ratio is not None:
        losses = dual_clip(losses, advantages, dual_clip_ratio)
    return losses, ppo_metrics(logprobs, old_logprobs, clipped, completion_mask)

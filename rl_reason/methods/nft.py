"""NFT: maximum likelihood on right answers, and on wrong ones through an implicit negative policy (arXiv:2505.18116).

The data's policy splits as old = r pi+ + (1 - r) pi-, r the group's success rate. Where pi is to be pi+, the policy
(old - r pi) / (1 - r) is to be pi-, and learns from the wrong answers. ``neg_weight`` 0 leaves those out: that is RFT.

Departures from the authors' code: ``neg_weight`` below 0, which there means DAPO's loss, is refused; the floor on a right
token's ratio (their clamp_positive, 0 in all scripts) is left out. Their sum over tokens divided by 1000 is
``config.aggregation``'s. Groups that are all right or all wrong trip an assertion there and belong to a filter
(``group_filter.mixed``); here the clamp of r keeps them finite, and they then teach a little: each token of an all-wrong
group is pushed down as in a group with r = clamp_success_low, each of an all-right one pulled up as with clamp_success_high.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rl_reason.masked import masked_mean
from rl_reason.policy import ppo_metrics
from rl_reason.types import Metrics

MAX_LOG_RATIO = 10.0  # nats; beyond it a token has no gradient


def objective(
    logprobs: Float[Array, "N T"],
    old_logprobs: Float[Array, "N T"],
    correct: Float[Array, " N"],
    success_rate: Float[Array, " N"],
    completion_mask: Bool[Array, "N T"],
    *,
    neg_weight: float,
    normalize: int,
    eps: float,
    clamp_success_low: float,
    clamp_success_high: float,
) -> tuple[Float[Array, "N T"], Metrics]:
    """-w log R a right token, -w neg_weight log max(Q, eps) a wrong one, Q = (1 - r R) / (1 - r).

    R = exp(l - l_old), the exponent at most 10; r = ``success_rate``, clamped. ``normalize`` 0: w = 1, 1: w = 1 - r, 2:
    w = sqrt((1 - r) / r); on policy 1 has the gradient of Dr.GRPO and 2 that of GRPO with the population's deviation. The
    maximum passes its gradient straight through, so what counts is the gradient: with eps = 1 every wrong token of R >= 1
    has a loss of exactly 0 and is pushed down all the same. ``nft/floor_fraction`` is the share of wrong tokens there.

    Raises:
        ValueError: names the hyperparameter and what it may be.
    """
    _check(neg_weight, normalize, eps, clamp_success_low, clamp_success_high)
    rate = jnp.clip(success_rate, clamp_success_low, clamp_success_high)[:, None]
    weight = {0: jnp.ones_like(rate), 1: 1 - rate, 2: jnp.sqrt((1 - rate) / rate)}[normalize]
    log_ratio = jnp.minimum(logprobs - old_logprobs, MAX_LOG_RATIO)
    ratio = jnp.exp(log_ratio)
    negative = (1 - rate * ratio) / (1 - rate)  # of the implicit policy
    right = (correct > 0)[:, None]
    losses = -weight * jnp.where(right, log_ratio, neg_weight * _log_floored(negative, eps))

    wrong_tokens, right_tokens = completion_mask & ~right, completion_mask & right
    share = lambda mask, among: masked_mean(mask.astype(ratio.dtype), among)
    capped = logprobs - old_logprobs > MAX_LOG_RATIO
    metrics = ppo_metrics(logprobs, old_logprobs, capped, completion_mask) | {
        "nft/floor_fraction": share(negative < eps, wrong_tokens),
        "nft/positive_ratio": masked_mean(ratio, right_tokens),
        "nft/negative_ratio": masked_mean(ratio, wrong_tokens),
        "nft/positive_fraction": share(right_tokens, completion_mask),
    }
    return losses, metrics


def _log_floored(x: Float[Array, "N T"], eps: float) -> Float[Array, "N T"]:
    """log max(x, eps) with gradient 1 / max(x, eps) also below the floor; x - sg[x] adds exactly 0, whatever x is."""
    floored = jax.lax.stop_gradient(jnp.maximum(x, eps))
    return jnp.log(floored) + (x - jax.lax.stop_gradient(x)) / floored


def _check(neg_weight: float, normalize: int, eps: float, low: float, high: float) -> None:
    if neg_weight < 0:
        raise ValueError(f"neg_weight={neg_weight}: 1 is NFT, 0 is RFT. Below 0 the authors run DAPO's loss: dapo.py.")
    if normalize not in (0, 1, 2):
        raise ValueError(f"normalize={normalize}: 0 is no weight, 1 is 1 - r, 2 is sqrt((1 - r) / r).")
    if eps <= 0:
        raise ValueError(
            f"eps={eps} must be above 0: the negative policy's ratio may be below it. The authors have 1."
        )
    if not 0 < low <= high < 1:
        raise ValueError(
            f"clamp_success_low={low}, clamp_success_high={high}: want 0 < low <= high < 1. The authors have 0.02, 0.98."
        )

"""GSPO: one importance ratio a completion, clipped as a whole (arXiv:2507.18071, eq. 5 and 7).

This is the paper's token variant (section 4.3) with one advantage a row, where both have the same value and gradient; it is
also the form that verl has. Its loss is a mean over each row's tokens, then over rows: ``seq_mean_token_mean``.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rl_reason.masked import masked_mean
from rl_reason.policy import ppo_losses, ppo_metrics
from rl_reason.types import Metrics

MAX_LOG_RATIO = 10.0  # nats, verl's cap; beyond it a token has no gradient


def objective(
    logprobs: Float[Array, "N T"],
    old_logprobs: Float[Array, "N T"],
    advantages: Float[Array, "N T"],
    completion_mask: Bool[Array, "N T"],
    *,
    clip_eps_low: float,
    clip_eps_high: float,
) -> tuple[Float[Array, "N T"], Metrics]:
    """PPO's clipped loss of s_t = exp(sg[mean_t(l - l_old)] + l_t - sg[l_t]), the exponent at most 10.

    Every token of a row has the value of the row's ratio, the geometric mean of its tokens', and a gradient of its own; the
    clip binds for the whole row or not at all. A row without a token has ratio 1.
    """
    row = masked_mean(logprobs - old_logprobs, completion_mask, axis=1)[:, None]
    log_ratio = jax.lax.stop_gradient(row) + (logprobs - jax.lax.stop_gradient(logprobs))
    ratio = jnp.exp(jnp.minimum(log_ratio, MAX_LOG_RATIO))
    losses, clipped = ppo_losses(ratio, advantages, clip_eps_low, clip_eps_high)
    return losses, ppo_metrics(logprobs, old_logprobs, clipped, completion_mask)

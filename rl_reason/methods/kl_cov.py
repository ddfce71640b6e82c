"""KL-Cov: the tokens of highest log-probability/advantage covariance pay a KL penalty (arXiv:2505.22617, 4.3).

The penalty is |log ratio|, as in the authors' code: it and its gradient vanish where the ratio is 1, so the first update
of a step does nothing that plain policy gradient would not, and several updates a rollout are needed for it to act.
There is no PPO clip and no dual clip in this objective, again as in the code.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from kernels.entropy_covariance import covariance, select_top_fraction
from rl_reason.masked import masked_mean
from rl_reason.policy import ppo_metrics, probability_ratio
from rl_reason.types import Metrics


def objective(
    logprobs: Float[Array, "N T"],
    old_logprobs: Float[Array, "N T"],
    advantages: Float[Array, "N T"],
    completion_mask: Bool[Array, "N T"],
    *,
    kl_cov_ratio: float,
    kl_cov_coef: float,
) -> tuple[Float[Array, "N T"], Metrics]:
    """-A r, plus kl_cov_coef |log r| on the max(1, floor(kl_cov_ratio * valid)) tokens of highest covariance.

    With constant advantages every covariance is 0 and the first tokens in row order are chosen.
    """
    cov = covariance(logprobs, advantages, completion_mask)
    chosen = select_top_fraction(cov, completion_mask, kl_cov_ratio)
    delta = logprobs - old_logprobs
    gap = delta * jnp.sign(delta)  # |delta| with slope 0 at 0, where jnp.abs has slope 1
    losses = -advantages * probability_ratio(logprobs, old_logprobs) + jnp.where(chosen, kl_cov_coef * gap, 0.0)

    unclipped = jnp.zeros_like(completion_mask)
    metrics = ppo_metrics(logprobs, old_logprobs, unclipped, completion_mask) | {
        "kl_cov/fraction": masked_mean(chosen.astype(cov.dtype), completion_mask),
        "kl_cov/penalised_gap": masked_mean(gap, chosen),
        "kl_cov/covariance_mean": masked_mean(cov, completion_mask),
    }
    return losses, metrics

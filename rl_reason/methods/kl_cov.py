"""KL-Cov: the tokens of highest log-probability/advantage covariance pay a KL penalty (arXiv:2505.22617, 4.3).

The penalty is |log ratio|, as in the authors' code: it and its gradient vanish where the ratio is 1, so the first update
of a step does nothing that plain policy gradient would not, and several updates a rollout are needed for it to act.
There is no PPO clip and no dual clip in this objective, again as in the code.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rl_reason.policy import covariance_penalty, ppo_metrics, probability_ratio
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
    penalty, metrics = covariance_penalty(logprobs, old_logprobs, advantages, completion_mask, kl_cov_ratio)
    losses = -advantages * probability_ratio(logprobs, old_logprobs) + kl_cov_coef * penalty
    unclipped = jnp.zeros_like(completion_mask)
    return losses, ppo_metrics(logprobs, old_logprobs, unclipped, completion_mask) | metrics

"""Clip-Cov: a few tokens of high log-probability/advantage covariance lose their gradient (arXiv:2505.22617, 4.2).

Departures: none from the authors' code but scope: means and selection are over the whole minibatch, where their code
takes each micro-batch's (``config.objective_scope = "microbatch"`` does that). The paper detaches the chosen tokens; like
the code we multiply by 0: the gradient is the same, and chosen tokens stay in the denominator.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from kernels.entropy_covariance import covariance, fraction_of, select_random_subset
from rl_reason.masked import masked_mean
from rl_reason.policy import ppo_losses, ppo_metrics, probability_ratio
from rl_reason.types import Metrics


def objective(
    logprobs: Float[Array, "N T"],
    old_logprobs: Float[Array, "N T"],
    advantages: Float[Array, "N T"],
    completion_mask: Bool[Array, "N T"],
    key: Key[Array, ""],
    *,
    clip_eps_low: float,
    clip_eps_high: float,
    clip_cov_ratio: float,
    clip_cov_low: float,
    clip_cov_high: float,
) -> tuple[Float[Array, "N T"], Metrics]:
    """PPO's clipped loss, zeroed on a uniformly random subset of the candidates.

    Candidates are valid tokens that PPO's clip does not bind and whose covariance lies in (clip_cov_low, clip_cov_high);
    the subset has min(max(floor(clip_cov_ratio * valid), 1), candidates) tokens. No candidate: plain PPO.
    """
    losses, clipped = ppo_losses(probability_ratio(logprobs, old_logprobs), advantages, clip_eps_low, clip_eps_high)
    cov = covariance(logprobs, advantages, completion_mask)
    candidates = completion_mask & ~clipped & (cov > clip_cov_low) & (cov < clip_cov_high)
    budget = jnp.maximum(fraction_of(clip_cov_ratio, completion_mask.sum()), 1)
    chosen = select_random_subset(candidates, budget, jax.random.uniform(key, cov.shape))

    share = lambda mask: masked_mean(mask.astype(cov.dtype), completion_mask)
    metrics = ppo_metrics(logprobs, old_logprobs, clipped, completion_mask) | {
        "clip_cov/fraction": share(chosen),
        "clip_cov/candidate_fraction": share(candidates),
        "clip_cov/covariance_mean": masked_mean(cov, completion_mask),
    }
    return jnp.where(chosen, 0.0, losses), metrics

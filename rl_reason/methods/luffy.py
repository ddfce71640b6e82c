"""LUFFY: one demonstration in every group, its rare tokens learned with a shaped weight (arXiv:2504.14945).

As in the authors' script, sampled tokens have the importance ratio without any clip, and the demonstration's policy is taken
to have given each of its tokens probability 1, so that nothing of it needs to be known. The bonus on entropy is
``config.regularisers.entropy``; the sum over a constant width is ``config.aggregation``.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rl_reason.masked import masked_mean
from rl_reason.policy import group_std, ppo_losses, ppo_metrics, probability_ratio
from rl_reason.types import Metrics


def objective(
    logprobs: Float[Array, "N T"],
    old_logprobs: Float[Array, "N T"],
    advantages: Float[Array, "N T"],
    off_policy: Bool[Array, " N"],
    completion_mask: Bool[Array, "N T"],
    *,
    shaping_gamma: float | None,
) -> tuple[Float[Array, "N T"], Metrics]:
    """-A r on sampled tokens, -A p / (p + shaping_gamma) on demonstrated ones, p = exp(logprobs) (section 3.2).

    The slope of the latter in log p is -A gamma p / (p + gamma)^2: greatest at p = gamma, where it is a quarter of A.
    ``shaping_gamma`` None leaves it at -A p. Rewards decide the sign: a demonstration that the verifier calls wrong is
    pushed down. The old log-probabilities of demonstrations are never read.
    """
    probability = jnp.exp(jnp.where(completion_mask, logprobs, 0.0))
    shaped = probability if shaping_gamma is None else probability / (probability + shaping_gamma)
    shown, drawn = completion_mask & off_policy[:, None], completion_mask & ~off_policy[:, None]
    ratio = probability_ratio(*(jnp.where(drawn, x, 0.0) for x in (logprobs, old_logprobs)))
    losses = -advantages * jnp.where(off_policy[:, None], shaped, ratio)
    return losses, _metrics(logprobs, old_logprobs, probability, shaped, shown, drawn)


def imitation_objective(
    logprobs: Float[Array, "N T"],
    old_logprobs: Float[Array, "N T"],
    advantages: Float[Array, "N T"],
    off_policy: Bool[Array, " N"],
    completion_mask: Bool[Array, "N T"],
    *,
    clip_eps_low: float,
    clip_eps_high: float,
) -> tuple[dict[str, Float[Array, "N T"]], Metrics]:
    """The baseline "RL with SFT loss": PPO's clipped loss as the term "policy", and -log p as the term "imitation".

    ``config.aggregation`` takes the first over on_policy tokens and the second over off_policy ones.
    """
    losses, clipped = ppo_losses(probability_ratio(logprobs, old_logprobs), advantages, clip_eps_low, clip_eps_high)
    probability = jnp.exp(jnp.where(completion_mask, logprobs, 0.0))
    shown, drawn = completion_mask & off_policy[:, None], completion_mask & ~off_policy[:, None]
    metrics = _metrics(logprobs, old_logprobs, probability, probability, shown, drawn)
    clip_fraction = masked_mean(clipped.astype(losses.dtype), drawn)
    return {"policy": losses, "imitation": -logprobs}, metrics | {"actor/pg_clipfrac": clip_fraction}


def sampled_advantages(
    rewards: Float[Array, "B G"], valid: Bool[Array, "B G"], off_policy: Bool[Array, "B G"], *, std_eps: float
) -> Float[Array, "B G"]:
    """(r - mean) / (std + std_eps) with both statistics of sampled rows alone; demonstrations get 0.

    What the baseline with an SFT loss uses: there a demonstration teaches by its own term. Exactly 0 where all are equal.
    """
    centred, std = group_std(rewards, valid & ~off_policy, ddof=1)
    return centred / (std + std_eps)


def _metrics(logprobs, old_logprobs, probability, shaped, shown, drawn) -> Metrics:
    measured = ppo_metrics(logprobs, old_logprobs, jnp.zeros_like(drawn), drawn)
    probability, shaped = jax.lax.stop_gradient((probability, shaped))
    return measured | {
        "actor/off_policy_prob": masked_mean(probability, shown),
        "actor/on_policy_prob": masked_mean(probability, drawn),
        "actor/off_ratio_mean": masked_mean(shaped, shown),
    }

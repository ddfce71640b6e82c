"""CISPO: clip the importance weight, not the token's gradient (MiniMax-M1, arXiv:2506.13585, eq. 4 and 5)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rl_reason.policy import ppo_metrics, probability_ratio
from rl_reason.types import Metrics


def objective(
    logprobs: Float[Array, "N T"],
    old_logprobs: Float[Array, "N T"],
    advantages: Float[Array, "N T"],
    completion_mask: Bool[Array, "N T"],
    *,
    clip_eps_low: float | None,
    clip_eps_high: float,
) -> tuple[Float[Array, "N T"], Metrics]:
    """-sg[clip(r, 1 - low, 1 + high)] A l a token: REINFORCE with a bounded weight, so that no token loses its gradient.

    ``clip_eps_low`` None has no lower bound, as the paper in practice. ``actor/pg_clipfrac`` counts the tokens whose
    weight is clipped, whatever the sign of A.
    """
    ratio = jax.lax.stop_gradient(probability_ratio(logprobs, old_logprobs))
    weight = jnp.clip(ratio, None if clip_eps_low is None else 1 - clip_eps_low, 1 + clip_eps_high)
    return -weight * advantages * logprobs, ppo_metrics(logprobs, old_logprobs, weight != ratio, completion_mask)

"""Intern-S1: imitate right completions, push down wrong ones, and hold the tokens that cost entropy (arXiv:2508.15763).

    L = lambda_sft E_{D+}[L_SFT] + lambda_pg E_{D-}[L_PG] + KL-Cov

D+ and D- are the rows that the verifiers passed and failed. The paper gives neither the lambdas nor the denominators: each
term has its own here, ``config.aggregation``'s, and the lambdas are their ``coef``. It is OREAL without its token reward
model and without its KL to the initial model, plus KL-Cov's penalty, whose coefficient is its term's ``coef`` too.

The authors leave token ratios out because the experts chosen differ between rollout and training, which makes ratios
unreliable. The wrong rows' gradient is then the plain policy gradient in every update of a step. ``wrong_ratio`` says so;
"old" puts the ratio to the policy before the step's first update back, for comparison and for runs that replay experts.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rl_reason.masked import masked_mean
from rl_reason.policy import covariance_penalty, ppo_metrics, probability_ratio
from rl_reason.types import Metrics

WRONG_RATIOS = ("one", "old")


def objective(
    logprobs: Float[Array, "N T"],
    old_logprobs: Float[Array, "N T"],
    advantages: Float[Array, "N T"],
    rewards: Float[Array, " N"],
    completion_mask: Bool[Array, "N T"],
    *,
    wrong_ratio: str,
    kl_cov_ratio: float,
) -> tuple[dict[str, Float[Array, "N T"]], Metrics]:
    """{"positive": -lp where rewards > 0, "negative": -A r where rewards <= 0, "kl_cov": |lp - old|} a token, in nats.

    Each is 0 elsewhere; r is exp(lp - sg(lp)) with ``wrong_ratio`` "one", a 1 with a gradient, or exp(lp - old) with "old".
    KL-Cov acts on the max(1, floor(kl_cov_ratio * valid)) tokens of highest covariance, right or wrong, and does exactly
    nothing in the first update of a step. An empty D+ or D- contributes 0.

    Raises:
        ValueError: an unknown ``wrong_ratio``.
    """
    if wrong_ratio not in WRONG_RATIOS:
        raise ValueError(f"wrong_ratio={wrong_ratio!r}; there are {', '.join(WRONG_RATIOS)}.")
    behaviour = old_logprobs if wrong_ratio == "old" else jax.lax.stop_gradient(logprobs)
    right = (rewards > 0)[:, None]
    penalty, metrics = covariance_penalty(logprobs, old_logprobs, advantages, completion_mask, kl_cov_ratio)
    terms = {
        "positive": jnp.where(right, -logprobs, 0.0),
        "negative": jnp.where(right, 0.0, -advantages * probability_ratio(logprobs, behaviour)),
        "kl_cov": penalty,
    }
    unclipped = jnp.zeros_like(completion_mask)
    share = masked_mean(jnp.broadcast_to(right, logprobs.shape).astype(logprobs.dtype), completion_mask)
    return terms, ppo_metrics(logprobs, old_logprobs, unclipped, completion_mask) | metrics | {
        "intern_s1/positive_fraction": share
    }

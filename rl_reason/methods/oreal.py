"""OREAL: imitate right completions, push down wrong ones, stay near the initial model, token by token (arXiv:2502.06781).

As the authors' code does it. Where that differs from the paper: positives are weighted by their advantage, the KL is to
the initial model and acts on positives too, a token's weight comes from the running mean of the token reward model's
logits, and wrong completions keep their reward of -1. The denominators are ``config.aggregation``'s.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from rl_reason.masked import masked_mean
from rl_reason.policy import kl_estimate
from rl_reason.types import Metrics

WEIGHTS = ("running_mean", "tokenwise", "none")


def objective(
    logprobs: Float[Array, "N T"],
    ref_logprobs: Float[Array, "N T"],
    advantages: Float[Array, "N T"],
    rewards: Float[Array, " N"],
    token_scores: Float[Array, "N T"] | None,
    completion_mask: Bool[Array, "N T"],
    *,
    token_weights: str,
) -> tuple[dict[str, Float[Array, "N T"]], Metrics]:
    """{"positive": -w+ A lp, "negative": -w- A exp(lp - sg(lp)), "kl": k3(lp, ref)} a token, in nats.

    Aggregated over rewards > 0, rewards <= 0 and everything. w+ = clip(2 q - 1, 0, 1) and w- = clip(1 - 2 q, 0, 1), where q
    is the sigmoid of ``token_scores``, averaged up to the token ("running_mean": the code) or as they are ("tokenwise":
    the paper); both are 1 with "none". A ratio of 1 with a gradient makes the negative term a policy gradient.

    Raises:
        ValueError: an unknown ``token_weights``, or weights of a token reward model that is not there.
    """
    right, wrong = _weights(token_scores, completion_mask, token_weights)
    ratio = jnp.exp(logprobs - jax.lax.stop_gradient(logprobs))
    terms = {
        "positive": -right * advantages * logprobs,
        "negative": -wrong * advantages * ratio,
        "kl": kl_estimate(logprobs, ref_logprobs, "k3"),
    }
    positive = completion_mask & (rewards > 0)[:, None]
    live = lambda weight, mask: masked_mean((weight > 0).astype(logprobs.dtype), mask)
    return terms, {
        "oreal/positive_live_fraction": live(right, positive),
        "oreal/negative_live_fraction": live(wrong, completion_mask & ~positive),
        "actor/ref_kl": masked_mean(terms["kl"], completion_mask),
    }


def _weights(
    token_scores: Float[Array, "N T"] | None, completion_mask: Bool[Array, "N T"], token_weights: str
) -> tuple[Float[Array, "N T"], Float[Array, "N T"]]:
    if token_weights not in WEIGHTS:
        raise ValueError(f"token_weights={token_weights!r}; there are {', '.join(WEIGHTS)}.")
    if token_weights == "none":
        ones = jnp.ones(completion_mask.shape, jnp.result_type(float))
        return ones, ones
    if token_scores is None:
        raise ValueError(
            f"token_weights={token_weights!r} needs a token reward model: set config.token_reward, or token_weights='none'."
        )
    w = jax.lax.stop_gradient(jnp.where(completion_mask, token_scores, 0.0))
    if token_weights == "running_mean":
        w = jnp.cumsum(w, axis=1) / jnp.maximum(jnp.cumsum(completion_mask, axis=1), 1)
    certainty = 2 * jax.nn.sigmoid(w) - 1
    return jnp.clip(certainty, 0, 1), jnp.clip(-certainty, 0, 1)


def one_of_each(
    correct: Float[Array, "B G"], valid: Bool[Array, "B G"], key: Key[Array, ""]
) -> tuple[Bool[Array, "B G"], dict[str, Array]]:
    """One right and one wrong completion of each group, drawn uniformly; groups without both are dropped."""
    right, wrong = valid & (correct >= 1), valid & (correct < 1)
    draw = jax.random.uniform(key, correct.shape)
    columns = jnp.arange(correct.shape[1])[None]
    first = lambda rows: jnp.argmax(jnp.where(rows, draw, -1.0), axis=1, keepdims=True) == columns
    both = right.any(1, keepdims=True) & wrong.any(1, keepdims=True)
    return both & ((right & first(right)) | (wrong & first(wrong))), {}

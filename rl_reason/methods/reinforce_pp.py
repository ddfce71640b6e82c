"""REINFORCE++: returns a token, whitened over the batch (arXiv:2501.03262), with or without a group baseline.

Departures: where all returns are equal the advantages are exactly 0, also by rounding. A row whose verifier failed, or
that selection dropped, is in no statistic.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rl_reason.masked import masked_mean
from rl_reason.policy import group_centred, kl_estimate


def advantages(
    rewards: Float[Array, "B G"],
    completion_mask: Bool[Array, "N T"],
    valid: Bool[Array, "B G"],
    token_rewards: Float[Array, "N T"] | None,
    *,
    gamma: float,
    var_eps: float,
) -> Float[Array, "N T"]:
    """Whitened return-to-go: (G_t - mean G) / sqrt(var G + var_eps), G_t = r_t + gamma G_{t+1}.

    r is 0 but on the row's last token, where it is the row's reward; ``token_rewards``, where there are any, are added.
    Mean and unbiased variance are over all valid tokens of the batch, so a long completion weighs more.

    Raises:
        ValueError: gamma outside [0, 1].
    """
    mask = completion_mask & valid.reshape(-1, 1)
    return _whitened(_returns(_token_rewards(rewards, mask, token_rewards), gamma), mask, var_eps)


def advantages_with_kl(
    rewards: Float[Array, "B G"],
    completion_mask: Bool[Array, "N T"],
    valid: Bool[Array, "B G"],
    token_rewards: Float[Array, "N T"] | None,
    old_logprobs: Float[Array, "N T"],
    ref_logprobs: Float[Array, "N T"],
    *,
    gamma: float,
    var_eps: float,
    kl_estimator: str,
    kl_coef: float,
) -> Float[Array, "N T"]:
    """``advantages`` of r_t - kl_coef KL_t, the estimate of KL(old || ref) at each token (verl: k1, 0.001)."""
    mask = completion_mask & valid.reshape(-1, 1)
    kl = kl_estimate(old_logprobs, ref_logprobs, kl_estimator)
    penalised = _token_rewards(rewards, mask, token_rewards) - jnp.where(mask, kl_coef * kl, 0.0)
    return _whitened(_returns(penalised, gamma), mask, var_eps)


def baseline_advantages(
    rewards: Float[Array, "B G"],
    completion_mask: Bool[Array, "N T"],
    valid: Bool[Array, "B G"],
    *,
    var_eps: float,
) -> Float[Array, "N T"]:
    """REINFORCE++-baseline: R - group mean at each token of a row, then whitened over the batch's tokens.

    Whitening subtracts the token mean, which is not 0 where right and wrong completions differ in length: a group whose
    rewards are all equal gets exactly 0 only if all groups are such.
    """
    mask = completion_mask & valid.reshape(-1, 1)
    centred, _, _ = group_centred(rewards, valid)
    return _whitened(jnp.broadcast_to(centred.reshape(-1, 1), mask.shape), mask, var_eps)


def _token_rewards(
    rewards: Float[Array, "B G"], mask: Bool[Array, "N T"], token_rewards: Float[Array, "N T"] | None
) -> Float[Array, "N T"]:
    """The outcome on each row's last valid token, plus what the reward slot gave a token; 0 off the mask."""
    tokens_left = jnp.flip(jnp.cumsum(jnp.flip(mask, 1), axis=1), 1)
    outcome = jnp.where(mask & (tokens_left == 1), rewards.reshape(-1, 1), 0.0)
    return outcome if token_rewards is None else outcome + jnp.where(mask, token_rewards, 0.0)


def _returns(token_rewards: Float[Array, "N T"], gamma: float) -> Float[Array, "N T"]:
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma={gamma}: a discount lies in [0, 1]; REINFORCE++ has 1.")

    def back(later: Float[Array, " N"], now: Float[Array, " N"]):
        total = now + gamma * later
        return total, total

    _, returns = jax.lax.scan(back, jnp.zeros_like(token_rewards[:, 0]), token_rewards.T, reverse=True)
    return returns.T


def _whitened(x: Float[Array, "N T"], mask: Bool[Array, "N T"], var_eps: float) -> Float[Array, "N T"]:
    """(x - mean) rsqrt(var + var_eps) over the mask, unbiased variance; exactly 0 off it and where all x are equal."""
    if var_eps < 0:
        raise ValueError(f"var_eps={var_eps} must not be below 0; verl has 1e-8.")
    equal = jnp.max(jnp.where(mask, x, -jnp.inf)) <= jnp.min(jnp.where(mask, x, jnp.inf))
    centred = jnp.where(mask & ~equal, x - masked_mean(x, mask), 0.0)
    variance = (centred**2).sum() / jnp.maximum(mask.sum() - 1, 1)
    return centred * jax.lax.rsqrt(jnp.where(equal, 1.0, variance + var_eps))

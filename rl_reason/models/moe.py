"""A mixture of SwiGLU experts: softmax router, top-k, and what its choices say about balance."""

import functools
import typing

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels.grouped_matmul import route
from rl_reason.models.experts import Experts, apply_experts
from rl_reason.sharding import by_rows

if typing.TYPE_CHECKING:
    from rl_reason.models.transformer import ModelConfig


class RouterStatistics(typing.NamedTuple):
    """Sums over valid tokens, so that microbatches add up; a leading [L] axis once layers are stacked."""

    probabilities: Float[Array, "*l E"]  # of each expert
    chosen: Float[Array, "*l E"]  # times each expert was taken
    squared_logsumexp: Float[Array, "*l"]
    count: Float[Array, "*l"]  # valid tokens


def balance_loss(router: RouterStatistics) -> Float[Array, ""]:
    """E * sum_e f_e p_e, mean over layers (arXiv:2101.03961 eq. 4); 1 when perfectly even, 0 with no token."""
    count = jnp.maximum(router.count, 1)[:, None]
    taken = router.chosen / jnp.maximum(router.chosen.sum(-1, keepdims=True), 1)
    return (taken * router.probabilities / count).sum(-1).mean() * router.chosen.shape[-1]


def z_loss(router: RouterStatistics) -> Float[Array, ""]:
    """Mean squared log-sum-exp of the router logits over tokens and layers (arXiv:2202.08906 eq. 5)."""
    return (router.squared_logsumexp / jnp.maximum(router.count, 1)).mean()


def replay(
    logits: Float[Array, "M E"], expert_ids: Int[Array, "M K"], recorded: Int[Array, "M K"]
) -> tuple[Float[Array, "M K"], Int[Array, "M K"]]:
    """Weights and ids with recorded experts in place of chosen ones, but for tokens whose record is -1.

    The weights are these logits' own, softmax over all and then renormalised over the K, so that the router's gradient
    is that of the experts that acted.
    """
    ids = jnp.where(recorded >= 0, recorded, expert_ids)
    weights = jnp.take_along_axis(jax.nn.softmax(logits, axis=-1), ids, axis=1)
    return weights / jnp.sum(weights, axis=-1, keepdims=True), ids


class MixtureOfExperts(nn.Module):
    """sum_k w_k expert_k(x), weights renormalised over the chosen k (Qwen3-MoE's norm_topk_prob).

    Gives the experts it used besides; ``recorded`` [M K] replaces its own choice.
    """

    config: "ModelConfig"

    @nn.compact
    def __call__(self, x, valid, recorded=None):
        c = self.config
        init = nn.initializers.lecun_normal(batch_axis=0)

        def expert_weights(name, fan_in, fan_out):
            return self.param(name, init, (c.num_experts, fan_in, fan_out), c.param_dtype).astype(c.dtype)

        router = self.param("router", nn.initializers.lecun_normal(), (c.hidden_size, c.num_experts), c.param_dtype)
        gate = expert_weights("gate", c.hidden_size, c.mlp_size)
        up = expert_weights("up", c.hidden_size, c.mlp_size)
        down = expert_weights("down", c.mlp_size, c.hidden_size)

        accumulate = jnp.promote_types(c.dtype, jnp.float32)
        logits = x.astype(accumulate) @ router.astype(accumulate)
        weights, expert_ids = by_rows(functools.partial(route, top_k=c.experts_per_token), logits)
        if recorded is not None:
            weights, expert_ids = replay(logits, expert_ids, recorded)
        # Who initialises wants no output, and does it under vmap, of which kernels inside shard_map know nothing.
        out = x if self.is_initializing() else apply_experts(x, weights, expert_ids, Experts(gate, up, down))

        live = valid[:, None].astype(accumulate)
        one_hot = jax.nn.one_hot(expert_ids, c.num_experts, dtype=accumulate).sum(1)
        statistics = RouterStatistics(
            probabilities=(jax.nn.softmax(logits) * live).sum(0),
            chosen=(one_hot * live).sum(0),
            squared_logsumexp=(jax.nn.logsumexp(logits, axis=-1) ** 2 * live[:, 0]).sum(),
            count=live.sum(),
        )
        return out.astype(x.dtype), statistics, expert_ids

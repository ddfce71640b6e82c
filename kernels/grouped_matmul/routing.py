"""Top-k routing of tokens to experts, the sort into groups and the weighted way back."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class Permutation(NamedTuple):
    """How [M, K] choices became M K sorted rows, and the way back."""

    order: Int[Array, " MK"]  # sorted row j is choice order[j] of the flat [M, K]
    inverse: Int[Array, "M K"]  # choice (m, k) is sorted row inverse[m, k]


def route(
    router_logits: Float[Array, "M E"], top_k: int, *, normalise: bool = True
) -> tuple[Float[Array, "M {top_k}"], Int[Array, "M {top_k}"]]:
    """Weights and ids of each token's ``top_k`` experts: softmax over all in fp32 (fp64 for fp64), then top-k.

    ``normalise`` makes the weights of a token sum to 1 (Mixtral; Qwen3-MoE's norm_topk_prob). Ties go to the lower id.
    The ids carry no gradient, the weights do.
    """
    num_experts = router_logits.shape[1]
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"route: top_k={top_k} must lie in 1 .. {num_experts}, the columns of router_logits")
    logits = router_logits.astype(jnp.promote_types(router_logits.dtype, jnp.float32))
    weights, expert_ids = jax.lax.top_k(jax.nn.softmax(logits, axis=-1), top_k)
    if normalise:
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    return weights, expert_ids.astype(jnp.int32)


def permute(
    x: Float[Array, "M D"], expert_ids: Int[Array, "M K"], num_experts: int
) -> tuple[Float[Array, "MK D"], Int[Array, " {num_experts}"], Permutation]:
    """Rows of x in the order of their experts (stable), the size of every group, and how to undo it.

    An id outside ``0 .. num_experts - 1`` drops that choice: it is sorted behind all groups, where
    ``grouped_matmul`` gives zeros. The gradient is a gather and a sum over K, not a scatter.
    """
    group_sizes, undo = arrange(expert_ids, num_experts)
    return _gather(x, undo), group_sizes, undo


def arrange(expert_ids: Int[Array, "M K"], num_experts: int) -> tuple[Int[Array, " {num_experts}"], Permutation]:
    """The order of ``permute`` and the size of every group, without moving a row."""
    ids = expert_ids.astype(jnp.int32).reshape(-1)
    ids = jnp.where((ids >= 0) & (ids < num_experts), ids, num_experts)
    position = jax.lax.iota(jnp.int32, ids.shape[0])
    _, order = jax.lax.sort_key_val(ids, position, is_stable=True)
    inverse = jnp.zeros_like(position).at[order].set(position, unique_indices=True).reshape(expert_ids.shape)
    experts = jax.lax.broadcasted_iota(jnp.int32, (1, num_experts), 1)
    group_sizes = jnp.sum(ids[:, None] == experts, axis=0, dtype=jnp.int32)
    return group_sizes, Permutation(order, inverse)


def combine(rows: Float[Array, "MK D"], undo: Permutation, weights: Float[Array, "M K"]) -> Float[Array, "M D"]:
    """``out[m] = sum_k weights[m, k] rows[undo.inverse[m, k]]``, summed in fp32 at least, in the dtype of rows.

    The gradients (to rows and weights) are gathers, not scatters.
    """
    return _weighted_sum(rows, undo, weights)


@jax.custom_vjp
def _gather(x, undo):
    return x[undo.order // undo.inverse.shape[1]]


def _gather_backward(undo, g):
    wide = jnp.promote_types(g.dtype, jnp.float32)
    return jnp.sum(g[undo.inverse], axis=1, dtype=wide).astype(g.dtype), None


_gather.defvjp(lambda x, undo: (_gather(x, undo), undo), _gather_backward)


@jax.custom_vjp
def _weighted_sum(rows, undo, weights):
    wide = jnp.promote_types(jnp.result_type(rows, weights), jnp.float32)
    own = rows[undo.inverse].astype(wide)
    return jnp.sum(own * weights[..., None].astype(wide), axis=1).astype(rows.dtype)


def _weighted_sum_backward(residuals, g):
    rows, undo, weights = residuals
    wide = jnp.promote_types(jnp.result_type(rows, weights), jnp.float32)
    g = g.astype(wide)
    sorted_weights = weights.reshape(-1)[undo.order].astype(wide)
    d_rows = g[undo.order // weights.shape[1]] * sorted_weights[:, None]
    d_weights = jnp.sum(rows[undo.inverse].astype(wide) * g[:, None], axis=-1)
    return d_rows.astype(rows.dtype), None, d_weights.astype(weights.dtype)


_weighted_sum.defvjp(
    lambda rows, undo, weights: (_weighted_sum(rows, undo, weights), (rows, undo, weights)), _weighted_sum_backward
)

"""Maximum likelihood on demonstrations: the warm-up before RL, and a run of its own on packed rows."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from rl_reason.loop.partition import join, split
from rl_reason.loop.parts import Parts
from rl_reason.loop.update import apply_gradient
from rl_reason.masked import masked_mean
from rl_reason.models import transformer
from rl_reason.models.attention import causal_attention, packed_attention
from rl_reason.models.head import score_tokens
from rl_reason.models.transformer import ModelConfig
from rl_reason.types import Metrics, TrainState, struct


@struct
class Demonstrations:
    """Prompt and worked solution in one row; the loss is on the solution."""

    tokens: Int[Array, "*K N T"]
    loss_mask: Bool[Array, "*K N T"]
    segments: Int[Array, "*K N T"] | None = None  # packed rows: which of a row's examples a token is of; 0 is padding


def negative_log_likelihood(
    params: PyTree, batch: Demonstrations, model: ModelConfig
) -> tuple[Float[Array, ""], Metrics]:
    """Token-mean -log p of what ``loss_mask`` marks, in nats; column t is scored by column t - 1's output."""
    rows, width = batch.tokens.shape
    if batch.segments is None:
        last = jnp.max(jnp.where(batch.loss_mask, jnp.arange(width), 0), axis=1, keepdims=True)
        valid, attend = jnp.arange(width) <= last, causal_attention
    else:
        valid, attend = batch.segments > 0, packed_attention(batch.segments)
    hidden = transformer.forward(params, batch.tokens, valid, model, attend).hidden[:, :-1]
    logprobs, entropy = score_tokens(
        hidden.reshape(rows * (width - 1), -1),
        transformer.unembedding(params, model),
        batch.tokens[:, 1:].reshape(-1),
        1.0,
        model.final_soft_cap or None,
    )
    mask = batch.loss_mask[:, 1:].reshape(-1)
    loss = -masked_mean(logprobs, mask)
    return loss, {"sft/loss": loss, "sft/entropy": masked_mean(entropy, mask)}


def make_chunk(parts: Parts) -> Callable:
    """(state, batches [K N T]) -> (state, stacked metrics): K optimizer steps as one scan."""

    def step(state: TrainState, batch: Demonstrations):
        learned, fixed = split(state.params, parts.frozen)
        loss_of = lambda learned: negative_log_likelihood(join(learned, fixed), batch, parts.model)
        (loss, metrics), grads = jax.value_and_grad(loss_of, has_aux=True)(learned)
        state, applied = apply_gradient(parts, state, loss, grads)
        state = dataclasses.replace(state, step=state.step + 1)
        return state, metrics | applied

    return lambda state, batches: jax.lax.scan(step, state, batches)


def make_packed_chunk(parts: Parts) -> Callable:
    """``make_chunk`` on packed rows, with the metrics that every training loop gives."""

    def supervised_chunk(state: TrainState, batches: Demonstrations):
        assert batches.segments is not None
        state, metrics = make_chunk(parts)(state, batches)
        steps, rows, width = batches.tokens.shape
        as_float = lambda x: x.astype(metrics["sft/loss"].dtype)
        used = as_float((batches.segments > 0).sum((1, 2)))
        return state, metrics | {
            "training/global_step": as_float(state.step - steps + 1 + jnp.arange(steps)),
            "perf/total_num_tokens": used,
            "sft/predicted_tokens": as_float(batches.loss_mask.sum((1, 2))),
            "sft/examples": as_float(batches.segments.max(2).sum(1)),
            "sft/packing_efficiency": used / (rows * width),
        }

    return supervised_chunk

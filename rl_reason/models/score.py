"""Scoring given completions with the trainer's forward: log-probabilities and entropy, [N T]."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from rl_reason.models import transformer
from rl_reason.models.head import score_tokens
from rl_reason.models.moe import RouterStatistics
from rl_reason.models.transformer import ModelConfig
from rl_reason.sharding import constrain_rows
from rl_reason.types import struct


@struct
class Scores:
    """What a forward over rows says of their completion tokens; 0 off the completion. Router sums are over all rows."""

    logprobs: Float[Array, "N T"]  # nats, full vocabulary, at the rollout temperature
    entropy: Float[Array, "N T"]  # nats, same distribution; differentiable
    router: RouterStatistics | None


def score(
    params: PyTree,
    tokens: Int[Array, "N T"],
    prompt_len: Int[Array, " N"],
    completion_mask: Bool[Array, "N T"],
    temperature: Float[Array, ""],
    config: ModelConfig,
    completion_len: int,
    expert_ids: Int[Array, "N LK T"] | None = None,
) -> Scores:
    """Teacher-forced scores; the vocabulary head runs on the ``completion_len`` positions after each prompt only.

    ``expert_ids`` are replayed, see ``transformer.forward``.
    """
    width = tokens.shape[1]
    end = jnp.max(jnp.where(completion_mask, jnp.arange(width) + 1, prompt_len[:, None]), axis=1)
    valid = jnp.arange(width) < end[:, None]
    out = transformer.forward(params, tokens, valid, config, expert_ids=expert_ids)
    steps = jnp.arange(completion_len)
    predicts = jnp.minimum(prompt_len[:, None] - 1 + steps, width - 1)  # the column whose output scores the next token
    hidden = jnp.take_along_axis(out.hidden, predicts[..., None], axis=1)
    targets = jnp.take_along_axis(tokens, jnp.minimum(predicts + 1, width - 1), axis=1)
    logprobs, entropy = score_tokens(
        constrain_rows(hidden).reshape(-1, hidden.shape[-1]),
        transformer.unembedding(params, config),
        targets.reshape(-1),
        temperature,
        config.final_soft_cap or None,
    )
    offset = jnp.clip(jnp.arange(width) - prompt_len[:, None], 0, completion_len - 1)

    def place(x):
        x = jnp.take_along_axis(constrain_rows(x.reshape(targets.shape)), offset, axis=1)
        return jnp.where(completion_mask, x, 0.0)

    return Scores(place(logprobs), place(entropy), out.router)

"""Rows that nobody sampled: worked solutions joined to the groups of their prompts (LUFFY, arXiv:2504.14945)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from rl_reason.batch import BatchPlan
from rl_reason.rollout import RolloutConfig
from rl_reason.sharding import constrain_rows
from rl_reason.types import Prompts, Rollout
from rl_reason.written import shifted


def demonstration_rows(prompts: Prompts, copies: int, rollout: RolloutConfig) -> Rollout:
    """Each prompt's demonstration as a rollout row, ``copies`` times: off-policy, with rollout log-probabilities of 0.

    Raises:
        ValueError: prompts without demonstrations, or demonstrations longer than completions may be.
    """
    if prompts.demonstration is None:
        raise ValueError("config.batch.demonstrations asks for worked solutions, which the prompts do not bring.")
    batch, longest = prompts.demonstration.shape
    if longest > rollout.completion_len:
        raise ValueError(
            f"data.max_demonstration_len_tokens={longest} is more than rollout.completion_len={rollout.completion_len}."
        )
    width = prompts.tokens.shape[1] + rollout.completion_len
    offset = jnp.arange(width) - prompts.prompt_len[:, None]
    worked = shifted(prompts.demonstration, prompts.prompt_len, width)
    length = jnp.sum(prompts.demonstration != rollout.pad_id, axis=1, keepdims=True)
    mask = (offset >= 0) & (offset < length)
    prompt = jnp.pad(prompts.tokens, ((0, 0), (0, rollout.completion_len)), constant_values=rollout.pad_id)
    tokens = jnp.where(mask, worked, jnp.where(offset < 0, prompt, rollout.pad_id))
    zeros = jnp.zeros(tokens.shape, jnp.result_type(float))
    once = Rollout(
        tokens=tokens,
        prompt_len=prompts.prompt_len,
        completion_mask=mask,
        rollout_logprobs=zeros,
        sampled_logprobs=zeros,
        prompt_id=jnp.arange(batch, dtype=jnp.int32),
        truncated=jnp.zeros(batch, bool),
        off_policy=jnp.ones(batch, bool),
    )
    return jax.tree.map(lambda x: jnp.repeat(x, copies, axis=0), once)


def join_groups(sampled: Rollout, demonstrations: Rollout, plan: BatchPlan) -> Rollout:
    """Demonstrations after the samples of their group: rows are prompt-major again, ``group_size`` a prompt."""

    def join(a: Array, b: Array) -> Array:
        groups = [x.reshape(-1, size, *x.shape[1:]) for x, size in ((a, plan.num_samples), (b, plan.demonstrations))]
        joined = jnp.concatenate([groups[0], groups[1].astype(a.dtype)], axis=1)
        return constrain_rows(joined.reshape(-1, *a.shape[1:]))

    return jax.tree.map(join, sampled, demonstrations)

"""The compiled loop: one fused step, and ``jax.lax.scan`` over it.

A step samples in one round or, with a filter that drops groups, in up to max_rounds: a bounded loop that fills a static
buffer and trains on what there is when it ends.
"""

import dataclasses
import typing
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, PyTree

from rl_reason.loop import waiting
from rl_reason.loop.parts import Parts
from rl_reason.loop.step import (
    Sampled,
    Selected,
    choose_rows,
    compact_groups,
    learn_phase,
    reward_phase,
    rollout_metrics,
    sample_phase,
    sampled_rows,
    train_phase,
)
from rl_reason.sampling import Sampling
from rl_reason.sharding import constrain_rows
from rl_reason.types import Metrics, Prompts, Rollout, TrainState, Verdicts, Verify


class Round(typing.NamedTuple):
    """What rounds of sampling have gathered so far."""

    selected: Selected
    metrics: Metrics
    sampled: Sampled
    kept: Bool[Array, "*rounds B"]  # groups with a row to train on, placed or not


def kept_groups(gathered: Round) -> Int[Array, ""]:
    """How many groups have a row to train on."""
    return gathered.kept.sum(dtype=jnp.int32)


def judge(
    parts: Parts,
    state: TrainState,
    prompts: Prompts,
    rollout: Rollout,
    verdicts: Verdicts,
    decode_steps: Int[Array, ""],
    sampling: Sampling,
) -> Round:
    """Rewards, selection and metrics of one round."""
    rewards, trained = reward_phase(parts, state, prompts, rollout, verdicts, sampling)
    metrics = rollout_metrics(parts, rollout, rewards, decode_steps)
    metrics["train/num_gen_batches"] = jnp.ones((), metrics["response_length/mean"].dtype)
    selected = choose_rows(parts, state, trained, rewards)
    kept = selected.keep.reshape(-1, parts.plan.train_group_size).any(1)
    return Round(selected, metrics, sampled_rows(parts, prompts, rollout, rewards), kept)


def merge(parts: Parts, so_far: Round, new: Round) -> Round:
    """Both rounds' groups, kept ones first, as many as a step trains on; metrics averaged over all rounds."""
    joined = jax.tree.map(lambda a, b: constrain_rows(jnp.concatenate([a, b])), so_far.selected[:3], new.selected[:3])
    rounds = so_far.metrics["train/num_gen_batches"]

    def average(name: str, old: Array, fresh: Array) -> Array:
        if name == "train/num_gen_batches":
            return old + fresh
        if name.endswith("/max"):
            return jnp.where(rounds > 0, jnp.maximum(old, fresh), fresh)
        if name.endswith("/min"):
            return jnp.where(rounds > 0, jnp.minimum(old, fresh), fresh)
        return (old * rounds + fresh) / (rounds + 1)

    metrics = {name: average(name, so_far.metrics[name], fresh) for name, fresh in new.metrics.items()}
    selected = Selected(joined[0], joined[1], joined[2], new.selected.stats)
    kept = so_far.kept.at[rounds.astype(jnp.int32)].set(new.kept)
    return Round(compact_groups(parts, selected), metrics, new.sampled, kept)


def nothing_yet(parts: Parts, like: PyTree) -> Round:
    """An empty buffer for ``merge``, from the shapes of a round."""
    rows = parts.plan.rows
    empty = jax.tree.map(lambda x: jnp.zeros((rows, *x.shape[1:]), x.dtype), like.selected[:3])
    zeros = lambda tree: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), tree)
    selected = Selected(empty[0], empty[1], empty[2], zeros(like.selected.stats))
    kept = jnp.zeros((parts.plan.max_rounds, parts.plan.generated_prompts), bool)
    return Round(selected, zeros(like.metrics), zeros(like.sampled), kept)


def line_up(parts: Parts, stats: Mapping[str, typing.Any], prompts: Prompts) -> Prompts:
    """The prompts of each round of a step, [rounds B ...]."""
    return waiting.line_up(stats.get(waiting.NAME), prompts, parts.plan.max_rounds)


def close(parts: Parts, gathered: Round, drawn: Prompts) -> tuple[Selected, Metrics]:
    """What the rounds of a step leave to train on; kept groups without a place wait for the next one."""
    selected, metrics = gathered.selected, gathered.metrics
    if (queue := selected.stats.get(waiting.NAME)) is not None:
        left = waiting.those_left(queue, drawn, gathered.kept, parts.plan.prompts_per_step)
        selected = selected._replace(stats=selected.stats | {waiting.NAME: left})
        metrics = metrics | {"train/waiting_prompts": left.taken.sum().astype(metrics["response_length/mean"].dtype)}
    return selected, metrics


def _in_rounds(
    parts: Parts, verify: Verify, state: TrainState, prompts: Prompts, sampling: Sampling
) -> tuple[Selected, Metrics, Sampled]:
    rounds = line_up(parts, state.stats, prompts)

    def one(state: TrainState, index: Int[Array, ""]) -> Round:
        drawn = jax.tree.map(lambda x: x[index], rounds)
        rollout, decode_steps = sample_phase(parts, state, drawn, sampling)
        return judge(parts, state, drawn, rollout, verify(rollout, drawn), decode_steps, sampling)

    start = nothing_yet(parts, jax.eval_shape(one, state, jnp.int32(0)))
    start = start._replace(selected=start.selected._replace(stats=state.stats))

    def unfilled(carry: tuple[Int[Array, ""], Round]) -> Array:
        index, so_far = carry
        return (index < parts.plan.max_rounds) & (kept_groups(so_far) < parts.plan.prompts_per_step)

    def body(carry: tuple[Int[Array, ""], Round]) -> tuple[Int[Array, ""], Round]:
        index, so_far = carry
        current = dataclasses.replace(state, stats=so_far.selected.stats)
        return index + 1, merge(parts, so_far, one(current, index))

    gathered = jax.lax.while_loop(unfilled, body, (jnp.int32(0), start))[1]
    return *close(parts, gathered, rounds), gathered.sampled


def make_step(parts: Parts, verify: Verify) -> Callable:
    """The fused step: (state, prompts, sampling) -> (state, (metrics, sampled)); ``verify`` runs inside the program."""

    def step(state: TrainState, prompts: Prompts, sampling: Sampling):
        if parts.plan.in_rounds:
            selected, metrics, sampled = _in_rounds(parts, verify, state, prompts, sampling)
            state, trained = train_phase(parts, state, selected, sampling)
            return state, (metrics | trained, sampled)
        rollout, decode_steps = sample_phase(parts, state, prompts, sampling)
        verdicts = verify(rollout, prompts)
        state, metrics, sampled = learn_phase(parts, state, prompts, rollout, verdicts, decode_steps, sampling)
        return state, (metrics, sampled)

    return step


def make_chunk(parts: Parts, verify: Verify) -> Callable:
    """K fused steps as one scan: prompts carry a leading [K], metrics and samples come back stacked."""
    step = make_step(parts, verify)

    def chunk(state: TrainState, prompts: Prompts, sampling: Sampling):
        return jax.lax.scan(lambda state, drawn: step(state, drawn, sampling), state, prompts)

    return chunk

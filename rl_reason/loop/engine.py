"""Driving the loop from the host: fused chunks, or rollout | verifiers | update in turn or overlapped."""

import dataclasses
import time
import typing
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree

from rl_reason import processes
from rl_reason.loop.chunk import Round, close, judge, kept_groups, line_up, make_chunk, merge, nothing_yet
from rl_reason.loop.parts import Parts
from rl_reason.loop.step import learn_phase, sample_phase, train_phase
from rl_reason.rewards import ScoreRows
from rl_reason.sampling import Sampling
from rl_reason.sharding import ROWS
from rl_reason.types import Prompts, TrainState, Verdicts, Verify


class Advanced(typing.NamedTuple):
    """What some steps gave: metrics and samples stacked over them, on the host, and seconds a step."""

    state: PyTree  # a TrainState; of a cohort, one a policy
    metrics: dict[str, np.ndarray]
    sampled: PyTree  # Sampled, of a cohort one a policy; None where nothing is sampled
    timing: dict[str, float]


class Programs(typing.NamedTuple):
    """What a split step runs on devices. The last four are for filters that sample in several rounds."""

    draw: Callable
    learn: Callable
    judge: Callable
    train: Callable
    merge: Callable
    count: Callable
    line_up: Callable
    close: Callable


def split_programs(parts: Parts) -> Programs:
    """Each a ``jax.jit``, not yet compiled. Nothing that a drawing state holds is dropped from it, used or not: the compiler
    then knows how little memory is left."""

    def draw(state, prompts, sampling):
        return sample_phase(parts, state, prompts, sampling)

    def learn(state, prompts, rollout, verdicts, decode_steps, sampling):
        return learn_phase(parts, state, prompts, rollout, verdicts, decode_steps, sampling)

    def train(state, selected, sampling):
        return train_phase(parts, state, selected, sampling)

    return Programs(
        draw=jax.jit(draw, keep_unused=True),
        learn=jax.jit(learn, donate_argnums=0),
        judge=jax.jit(lambda state, *drawn: judge(parts, state, *drawn), keep_unused=True),
        train=jax.jit(train, donate_argnums=0),
        merge=jax.jit(lambda so_far, new: merge(parts, so_far, new)),
        count=jax.jit(kept_groups),
        line_up=jax.jit(lambda stats, prompts: line_up(parts, stats, prompts)),
        close=jax.jit(lambda gathered, drawn: close(parts, gathered, drawn)),
    )


class Fused:
    """K steps a call as one program, verdicts included."""

    programs: tuple[str, ...] = ("chunk",)  # compiled by the first step, and then never again
    draws_ahead = False
    pending: PyTree = None

    def __init__(self, parts: Parts, verify: Verify):
        self.chunk = jax.jit(make_chunk(parts, verify), donate_argnums=0)

    def advance(self, state: TrainState, prompts: Prompts, sampling: Sampling) -> Advanced:
        """Runs as many steps as ``prompts`` has leading entries; ``state`` is consumed."""
        began = time.perf_counter()
        state, out = self.chunk(state, prompts, sampling)
        metrics, sampled = processes.to_host(out)
        steps = prompts.prompt_len.shape[0]
        return Advanced(state, metrics, sampled, {"step": (time.perf_counter() - began) / steps})


class Split:
    """Rollout, host verifiers and update as programs of their own.

    ``overlap`` draws batch k + 1 while k is being scored, so every update is one step off-policy; the rollout in
    flight is ``pending``, part of what a checkpoint holds.
    """

    programs: tuple[str, ...] = ("draw", "learn", "train")  # compiled by the first step, and then never again

    def __init__(self, parts: Parts, verifier: ScoreRows, mesh: jax.sharding.Mesh, *, overlap: bool):
        self._parts, self._verifier, self._mesh, self.draws_ahead = parts, verifier, mesh, overlap
        self._group_size = parts.plan.group_size
        self.run = split_programs(parts)
        self.pending: PyTree = None

    def prime(self, state: TrainState, prompts: Prompts, sampling: Sampling) -> None:
        """Draws the first batch ahead, from ``prompts`` [B ...]; for engines with ``draws_ahead``."""
        self.pending = (prompts, *self.run.draw(state, prompts, sampling))

    def advance(self, state: TrainState, prompts: Prompts, sampling: Sampling) -> Advanced:
        """Runs as many steps as ``prompts`` has leading entries; overlapped, those are the next steps' batches."""
        one = self._step_in_rounds if self._parts.plan.in_rounds else self._step
        step = lambda state, batch, clock: one(state, batch, sampling, clock)
        state, (metrics, sampled), timing = step_by_step(step, state, prompts)
        return Advanced(state, metrics, sampled, timing)

    def _step(self, state: TrainState, batch: Prompts, sampling: Sampling, clock: "Clock"):
        drawn = (batch, *self.run.draw(state, batch, sampling))
        if self.draws_ahead:
            drawn, self.pending = self.pending, drawn
        batch, rollout, decode_steps = drawn
        jax.block_until_ready(rollout.tokens)
        clock.mark("gen")
        verdicts = self._score(batch, rollout)
        clock.mark("reward")
        state, metrics, sampled = self.run.learn(state, batch, rollout, verdicts, decode_steps, sampling)
        return state, (metrics, sampled)

    def _step_in_rounds(self, state: TrainState, batch: Prompts, sampling: Sampling, clock: "Clock"):
        """Rounds of sampling until enough groups are kept, or max_rounds; as ``chunk`` does inside the program."""
        plan = self._parts.plan
        gathered: Round | None = None
        stats = state.stats
        rounds = self.run.line_up(stats, batch)
        for index in range(plan.max_rounds):
            drawn = jax.tree.map(lambda x, index=index: x[index], rounds)
            current = dataclasses.replace(state, stats=stats)
            rollout, decode_steps = self.run.draw(current, drawn, sampling)
            jax.block_until_ready(rollout.tokens)
            clock.mark("gen")
            verdicts = self._score(drawn, rollout)
            clock.mark("reward")
            new = self.run.judge(current, drawn, rollout, verdicts, decode_steps, sampling)
            if gathered is None:
                empty = nothing_yet(self._parts, new)
                gathered = empty._replace(selected=empty.selected._replace(stats=stats))
            gathered = typing.cast(Round, self.run.merge(gathered, new))
            stats = gathered.selected.stats
            if int(self.run.count(gathered)) >= plan.prompts_per_step:
                break
        assert gathered is not None
        selected, metrics = self.run.close(gathered, rounds)
        # The state is donated: statistics that it shares with what was gathered must be arrays of their own.
        selected = selected._replace(stats=jax.tree.map(jnp.copy, selected.stats))
        state, trained = self.run.train(state, selected, sampling)
        return state, (metrics | trained, gathered.sampled)

    def _score(self, batch: Prompts, rollout) -> Verdicts:
        """Each row is scored by the one process that owns it; then all processes are told."""
        uid = np.repeat(processes.to_host(batch.uid), self._group_size)
        index, tokens = processes.own_rows(rollout.tokens)
        _, mask = processes.own_rows(rollout.completion_mask)
        found = self._verifier(tokens, mask, uid[index])  # score, valid, and answers where they are wanted
        return verdicts_everywhere(found, index, len(uid), rollout.rollout_logprobs.dtype, self._mesh)


def verdicts_everywhere(
    found: Sequence[np.ndarray], index: np.ndarray, rows: int, dtype: typing.Any, mesh: jax.sharding.Mesh
) -> Verdicts:
    """What each process found of its own rows (score, valid, and answers where there are some), as global arrays."""
    everywhere = np.zeros((len(found), rows), np.float32)
    everywhere[:, index] = found
    score, valid, *answers = processes.sum_over_processes(everywhere)
    sharding = NamedSharding(mesh, P(ROWS))
    put = lambda x: jax.make_array_from_callback(x.shape, sharding, lambda i: x[i])
    numbers = put(answers[0].astype(np.int32)) if answers else None
    return Verdicts(put(score.astype(dtype)), put(valid > 0), numbers)


class Clock:
    """Seconds of a step's parts; what is marked again adds up."""

    def __init__(self):
        self.seconds: dict[str, float] = dict.fromkeys(("gen", "reward", "update_actor"), 0.0)
        self._last = time.perf_counter()

    def mark(self, name: str) -> None:
        """What passed since the last mark was ``name``."""
        now = time.perf_counter()
        self.seconds[name] += now - self._last
        self._last = now


def step_by_step(step: Callable, state: PyTree, prompts: PyTree) -> tuple[PyTree, PyTree, dict[str, float]]:
    """Drives ``step(state, batch, clock) -> (state, out)`` over the leading axis of ``prompts``.

    Returns the state, what the steps gave, stacked and on the host, and seconds a step.
    """
    outputs, clocks = [], []
    steps = jax.tree.leaves(prompts)[0].shape[0]
    for k in range(steps):
        clock = Clock()
        state, out = step(state, jax.tree.map(lambda x, k=k: x[k], prompts), clock)
        outputs.append(processes.to_host(out))
        clock.mark("update_actor")
        clocks.append(clock.seconds | {"step": sum(clock.seconds.values())})
    timing = {name: sum(clock[name] for clock in clocks) / steps for name in clocks[0]}
    return state, jax.tree.map(lambda *x: np.stack(x), *outputs), timing


Engine = Fused | Split

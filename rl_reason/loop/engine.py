"""Driving the loop from the host: fused chunks, or rollout | verifiers | update in turn or overlapped."""

import time
import typing

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree

from rl_reason import processes
from rl_reason.loop.parts import Parts
from rl_reason.loop.step import Sampled, learn_phase, make_chunk, sample_phase
from rl_reason.rewards import ScoreRows
from rl_reason.sampling import Sampling
from rl_reason.sharding import ROWS
from rl_reason.types import Prompts, TrainState, Verdicts, Verify


class Advanced(typing.NamedTuple):
    """What some steps gave: metrics and samples stacked over them, on the host, and seconds a step."""

    state: TrainState
    metrics: dict[str, np.ndarray]
    sampled: Sampled
    timing: dict[str, float]


class Fused:
    """K steps a call as one program, verdicts included."""

    draws_ahead = False
    pending: PyTree = None

    def __init__(self, parts: Parts, verify: Verify):
        self._chunk = jax.jit(make_chunk(parts, verify), donate_argnums=0)

    def advance(self, state: TrainState, prompts: Prompts, sampling: Sampling) -> Advanced:
        """Runs as many steps as ``prompts`` has leading entries; ``state`` is consumed."""
        began = time.perf_counter()
        state, out = self._chunk(state, prompts, sampling)
        metrics, sampled = processes.to_host(out)
        steps = prompts.prompt_len.shape[0]
        return Advanced(state, metrics, sampled, {"step": (time.perf_counter() - began) / steps})


class Split:
    """Rollout, host verifiers and update as programs of their own.

    ``overlap`` draws batch k + 1 while k is being scored, so every update is one step off-policy; the rollout in
    flight is ``pending``, part of what a checkpoint holds.
    """

    def __init__(self, parts: Parts, verifier: ScoreRows, mesh: jax.sharding.Mesh, *, overlap: bool):
        self._verifier, self._mesh, self.draws_ahead = verifier, mesh, overlap
        self._draw = jax.jit(lambda state, prompts, sampling: sample_phase(parts, state, prompts, sampling))
        self._learn = jax.jit(
            lambda state, prompts, rollout, verdicts, decode_steps, sampling: learn_phase(
                parts, state, prompts, rollout, verdicts, decode_steps, sampling
            ),
            donate_argnums=0,
        )
        self._group_size = parts.plan.group_size
        self.pending: PyTree = None

    def prime(self, state: TrainState, prompts: Prompts, sampling: Sampling) -> None:
        """Draws the first batch ahead, from ``prompts`` [B ...]; for engines with ``draws_ahead``."""
        self.pending = (prompts, *self._draw(state, prompts, sampling))

    def advance(self, state: TrainState, prompts: Prompts, sampling: Sampling) -> Advanced:
        """Runs as many steps as ``prompts`` has leading entries; overlapped, those are the next steps' batches."""
        outputs, timing = [], dict.fromkeys(("gen", "reward", "update_actor", "step"), 0.0)
        steps = prompts.prompt_len.shape[0]
        for k in range(steps):
            began = time.perf_counter()
            batch = jax.tree.map(lambda x, k=k: x[k], prompts)
            drawn = (batch, *self._draw(state, batch, sampling))
            if self.draws_ahead:
                drawn, self.pending = self.pending, drawn
            batch, rollout, decode_steps = drawn
            jax.block_until_ready(rollout.tokens)
            generated = time.perf_counter()
            verdicts = self._score(batch, rollout)
            scored = time.perf_counter()
            state, metrics, sampled = self._learn(state, batch, rollout, verdicts, decode_steps, sampling)
            outputs.append(processes.to_host((metrics, sampled)))
            ended = time.perf_counter()
            spans = (generated - began, scored - generated, ended - scored, ended - began)
            for name, seconds in zip(timing, spans, strict=True):
                timing[name] += seconds / steps
        metrics, sampled = jax.tree.map(lambda *x: np.stack(x), *outputs)
        return Advanced(state, metrics, sampled, timing)

    def _score(self, batch: Prompts, rollout) -> Verdicts:
        """Each row is scored by the one process that owns it; then all processes are told."""
        uid = np.repeat(processes.to_host(batch.uid), self._group_size)
        index, tokens = processes.own_rows(rollout.tokens)
        _, mask = processes.own_rows(rollout.completion_mask)
        score, valid = self._verifier(tokens, mask, uid[index])
        both = np.zeros((2, len(uid)), np.float32)
        both[0, index], both[1, index] = score, valid
        score, valid = processes.sum_over_processes(both)
        sharding = NamedSharding(self._mesh, P(ROWS))
        put = lambda x: jax.make_array_from_callback(x.shape, sharding, lambda i: x[i])
        return Verdicts(put(score.astype(rollout.rollout_logprobs.dtype)), put(valid > 0))


Engine = Fused | Split

"""Driving the RL loop: prompts in, engines that draw, judge and learn, samples out."""

import typing
from collections.abc import Iterator

import jax
from jaxtyping import PyTree

from rl_reason import build, processes, rewards
from rl_reason.data.stream import prompt_stream
from rl_reason.drivers.base import Driver
from rl_reason.loop.engine import Advanced, Engine, Fused, Split
from rl_reason.loop.step import Sampled
from rl_reason.types import Prompts, TrainState
from rl_reason.verifier_pool import VerifierPool


class Reinforcement(Driver):
    """Chunks of RL steps on the config's prompts."""

    phase: str = "rl"

    def __init__(self, experiment: build.Experiment, pool: VerifierPool):
        self._experiment = experiment
        config, plan = experiment.config, experiment.parts.plan
        self._verifier = rewards.HostVerifier(
            experiment.train,
            experiment.tokenizer,
            pool,
            answer_rule=experiment.answer_rule,
            group_size=plan.group_size,
        )
        self._engine: Engine = make_engine(experiment, self._verifier)
        self.programs: tuple[str, ...] = self._engine.programs
        self._rows = build.rows_sharding(experiment.mesh)
        self._stream = make_stream(experiment, processes.local_rows(self._rows, plan.prompts_drawn))
        self._steps = config.steps_per_call

    @property
    def pending(self) -> PyTree:
        return self._engine.pending

    @pending.setter
    def pending(self, value: PyTree) -> None:
        self._engine.pending = value

    def initial_state(self, params: PyTree) -> TrainState:
        return build.init_state(self._experiment, self._experiment.parts, params)

    def prime(self, state: TrainState) -> None:
        if isinstance(self._engine, Split) and self._engine.draws_ahead:
            prompts = processes.to_global(next(self._stream), self._rows)
            self._engine.prime(state, prompts, self._experiment.sampling)

    def advance(self, state: TrainState) -> Advanced:
        prompts: Prompts = self._drawn(self._steps)
        return self._engine.advance(state, prompts, self._experiment.sampling)

    def records(self, out: Advanced, step: int) -> Iterator[dict[str, typing.Any]]:
        return rollout_records(self._experiment, jax.tree.map(lambda x: x[step], out.sampled))


def make_stream(experiment: build.Experiment, rows: range):
    """The prompts of each step, with what the slots read of them besides."""
    widths = experiment.parts.prompt_widths
    return prompt_stream(
        experiment.train,
        experiment.tokenizer,
        batch_size=experiment.parts.plan.prompts_drawn,
        prompt_len=widths.prompt,
        reference_len=widths.reference,
        demonstration_len=widths.demonstration,
        rows=rows,
    )


def make_engine(experiment: build.Experiment, host_verifier: rewards.ScoreRows) -> Engine:
    """The composition that ``config.verify`` names."""
    parts, plan, mode = experiment.parts, experiment.parts.plan, experiment.config.verify
    if mode == "graph":
        verify = rewards.in_graph(
            experiment.train.names,
            experiment.tokenizer,
            group_size=plan.group_size,
            completion_len=parts.rollout.completion_len,
            answer_rule=experiment.answer_rule,
        )
        return Fused(parts, verify)
    if mode == "callback":
        width = experiment.config.data.max_prompt_len_tokens + parts.rollout.completion_len
        rewards.check_callback_threads(plan.generated_prompts * plan.group_size * width * 5, experiment.mesh)
        ask = rewards.by_callback(
            host_verifier,
            experiment.mesh,
            group_size=plan.group_size,
            with_answers=experiment.answer_rule is not None,
        )
        return Fused(parts, ask)
    return Split(parts, host_verifier, experiment.mesh, overlap=mode == "overlapped")


def rollout_records(experiment: build.Experiment, sampled: Sampled) -> Iterator[dict[str, typing.Any]]:
    """verl's rollout fields, from a step's samples."""
    group_size = experiment.parts.plan.group_size
    for row in range(len(sampled.uid)):
        uid = int(sampled.uid[row])
        example = experiment.train.example(uid)
        mask = sampled.completion_mask[row]
        ids = sampled.tokens[row][mask]
        yield {
            "input": example.prompt,
            "output": experiment.tokenizer.decode(ids),
            "gts": example.reference,
            "score": float(sampled.reward[row]) if sampled.valid[row] else None,
            "correct": bool(sampled.correct[row]),
            "data_source": example.source,
            "group_id": uid,
            "sample_id": row % group_size,
            "finish_reason": _finish_reason(sampled, row),
            "token_ids": [int(i) for i in ids],
            "logprobs": [float(x) for x in sampled.rollout_logprobs[row][mask]],
        }


def _finish_reason(sampled: Sampled, row: int) -> str:
    if sampled.off_policy[row]:
        return "demonstration"
    return "length" if sampled.truncated[row] else "stop"

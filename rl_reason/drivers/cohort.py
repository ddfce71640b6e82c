"""Driving a cohort: the same prompts to all policies, their vote, and the samples of each."""

import typing
from collections.abc import Iterator

import jax
import numpy as np
from jaxtyping import PyTree

from rl_reason import build, processes, rewards
from rl_reason.drivers.base import Driver
from rl_reason.drivers.reinforcement import make_stream, rollout_records
from rl_reason.loop import cohort
from rl_reason.loop.engine import Advanced
from rl_reason.tasks.answer_ids import make_answer_ids
from rl_reason.types import Prompts


class Cohort(Driver):
    """Chunks of steps of several policies that vote on each other's answers.

    The state is a ``TrainState`` by policy.
    """

    phase: str = "cohort"

    def __init__(self, experiment: build.Experiment):
        self._experiment = experiment
        plan, tokenizer = experiment.parts.plan, experiment.tokenizer
        verify = rewards.in_graph(
            experiment.train.names,
            tokenizer,
            group_size=plan.group_size,
            completion_len=experiment.parts.rollout.completion_len,
        )
        policies = {name: policy.parts for name, policy in experiment.policies.items()}
        spell = make_answer_ids(tokenizer, rule=experiment.config.answer_rule)
        vote = experiment.parts.slots["reward"]
        assert vote is not None
        self._engine = cohort.Cohort(policies, verify, spell, vote.fn)
        self.programs: tuple[str, ...] = self._engine.programs
        rows = build.rows_sharding(experiment.mesh)
        self._stream = make_stream(experiment, processes.local_rows(rows, plan.prompts_drawn))

    def initial_state(self, params: PyTree) -> cohort.States:
        policies = self._experiment.policies
        return {name: build.init_state(policy, policy.parts, params[name]) for name, policy in policies.items()}

    def advance(self, state: cohort.States) -> Advanced:
        drawn = [next(self._stream) for _ in range(self._experiment.config.steps_per_call)]
        stacked = jax.tree.map(lambda *x: np.stack(x), *drawn)
        prompts: Prompts = processes.to_global(stacked, build.rows_sharding(self._experiment.mesh, leading=1))
        return self._engine.advance(state, prompts, self._experiment.sampling)

    def records(self, out: Advanced, step: int) -> Iterator[dict[str, typing.Any]]:
        """Those of ``rollout_records`` with their ``policy``; ``sample_id`` counts through all policies of a group."""
        group_size = self._experiment.parts.plan.group_size
        for number, (name, sampled) in enumerate(out.sampled.items()):
            for record in rollout_records(self._experiment, jax.tree.map(lambda x: x[step], sampled)):
                yield record | {"policy": name, "sample_id": number * group_size + record["sample_id"]}

    def skipped_in_a_row(self, state: cohort.States) -> int:
        return max(int(own.stats["skipped_in_a_row"]) for own in state.values())

    def policy(self, state: cohort.States) -> dict[str, PyTree]:
        return {name: own.params for name, own in state.items()}

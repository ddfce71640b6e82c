"""Driving a cohort: the same prompts to all policies, their vote, and the samples of each."""

import dataclasses
import typing
from collections.abc import Iterator, Mapping

import jax
from jaxtyping import PyTree

from rl_reason import build, processes, rewards
from rl_reason.drivers.base import Driver, Stream
from rl_reason.drivers.reinforcement import make_stream, rollout_records
from rl_reason.loop import cohort
from rl_reason.loop.engine import Advanced
from rl_reason.tasks.answer_ids import make_answer_ids
from rl_reason.types import Prompts
from rl_reason.verifier_pool import VerifierPool


class Together:
    """Streams that stand at the same place, as one of dictionaries."""

    def __init__(self, streams: Mapping[str, Stream]):
        self._streams = streams

    def __next__(self) -> dict[str, typing.Any]:
        return {name: next(stream) for name, stream in self._streams.items()}

    def get_state(self) -> typing.Any:
        return next(iter(self._streams.values())).get_state()

    def set_state(self, state: typing.Any) -> None:
        for stream in self._streams.values():
            stream.set_state(state)


def in_graph(experiment: build.Experiment) -> cohort.Read:
    """Verdicts and answers on token ids, of the tokenizer that all policies share."""
    tokenizer = next(iter(experiment.policies.values())).tokenizer
    verify = rewards.in_graph(
        experiment.train.names,
        tokenizer,
        group_size=experiment.parts.plan.group_size,
        completion_len=experiment.parts.rollout.completion_len,
    )
    return cohort.Read(verify, make_answer_ids(tokenizer, rule=experiment.config.answer_rule))


class Cohort(Driver):
    """Chunks of steps of several policies that vote on each other's answers.

    The state is a ``TrainState`` by policy.
    """

    phase: str = "cohort"

    def __init__(self, experiment: build.Experiment, pool: VerifierPool):
        self._experiment = experiment
        read: cohort.Read | rewards.CohortVerifier
        if experiment.config.verify == "split":
            self._verifier = read = rewards.CohortVerifier(
                experiment.train,
                {name: policy.tokenizer for name, policy in experiment.policies.items()},
                pool,
                answer_rule=experiment.config.answer_rule,
                samples=experiment.parts.plan.group_size,
            )
        else:
            read = in_graph(experiment)
        policies = {name: policy.parts for name, policy in experiment.policies.items()}
        vote = experiment.parts.slots["reward"]
        assert vote is not None
        self._engine = cohort.Cohort(policies, read, vote.fn, experiment.mesh)
        self.programs: tuple[str, ...] = self._engine.programs
        rows = processes.local_rows(build.rows_sharding(experiment.mesh), experiment.parts.plan.prompts_drawn)
        # The run's own prompts, in each tokenizer's tokens: what data a policy's config names is for its warm-up.
        self._read_by = {
            name: dataclasses.replace(experiment, tokenizer=policy.tokenizer)
            for name, policy in experiment.policies.items()
        }
        self._stream = Together({self._tokenizer(name): make_stream(own, rows) for name, own in self._read_by.items()})

    def initial_state(self, params: PyTree) -> cohort.States:
        policies = self._experiment.policies
        return {name: build.init_state(policy, policy.parts, params[name]) for name, policy in policies.items()}

    def advance(self, state: cohort.States) -> Advanced:
        prompts: Mapping[str, Prompts] = self._drawn(self._experiment.config.steps_per_call)
        own = {name: prompts[self._tokenizer(name)] for name in self._read_by}
        return self._engine.advance(state, own, self._experiment.sampling)

    def _tokenizer(self, name: str) -> str:
        return self._experiment.policies[name].config.tokenizer

    def records(self, out: Advanced, step: int) -> Iterator[dict[str, typing.Any]]:
        """Those of ``rollout_records`` with their ``policy``; ``sample_id`` counts through all policies of a group."""
        group_size = self._experiment.parts.plan.group_size
        for number, (name, sampled) in enumerate(out.sampled.items()):
            for record in rollout_records(self._read_by[name], jax.tree.map(lambda x: x[step], sampled)):
                yield record | {"policy": name, "sample_id": number * group_size + record["sample_id"]}

    def skipped_in_a_row(self, state: cohort.States) -> int:
        return max(int(own.stats["skipped_in_a_row"]) for own in state.values())

    def policy(self, state: cohort.States) -> dict[str, PyTree]:
        return {name: own.params for name, own in state.items()}

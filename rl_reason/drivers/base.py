"""What ``train`` asks of a loop, and what is the same for most of them."""

import abc
import dataclasses
import time
import typing
from collections.abc import Callable, Iterator

import jax
import numpy as np
from jaxtyping import PyTree

from rl_reason import build, processes, rewards
from rl_reason.loop.engine import Advanced
from rl_reason.loop.partition import join, split
from rl_reason.models import lora
from rl_reason.types import TrainState


@typing.runtime_checkable
class Stream(typing.Protocol):
    """Endless batches that know where they stand."""

    def __next__(self) -> typing.Any: ...
    def get_state(self) -> typing.Any: ...
    def set_state(self, state: typing.Any) -> None: ...


def run_chunk(chunk: Callable, state: PyTree, batches: PyTree, steps: int) -> Advanced:
    """``chunk(state, batches) -> (state, metrics)``, timed until the metrics are here."""
    began = time.perf_counter()
    state, metrics = chunk(state, batches)
    metrics = processes.to_host(metrics)
    return Advanced(state, metrics, None, {"step": (time.perf_counter() - began) / steps})


def _is_state(x: typing.Any) -> bool:
    return isinstance(x, TrainState)


class Driver(abc.ABC):
    """One kind of loop: it makes the state, advances it by chunks of steps, and says what those were like.

    ``state`` is the loop's own, a ``TrainState`` or several; what is not abstract here is right for one. All processes call
    every method together.
    """

    _experiment: build.Experiment
    phase: str  # what the progress bar calls it
    programs: tuple[str, ...]  # compiled by the first step, and then never again
    pending: PyTree = None  # what else a checkpoint has to hold, such as a rollout in flight
    _stream: Stream
    _verifier: rewards.HostVerifier | rewards.CohortVerifier | None = None  # where the host is asked

    @abc.abstractmethod
    def initial_state(self, params: PyTree) -> PyTree:
        """A sharded state at step 0; ``params`` is copied."""

    @abc.abstractmethod
    def advance(self, state: PyTree) -> Advanced:
        """``steps_per_call`` steps; ``state`` is consumed."""

    def _drawn(self, steps: int) -> PyTree:
        """The stream's next batches, stacked along a leading axis and on the devices."""
        stacked = jax.tree.map(lambda *x: np.stack(x), *(next(self._stream) for _ in range(steps)))
        return processes.to_global(stacked, build.rows_sharding(self._experiment.mesh, leading=1))

    def prime(self, state: PyTree) -> None:
        """Makes ``pending`` from the next batch: before step 0, or for its shapes, before a checkpoint fills it."""
        del state

    def records(self, out: Advanced, step: int) -> Iterator[dict[str, typing.Any]]:
        """Samples of the ``step``-th of these steps, as rows of ``rollouts/``; none where nothing is sampled."""
        del out, step
        return iter(())

    def complaint(self, row: dict[str, float]) -> str | None:
        """What to warn of after a chunk that ended with these metrics."""
        if self._verifier is not None and row["reward/error_fraction"] > 0 and self._verifier.last_error:
            return f"a verifier failed: {self._verifier.last_error}"
        return None

    def skipped_in_a_row(self, state: PyTree) -> int:
        """Updates in a row without a finite gradient."""
        return int(state.stats["skipped_in_a_row"])

    def policy(self, state: PyTree) -> PyTree:
        """The parameters to evaluate; of a cohort, by policy."""
        return state.params

    def kept(self, state: PyTree) -> PyTree:
        """What a checkpoint holds of a state: where adapters learn, nothing of the base."""
        if self._experiment.parts.lora is None:
            return state
        adapters = lambda own: dataclasses.replace(own, params=split(own.params, [lora.BASE])[0])
        return jax.tree.map(adapters, state, is_leaf=_is_state)

    def around_base(self, kept: PyTree, state: PyTree) -> PyTree:
        """What a checkpoint held, around the base of ``state``."""
        if self._experiment.parts.lora is None:
            return kept
        whole = lambda a, b: dataclasses.replace(a, params=join(a.params, split(b.params, [lora.BASE])[1]))
        return jax.tree.map(whole, kept, state, is_leaf=_is_state)

    def position(self) -> typing.Any:
        """Where the data is, as JSON."""
        return self._stream.get_state()

    def seek(self, position: typing.Any) -> None:
        """Goes to where ``position`` said."""
        self._stream.set_state(position)

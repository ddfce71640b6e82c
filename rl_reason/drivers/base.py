"""What ``train`` asks of a loop."""

import typing
from collections.abc import Iterator

from jaxtyping import PyTree

from rl_reason.loop.engine import Advanced


class Driver(typing.Protocol):
    """One kind of loop: it makes the state, advances it by chunks of steps, and says what those were like.

    ``state`` is the loop's own: a ``TrainState``, or several. All processes call every method together.
    """

    phase: str  # what the progress bar calls it
    programs: tuple[str, ...]  # compiled by the first step, and then never again

    @property
    def pending(self) -> PyTree:
        """What else a checkpoint has to hold, such as a rollout in flight."""
        ...

    @pending.setter
    def pending(self, value: PyTree) -> None: ...

    def initial_state(self, params: PyTree) -> PyTree:
        """A sharded state at step 0; ``params`` is copied."""
        ...

    def prime(self, state: PyTree) -> None:
        """Makes ``pending`` from the next batch: before step 0, or for its shapes, before a checkpoint fills it."""
        ...

    def advance(self, state: PyTree) -> Advanced:
        """``steps_per_call`` steps; ``state`` is consumed."""
        ...

    def records(self, out: Advanced, step: int) -> Iterator[dict[str, typing.Any]]:
        """Samples of the ``step``-th of these steps, as rows of ``rollouts/``; none where nothing is sampled."""
        ...

    def complaint(self, row: dict[str, float]) -> str | None:
        """What to warn of after a chunk that ended with these metrics."""
        ...

    def skipped_in_a_row(self, state: PyTree) -> int:
        """Updates in a row without a finite gradient."""
        ...

    def policy(self, state: PyTree) -> PyTree:
        """The parameters to evaluate; of a cohort, by policy."""
        ...

    def position(self) -> typing.Any:
        """Where the data is, as JSON."""
        ...

    def seek(self, position: typing.Any) -> None:
        """Goes to where ``position`` said."""
        ...

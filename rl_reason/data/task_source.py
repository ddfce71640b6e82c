"""Endless examples drawn from tasks."""

import bisect
import itertools
import math
import pkgutil
import typing
from collections.abc import Sequence

from rl_reason import tasks as tasks_by_name
from rl_reason.data.example import Example, check_split, digest, mix, permuted
from rl_reason.tasks.base import Task, draw


def load_task(name: str) -> Task:
    """A task by registered name, or a user's own by import path 'module:attribute'.

    Raises:
        ValueError: when nothing is there, or what is there is not a task.
    """
    if ":" not in name:
        try:
            return tasks_by_name.get(name)
        except KeyError as error:
            raise ValueError(f"data.tasks: {error.args[0]}") from error
    try:
        task = pkgutil.resolve_name(name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"task {name!r}: {error}. Use 'module:attribute', importable from where you run.") from error
    missing = [part for part in ("name", "levels", "problem", "prompt", "solve", "verify") if not hasattr(task, part)]
    if missing:
        raise ValueError(f"task {name!r} lacks {', '.join(missing)}; see rl_reason.tasks.base.Task.")
    return typing.cast(Task, task)


class TaskSource:
    """Problems drawn by key; ``weights`` apply to tasks, a task's levels are equally likely.

    Endless, or the same ``num_examples`` draws again in every epoch, each epoch in an order of its own.

    A demonstration is the oracle's worked completion and a reference its answer.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        *,
        seed: int,
        split: str,
        levels: Sequence[Sequence[int]] | None = None,
        weights: Sequence[float | int] | None = None,
        num_examples: int | None = None,
    ):
        """``levels``: for each task those to draw from (default all); ``weights``: one a task (default equal).

        Raises:
            ValueError: naming the setting that does not fit.
        """
        check_split(split)
        self._tasks = [load_task(name) for name in tasks]
        self._levels = _levels(self._tasks, levels)
        self._cumulative = _cumulative(tasks, weights)
        self._seed, self._split = seed, split
        if num_examples is not None and num_examples < 1:
            raise ValueError(f"data.num_examples={num_examples}; use at least 1, or 0 for an endless supply.")
        self.num_examples: int | None = num_examples
        self.names = tuple(task.name for task in self._tasks)
        self.verifiers = tuple(tasks)
        if len(set(self.names)) < len(self.names):
            raise ValueError(f"data.tasks names a task twice: {', '.join(self.names)}; use data.weights instead.")
        self.fingerprint = digest(
            "tasks", self.verifiers, self.names, self._levels, self._cumulative, seed, split, num_examples
        )

    def example(self, uid: int) -> Example:
        if self.num_examples is not None:
            epoch, place = divmod(uid, self.num_examples)
            uid = permuted(place, self.num_examples, mix(self._seed, epoch)) if epoch else place
        word = mix(self._seed, self._split == "heldout", uid)
        route = bisect.bisect_right(self._cumulative, word / 2**64, hi=len(self._tasks) - 1)
        task, levels = self._tasks[route], self._levels[route]
        level = levels[mix(word) % len(levels)]
        problem = draw(task, level, seed=self._seed, split=self._split, index=uid)
        solution = task.solve(problem)
        return Example(
            source=task.name,
            example_id=problem.content_hash() % 2**31,
            prompt=task.prompt(problem),
            problem=problem,
            demonstration=solution.completion,
            reference=solution.answer,
            verifier=self.verifiers[route],
            route=route,
        )


def _levels(tasks: Sequence[Task], levels: Sequence[Sequence[int]] | None) -> list[tuple[int, ...]]:
    if levels is None:
        return [tuple(task.levels) for task in tasks]
    if len(levels) != len(tasks):
        raise ValueError(
            f"data.levels has {len(levels)} entries for {len(tasks)} tasks; give each its own list, or () for all levels."
        )
    for task, chosen in zip(tasks, levels, strict=True):
        unknown = sorted(set(chosen) - set(task.levels))
        if unknown or not chosen:
            raise ValueError(f"data.levels for {task.name}: {unknown or 'empty'}; it has {list(task.levels)}.")
    return [tuple(chosen) for chosen in levels]


def _cumulative(tasks: Sequence[str], weights: Sequence[float | int] | None) -> list[float]:
    """Upper ends of the tasks' shares of [0, 1)."""
    if not tasks:
        raise ValueError("data.tasks is empty; name at least one task.")
    weights = [1.0] * len(tasks) if weights is None else weights
    if len(weights) != len(tasks):
        raise ValueError(f"data.weights has {len(weights)} entries for {len(tasks)} tasks; give one each.")
    if not all(weight >= 0 and math.isfinite(weight) for weight in weights) or sum(weights) <= 0:
        raise ValueError(f"data.weights={list(weights)}: use finite weights >= 0 that are not all 0.")
    return [total / sum(weights) for total in itertools.accumulate(weights)]

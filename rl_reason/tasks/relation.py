"""How the tasks here are put together: a law of instances, a prompt, an oracle, and at most a witness check.

Answers are canonical ASCII and verified exactly. Integers are ``-?[0-9]+`` without leading zeros or a plus sign; lists
have no spaces; spaces around an answer are dropped, any other character in or around it makes it wrong.
"""

import dataclasses
import typing
from collections.abc import Callable

import numpy as np

from rl_reason.tasks.base import Problem, Solution, Verdict, extract_answer

Data = dict[str, typing.Any]  # JSON: what Problem.data holds
MAX_TRIES = 10_000


@dataclasses.dataclass(frozen=True)
class Relation:
    """A task made of pure functions; ``sizes[i]`` is what ``sample`` gets at level ``i + 1``.

    ``check(answer, data)`` says what is wrong with an answer, nothing when it is right. Without a check the oracle's
    answer is the only right one. All four are named functions of a module, so that a task can be pickled.
    """

    name: str
    sizes: tuple[tuple[int, ...], ...]
    sample: Callable[..., Data]  # (rng, *size)
    ask: Callable[[Data], str]  # the prompt, after the task's name
    work: Callable[[Data], Solution]
    check: Callable[[str, Data], str] | None = None

    @property
    def levels(self) -> tuple[int, ...]:
        return tuple(range(1, len(self.sizes) + 1))

    @property
    def unique(self) -> bool:
        """Whether the oracle's answer is the only right one."""
        return self.check is None

    def problem(self, rng: np.random.Generator, level: int) -> Problem:
        """Draws one. Raises ValueError for a level that the task lacks."""
        if level not in self.levels:
            raise ValueError(f"{self.name} has no level {level!r}; choose one of {list(self.levels)}.")
        return Problem(task=self.name, level=level, data=self.sample(rng, *self.sizes[level - 1]))

    def prompt(self, problem: Problem) -> str:
        return f"{self.name} {self.ask(problem.data)}"

    def solve(self, problem: Problem) -> Solution:
        return self.work(problem.data)

    def verify(self, completion: str, problem: Problem) -> Verdict:
        """1 for a right answer after the last mark, else 0. Never raises, whatever the text."""
        answer = extract_answer(completion)
        if answer is None:
            return Verdict(0.0, True, "no answer mark")
        wrong = self._only(answer, problem.data) if self.check is None else self.check(answer, problem.data)
        return Verdict(float(not wrong), True, wrong or "right")

    def _only(self, answer: str, data: Data) -> str:
        right = self.work(data).answer
        return "" if answer == right else f"{shown(answer)} is not {right}"


def shown(answer: str) -> str:
    """An answer for a message: escaped, and cut short."""
    return ascii(answer if len(answer) <= 40 else answer[:40] + "...")


def digits_of(answer: str, count: int, low: int, high: int) -> list[int] | None:
    """The ``count`` digits of a witness, each in low..high; None for anything else.

    >>> digits_of("0121", 4, 0, 2)
    [0, 1, 2, 1]
    >>> digits_of("012", 4, 0, 2), digits_of("0124", 4, 0, 2), digits_of("012\u0661", 4, 0, 2)
    (None, None, None)
    """
    allowed = set(map(str, range(low, high + 1)))  # ASCII only: str.isdigit takes other scripts' digits
    if len(answer) != count or not allowed.issuperset(answer):
        return None
    return [int(char) for char in answer]


def first_accepted(draw: Callable[[], typing.Any], accept: Callable[[typing.Any], bool]) -> typing.Any:
    """The first draw that is accepted. Raises RuntimeError after MAX_TRIES: the instance law is then at fault."""
    for _ in range(MAX_TRIES):
        drawn = draw()
        if accept(drawn):
            return drawn
    raise RuntimeError(f"no draw accepted in {MAX_TRIES}; loosen the task's sizes.")


def joined(values, separator: str = ",") -> str:
    """``3,5,7``."""
    return separator.join(map(str, values))

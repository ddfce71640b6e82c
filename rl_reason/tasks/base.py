"""What a task is: problems drawn by key, a prompt, an oracle with worked steps, and a verifier.

Host-side and free of jax, so that a verifier process starts in a tenth of a second.
"""

import dataclasses
import hashlib
import json
import typing

import numpy as np

ANSWER_MARK = "####"  # a completion is its worked steps, this mark, and the answer


@dataclasses.dataclass(frozen=True)
class Problem:
    """One instance. ``data`` is JSON (str keys, lists not tuples) and survives a round trip unchanged."""

    task: str
    level: int
    data: dict[str, typing.Any]

    def content_hash(self) -> int:
        """64 bits that depend on what is asked alone, not on the draw that found it."""
        text = json.dumps([self.task, self.data], sort_keys=True, separators=(",", ":"))
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


class Verdict(typing.NamedTuple):
    """``score`` in [0, 1]; ``valid`` False means the verifier failed, not that the answer is wrong."""

    score: float
    valid: bool
    why: str
    parts: tuple[tuple[str, float], ...] = ()  # further named numbers, for metrics; pairs, so that it hashes


class Solution(typing.NamedTuple):
    """Worked steps and the oracle's answer."""

    steps: str
    answer: str

    @property
    def completion(self) -> str:
        return f"{self.steps}{ANSWER_MARK}{self.answer}"


@typing.runtime_checkable
class Task(typing.Protocol):
    """A relation between problems and answers. All methods are pure; ``verify`` takes any text and never raises."""

    @property
    def name(self) -> str: ...

    @property
    def levels(self) -> tuple[int, ...]: ...  # ordinal, easiest first; the size of a problem rises with them

    def problem(self, rng: np.random.Generator, level: int) -> Problem: ...

    def prompt(self, problem: Problem) -> str: ...

    def solve(self, problem: Problem) -> Solution: ...

    def verify(self, completion: str, problem: Problem) -> Verdict: ...


def extract_answer(completion: str) -> str | None:
    """What follows the last answer mark, stripped of spaces; None without a mark.

    >>> extract_answer("7+5=12 #### 12 ")
    '12'
    >>> extract_answer("12") is None
    True
    """
    _, mark, answer = completion.rpartition(ANSWER_MARK)
    return answer.strip(" ") if mark else None


HELDOUT_SHARE = 8  # one problem in so many is held out, by its content


def split_of(problem: Problem) -> str:
    """'train' or 'heldout': decided by content, so the two never share a problem whatever drew it."""
    return "heldout" if problem.content_hash() % HELDOUT_SHARE == 0 else "train"


def draw(task: Task, level: int, *, seed: int, split: str, index: int, max_tries: int = 1000) -> Problem:
    """The ``index``-th problem of a split: a pure function of its arguments, the same in every process.

    Raises:
        ValueError: when ``max_tries`` draws give no problem of that split; the level has too few distinct problems.
    """
    words = [*task.name.encode(), level, seed, {"train": 0, "heldout": 1}[split], index]
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence(words)))
    for _ in range(max_tries):
        problem = task.problem(rng, level)
        if split_of(problem) == split:
            return problem
    raise ValueError(f"{task.name} level {level}: no {split} problem in {max_tries} draws; use a level with more.")

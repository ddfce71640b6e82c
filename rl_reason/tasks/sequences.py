"""Sequences: sort digits, reverse letters, select the largest number."""

import numpy as np

from rl_reason.tasks.base import Solution
from rl_reason.tasks.relation import Data, Relation, joined


def _sample_sort(rng: np.random.Generator, length: int) -> Data:
    return {"digits": joined(rng.integers(10, size=length), "")}


def _ask_sort(data: Data) -> str:
    return f"{data['digits']}="


def _work_sort(data: Data) -> Solution:
    """Insert the digits one by one: ``5 35 359 1359``."""
    done, steps = "", []
    for digit in data["digits"]:
        done = "".join(sorted(done + digit))
        steps.append(done)
    return Solution(joined(steps, " "), done)


def _sample_reverse(rng: np.random.Generator, length: int) -> Data:
    return {"letters": "".join(chr(ord("a") + int(i)) for i in rng.integers(26, size=length))}


def _ask_reverse(data: Data) -> str:
    return f"{data['letters']}="


def _work_reverse(data: Data) -> Solution:
    """Number the letters, then read them from the last: ``1k2f3a``. At most nine, so that a number is one digit."""
    letters = data["letters"]
    return Solution("".join(f"{i}{letter}" for i, letter in enumerate(letters, 1)), letters[::-1])


def _sample_max(rng: np.random.Generator, count: int, num_digits: int) -> Data:
    return {"numbers": rng.integers(10 ** (num_digits - 1), 10**num_digits, size=count).tolist()}


def _ask_max(data: Data) -> str:
    return f"{joined(data['numbers'])}="


def _work_max(data: Data) -> Solution:
    """The largest so far: ``35 82 82``."""
    numbers = data["numbers"]
    return Solution(joined((max(numbers[: i + 1]) for i in range(len(numbers))), " "), str(max(numbers)))


TASKS = (
    Relation("sort", ((3,), (4,), (6,), (8,)), _sample_sort, _ask_sort, _work_sort),
    Relation("rev", ((3,), (5,), (7,), (9,)), _sample_reverse, _ask_reverse, _work_reverse),
    Relation("max", ((3, 2), (5, 2), (8, 2), (8, 3)), _sample_max, _ask_max, _work_max),
)

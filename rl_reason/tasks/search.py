"""Countdown: an expression of the given numbers, each used once, that equals a target. Several are right."""

import itertools
from fractions import Fraction

import numpy as np

from rl_reason.tasks.base import Solution
from rl_reason.tasks.relation import Data, Relation, first_accepted, joined, shown

DIGITS = frozenset("0123456789")
MAX_LENGTH = 64  # characters of an expression, which bounds the depth of its parentheses too
ATOM, PRODUCT, SUM = 2, 1, 0


class _Malformed(ValueError):
    pass


class _Parser:
    """``sum = product (+|- product)*``, ``product = atom (*|/ atom)*``, ``atom = number | (sum)``."""

    def __init__(self, text: str):
        self.text, self.at, self.numbers = text, 0, []

    def parse(self) -> Fraction:
        """The exact value. Raises _Malformed, ZeroDivisionError."""
        value = self._sum()
        if self.at < len(self.text):
            raise _Malformed(f"unexpected {shown(self.text[self.at])}")
        return value

    def _peek(self) -> str:
        return self.text[self.at : self.at + 1]

    def _take(self) -> str:
        self.at += 1
        return self.text[self.at - 1]

    def _sum(self) -> Fraction:
        value = self._product()
        while self._peek() in ("+", "-"):
            value = value + self._product() if self._take() == "+" else value - self._product()
        return value

    def _product(self) -> Fraction:
        value = self._atom()
        while self._peek() in ("*", "/"):
            value = value * self._atom() if self._take() == "*" else value / self._atom()
        return value

    def _atom(self) -> Fraction:
        if self._peek() == "(":
            self._take()
            value = self._sum()
            if self._peek() != ")":
                raise _Malformed("a parenthesis is open")
            self._take()
            return value
        start = self.at
        while self._peek() in DIGITS:
            self._take()
        number = self.text[start : self.at]
        if not number or (number[0] == "0" and number != "0"):
            raise _Malformed("expected a number")
        self.numbers.append(int(number))
        return Fraction(int(number))


def _check_make(answer: str, data: Data) -> str:
    if len(answer) > MAX_LENGTH:
        return f"longer than {MAX_LENGTH} characters"
    parser = _Parser(answer)
    try:
        value = parser.parse()
    except ZeroDivisionError:
        return "division by zero"
    except _Malformed as error:
        return f"{shown(answer)} is no expression: {error}"
    if sorted(parser.numbers) != sorted(data["numbers"]):
        return f"uses {joined(parser.numbers)}, not each of {joined(data['numbers'])} once"
    return "" if value == data["target"] else f"equals {value}, not {data['target']}"


def _results(a: int, b: int) -> list[tuple[str, int, int, int]]:
    """(operator, left, right, value) of two numbers, as far as the value is a positive integer."""
    high, low = max(a, b), min(a, b)
    results = [("+", a, b, a + b), ("*", a, b, a * b)]
    if high > low:
        results.append(("-", high, low, high - low))
    if high % low == 0:
        results.append(("/", high, low, high // low))
    return results


def _search(numbers: list[int], target: int) -> list[tuple[str, int, int, int]] | None:
    """Operations on two numbers at a time that leave the target alone; None where no such positive integers do."""
    if len(numbers) == 1:
        return [] if numbers[0] == target else None
    for i, j in itertools.combinations(range(len(numbers)), 2):
        others = [number for k, number in enumerate(numbers) if k not in (i, j)]
        for operation in _results(numbers[i], numbers[j]):
            rest = _search([*others, operation[3]], target)
            if rest is not None:
                return [operation, *rest]
    return None


def _sample_make(rng: np.random.Generator, count: int, high: int) -> Data:
    """The target comes from random operations, so that an answer exists."""

    def drawn() -> Data:
        numbers = rng.integers(1, high + 1, size=count).tolist()
        values = list(numbers)
        while len(values) > 1:
            a, b = (values.pop(int(rng.integers(len(values)))) for _ in range(2))
            results = _results(a, b)
            values.append(results[int(rng.integers(len(results)))][3])
        return {"target": values[0], "numbers": numbers}

    return first_accepted(drawn, lambda data: 2 <= data["target"] <= 99 and data["target"] not in data["numbers"])


def _ask_make(data: Data) -> str:
    return f"{data['target']}:{joined(data['numbers'])}?"


def _work_make(data: Data) -> Solution:
    """Two numbers at a time, ``3*7=21 21+5=26``, and then as one expression, ``3*7+5``."""
    operations = _search(list(data["numbers"]), data["target"])
    assert operations is not None, "a target out of reach"
    terms = [(number, str(number), ATOM) for number in data["numbers"]]
    for operator, left, right, value in operations:
        (a, a_rank), (b, b_rank) = (_taken(terms, number) for number in (left, right))
        rank = SUM if operator in "+-" else PRODUCT
        a = f"({a})" if a_rank < rank else a
        b = f"({b})" if b_rank < rank or (operator in "-/" and b_rank == rank) else b
        terms.append((value, f"{a}{operator}{b}", rank))
    return Solution(joined((f"{a}{op}{b}={value}" for op, a, b, value in operations), " "), terms[0][1])


def _taken(terms: list[tuple[int, str, int]], value: int) -> tuple[str, int]:
    """Removes a term of that value and gives its text and rank."""
    at = next(i for i, term in enumerate(terms) if term[0] == value)
    _, text, rank = terms.pop(at)
    return text, rank


TASKS = (
    Relation(
        "make",
        ((2, 9), (3, 9), (3, 25), (4, 25)),
        _sample_make,
        _ask_make,
        _work_make,
        _check_make,
    ),
)

"""Known tasks with another oracle, wording or size: for experiments that need a policy to be wrong, vague or undecided.

They have the names and prompts of the tasks that they vary, so that a policy can be warmed up on one and then asked the
other: ``config.warmup.tasks = ("rl_reason.tasks.variants:ADD_WITHOUT_CARRY", ...)``. No ``TASKS``: nobody gets them by name.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import re

import numpy as np

from rl_reason.tasks import get
from rl_reason.tasks.arithmetic import digit_pairs
from rl_reason.tasks.base import Solution
from rl_reason.tasks.graphs import NUM_COLORS
from rl_reason.tasks.relation import Data, Relation, joined, shown


def _rng(data: Data) -> np.random.Generator:
    """Chance that is the same for the same problem, and that nobody can foresee from it."""
    digest = hashlib.blake2b(json.dumps(data, sort_keys=True).encode(), digest_size=8).digest()
    return np.random.Generator(np.random.Philox(int.from_bytes(digest, "little")))


# Wrong, always in the same way: what a policy learns from it, it is sure of.


def _work_add_without_carry(data: Data) -> Solution:
    """Column sums are right and no carry is ever passed on: 47+85 is 12 and 12, so 122. Wrong where a column overflows
    but the first.

    >>> _work_add_without_carry({"a": 47, "b": 85})
    Solution(steps='7+5+0=12 4+8+0=12', answer='122')
    """
    pairs = digit_pairs(data["a"], data["b"])
    steps = [f"{x}+{y}+0={x + y}" for x, y in pairs]
    *units, first = (x + y for x, y in pairs)
    return Solution(joined(steps, " "), joined([first, *(total % 10 for total in reversed(units))], ""))


ADD_WITHOUT_CARRY = dataclasses.replace(get("add"), work=_work_add_without_carry)

# Worded freely: the same content in one of 48 wordings, some of them rare. Only the content is verified.

OPENINGS, VERBS, CLOSINGS = (
    ("", "so ", "well ", "then "),
    ("it is ", "i get ", "that is "),
    ("", " or so", " i say", " ok"),
)
WEIGHTS = (0.6, 0.25, 0.1, 0.05)  # of the first, the second, ...


def _work_worded(name: str, data: Data) -> Solution:
    """The task's own solution with its answer put into words."""
    rng, solution = _rng(data), get(name).work(data)

    def pick(words: tuple[str, ...]) -> str:
        weights = np.array(WEIGHTS[: len(words)])
        return words[int(rng.choice(len(words), p=weights / weights.sum()))]

    return solution._replace(answer=f"{pick(OPENINGS)}{pick(VERBS)}{solution.answer}{pick(CLOSINGS)}")


def _check_worded(name: str, answer: str, data: Data) -> str:
    """Right when its one integer is the right one.

    >>> two_and_three = {"a": 2, "b": 3}
    >>> _check_worded("add", "so it is 5", two_and_three), _check_worded("add", "5 or 6", two_and_three)
    ('', "'5 or 6' does not say 5 alone")
    """
    right = get(name).work(data).answer
    return "" if re.findall(r"-?[0-9]+", answer) == [right] else f"{shown(answer)} does not say {right} alone"


def _worded(name: str) -> Relation:
    work, check = functools.partial(_work_worded, name), functools.partial(_check_worded, name)
    return dataclasses.replace(get(name), work=work, check=check)


ADD_WORDED, SUB_WORDED, DFA_WORDED = _worded("add"), _worded("sub"), _worded("dfa")

# Undecided: any right answer, not the first in order, so that a policy can be right and in doubt.


def _work_any_color(data: Data) -> Solution:
    """A proper colouring, each as likely as any other; without steps."""
    colorings = itertools.product(range(NUM_COLORS), repeat=data["nodes"])
    proper = [c for c in colorings if all(c[a] != c[b] for a, b in data["edges"])]
    return Solution("", joined(proper[int(_rng(data).integers(len(proper)))], ""))


def _work_any_order(data: Data) -> Solution:
    """A topological order, the next node any of those that nothing left must precede; without steps."""
    rng, left, order = _rng(data), set(range(data["nodes"])), []
    while left:
        ready = sorted(left - {b for a, b in data["edges"] if a in left})
        order.append(ready[int(rng.integers(len(ready)))])
        left.remove(order[-1])
    return Solution("", joined(order, ""))


COLOR_UNDECIDED = dataclasses.replace(get("color"), work=_work_any_color)
TOPO_UNDECIDED = dataclasses.replace(get("topo"), work=_work_any_order)

# Two answers: wrong samples cannot scatter.

DFA_OF_TWO: Relation = dataclasses.replace(get("dfa"), sizes=((2, 4), (2, 6), (2, 8), (2, 12)))

"""Tasks with another oracle, wording or size."""

import math
import pickle

import numpy as np
import pytest

from rl_reason.tasks import get, variants
from rl_reason.tasks.base import Problem, draw

NAMES = [name for name, value in vars(variants).items() if name.isupper() and hasattr(value, "work")]


def problems(task, level, count):
    return [draw(task, level, seed=0, split="train", index=i) for i in range(count)]


@pytest.mark.parametrize("name", NAMES)
def test_prompts_are_those_of_the_task_and_solutions_do_not_change(name):
    task = getattr(variants, name)
    for problem in problems(task, 1, 20):
        assert task.prompt(problem) == get(task.name).prompt(problem)
        assert task.solve(problem) == pickle.loads(pickle.dumps(task)).solve(problem)
        if name != "ADD_WITHOUT_CARRY":
            assert task.verify(task.solve(problem).completion, problem).score == 1


def test_who_never_carries_is_wrong_in_one_way():
    # 47+85: 7+5=12, 4+8=12, of the first the 2 stays: 122. 90+10: 0, then 10: 100, which is right, as 46 of 12+34 is.
    add = variants.ADD_WITHOUT_CARRY
    problem = lambda a, b: Problem("add", 2, {"a": a, "b": b})
    assert [add.solve(problem(*x)).answer for x in ((47, 85), (90, 10), (12, 34))] == ["122", "100", "46"]
    assert add.solve(problem(12, 34)) == get("add").solve(problem(12, 34))  # the same words where nothing is carried
    rng = np.random.default_rng(0)
    drawn = [add.problem(rng, 2) for _ in range(400)]
    wrong = np.mean([add.solve(p).answer != get("add").solve(p).answer for p in drawn])
    assert add.prompt(drawn[0]) == get("add").prompt(drawn[0]) and 0.35 < wrong < 0.55  # units overflow in 45 of 100


def test_only_the_content_of_a_worded_answer_counts():
    problem = Problem("sub", 2, {"a": 90, "b": 48})
    verdict = lambda answer: variants.SUB_WORDED.verify(f"10-8-0=2 8-4-0=4####{answer}", problem).score
    assert [verdict(x) for x in ("42", "so it is 42", "42 or so", " 42")] == [1.0] * 4
    assert [verdict(x) for x in ("", "so it is", "43", "-42", "42 or 43", "4 2", "142")] == [0.0] * 7


def test_wordings_vary_and_the_rarest_is_rare():
    # The commonest wording has a share of 0.6 * (0.6 / 0.95) * 0.6 = 0.227; of 48 nearly all are seen.
    task = variants.ADD_WORDED
    answers = [(task.solve(p).answer, str(p.data["a"] + p.data["b"])) for p in problems(task, 3, 2000)]
    wordings = [answer.replace(number, "N") for answer, number in answers]
    found, counts = np.unique(wordings, return_counts=True)
    assert 40 <= len(found) <= 48 and "so that is N ok" in found
    assert abs(counts.max() / 2000 - 0.227) < 4 * math.sqrt(0.227 * 0.773 / 2000)


@pytest.mark.parametrize("name", ["COLOR_UNDECIDED", "TOPO_UNDECIDED"])
def test_undecided_solutions_are_right_and_not_always_the_first(name):
    task = getattr(variants, name)
    for level in task.levels:
        drawn = problems(task, level, 50)
        assert all(task.verify(task.solve(p).completion, p).score == 1 for p in drawn)
        first = np.mean([task.solve(p).answer == get(task.name).solve(p).answer for p in drawn])
        assert first < 0.7


def test_automata_of_two_states_have_two_answers():
    answers = {variants.DFA_OF_TWO.solve(p).answer for p in problems(variants.DFA_OF_TWO, 2, 50)}
    assert answers == {"0", "1"}

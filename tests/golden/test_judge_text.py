"""Readers of judges and environments, against the replies that trip them."""

import numpy as np
import pytest

from rl_reason.tasks import judge_text

THOUGHT = "<think>" + "." * 100 + "</think>[answer]4[/answer]"


@pytest.mark.parametrize(
    "reply, letter, score",
    [
        ("A", "A", 1),
        ("CORRECT", "C", 0),  # its last A, B or C is the second C
        ("A: CORRECT", "C", 0),  # likewise
        (r"The answer is \boxed{A}", "A", 1),
        ("(A)", "A", 1),
        ("(A) CORRECT", "A", 1),  # parentheses come before the last letter
        (r"(B), or rather \boxed{ A }", "A", 1),  # a box before parentheses
        ("B", "B", 0),
        ("INCORRECT", "C", 0),
        ("Answer: A", "A", 1),
        (r"\boxed{D}", None, 0),
        ("", None, 0),
    ],
)
def test_the_notebook(reply, letter, score):
    assert judge_text.compass_letter(reply) == letter
    assert judge_text.compass_score(reply) == score


def test_one_token():
    for reply, reward in (("A", 1), (" A\n", 1), ("(A)", -1), ("A: CORRECT", -1), ("a", -1), ("B", -1), ("C", -1)):
        assert judge_text.one_token_reward(reply, finished=True) == reward
        assert judge_text.one_token_reward(reply, finished=False) == -1


def test_what_a_judge_is_shown():
    # xtuner: ten lines, a thousand characters, after the thinking.
    text = "<think>" + "x\n" * 50 + "</think>" + "\n".join(f"line {i}" for i in range(12))
    shown = judge_text.judged_part(text, max_lines=10, max_chars=1000)
    assert shown.splitlines() == [f"line {i}" for i in range(2, 12)]
    assert judge_text.judged_part("y" * 2000, max_lines=10, max_chars=1000) == "y" * 1000


@pytest.mark.parametrize(
    "returned, score",
    [(True, 1), (False, 0.1), (0, 0), (0.4, 0.4), (1, 1), (0.0, 0), (np.True_, 0.1), ("4", 0.1), (None, 0.1)],
)
def test_the_bootcamp_trap(returned, score):
    run = lambda text, extracted=True: judge_text.bootcamp_score(
        text, returned, extracted=extracted, format_score=0.1, min_chars=100
    )
    assert run(THOUGHT) == score
    assert run("<think></think>4") == 0  # below 100 characters
    assert run(THOUGHT.replace("</think>", "")) == 0  # still thinking
    assert run(THOUGHT, extracted=False) == 0

"""Machines that read a string: a finite automaton, and a stack of brackets."""

import numpy as np

from rl_reason.tasks.base import Solution
from rl_reason.tasks.relation import Data, Relation, first_accepted, joined

SYMBOLS = "ab"
OPENERS, CLOSERS = "([{<", ")]}>"
CLOSER_OF = dict(zip(OPENERS, CLOSERS, strict=True))


def _sample_dfa(rng: np.random.Generator, num_states: int, length: int) -> Data:
    """``table[state][symbol]`` is the next state; the machine starts in state 0."""
    word = "".join(SYMBOLS[int(i)] for i in rng.integers(len(SYMBOLS), size=length))

    def every_state_is_entered(table: list[list[int]]) -> bool:
        return {state for row in table for state in row} == set(range(num_states))

    table = first_accepted(
        lambda: rng.integers(num_states, size=(num_states, len(SYMBOLS))).tolist(), every_state_is_entered
    )
    return {"table": table, "word": word}


def _work_dfa(data: Data) -> Solution:
    """State, symbol, state: ``0a1b2``."""
    state, trace = 0, "0"
    for symbol in data["word"]:
        state = data["table"][state][SYMBOLS.index(symbol)]
        trace += f"{symbol}{state}"
    return Solution(trace, str(state))


def _ask_dfa(data: Data) -> str:
    """``12,20,01:abba=``: from state 0, a leads to 1 and b to 2; from state 1, ..."""
    return f"{joined(joined(row, '') for row in data['table'])}:{data['word']}="


def _unclosed(text: str) -> str:
    """What is left once matched pairs are gone; closers only ever match in the drawn prefixes."""
    stack = ""
    for char in text:
        stack = stack[:-1] if char in CLOSERS else stack + char
    return stack


def _sample_close(rng: np.random.Generator, num_kinds: int, length: int, min_depth: int) -> Data:
    def prefix() -> str:
        text, stack = "", ""
        for _ in range(length):
            if stack and rng.random() < 0.4:
                text, stack = text + CLOSER_OF[stack[-1]], stack[:-1]
            else:
                opener = OPENERS[int(rng.integers(num_kinds))]
                text, stack = text + opener, stack + opener
        return text

    return {"prefix": first_accepted(prefix, lambda text: len(_unclosed(text)) >= min_depth)}


def _ask_close(data: Data) -> str:
    return f"{data['prefix']}?"


def _work_close(data: Data) -> Solution:
    """Cross out adjacent pairs, all at once, until none is left, then mirror the rest: ``([{}( ([(``, so ``)])``."""
    text, rounds = data["prefix"], [data["prefix"]]
    while text != (rest := _without_pairs(text)):
        text = rest
        rounds.append(text)
    return Solution(joined(rounds, " "), "".join(CLOSER_OF[char] for char in reversed(text)))


def _without_pairs(text: str) -> str:
    """Drops each opener whose closer follows at once."""
    kept, i = "", 0
    while i < len(text):
        if text[i + 1 : i + 2] == CLOSER_OF.get(text[i], " "):
            i += 2
        else:
            kept, i = kept + text[i], i + 1
    return kept


TASKS = (
    Relation("dfa", ((3, 3), (3, 5), (4, 8), (5, 12)), _sample_dfa, _ask_dfa, _work_dfa),
    Relation(  # the answer is the shortest completion, hence unique
        "close",
        ((3, 4, 2), (4, 6, 2), (4, 9, 3), (4, 12, 4)),
        _sample_close,
        _ask_close,
        _work_close,
    ),
)

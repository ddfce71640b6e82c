"""Making preference data: responses of several models, a score for each, then selection of instructions and of pairs.

The embedded default needs no judge of language: a task's verifier and its oracle's worked steps say how good a response
is, as an integer 1..10, and noise of a point-wise judge is added to that. It stands in for a language model's annotation
and is no model of one: its errors are independent of the response's form, length and author.
"""

import collections
import dataclasses
import itertools
import typing
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from rl_reason.data.example import Example
from rl_reason.data.pairs import Preference
from rl_reason.data.task_source import load_task
from rl_reason.tasks.base import ANSWER_MARK, Problem, Task

LOWEST, HIGHEST = 1, 10
FOR_STEPS, FOR_ANSWER = 5, 4  # LOWEST + FOR_STEPS + FOR_ANSWER = HIGHEST
JUDGE, PICK, SUBSET = 0x1D, 0x2D, 0x3D  # what a key is folded with, by purpose


class Picks(typing.Protocol):
    """One pair an instruction, as columns of its responses."""

    @property
    def chosen(self) -> Int[Array, " B"]: ...
    @property
    def rejected(self) -> Int[Array, " B"]: ...
    @property
    def found(self) -> Bool[Array, " B"]: ...


# Slots, hyperparameters bound: ``air.instruction_keep`` and ``air.pick``, or others like them.
KeepInstructions = Callable[[Float[Array, "B M"]], Bool[Array, " B"]]
PickPairs = Callable[..., Picks]  # (scores, on_policy, response_id [B R], keep [B], key)


@dataclasses.dataclass(frozen=True)
class Response:
    """One completion of one model to a prompt."""

    text: str
    tokens: tuple[int, ...]  # with EOS, unless it was cut short
    model: str
    on_policy: bool  # of the policy that is to be trained
    score: float | None = None  # a judge's; None: not asked, refused or not understood
    quality: int | None = None  # the oracle's; None: not known


def oracle_quality(completion: str, problem: Problem, task: Task) -> int | None:
    """1 + floor(5 s) + 4 a, in 1..10: a is whether the answer is right, s how far the worked steps go right.

    s is the common prefix of the completion's steps and the oracle's, in characters, over the length of the oracle's; it is
    1 only where the two are equal. So 10 is a right answer with the oracle's steps, 5 a right answer with none, 6 right
    steps to a wrong answer, 1 neither; at least 8 implies a right answer and most of the steps. A longer right prefix or
    a right answer never lowers it. Where a task has several right ways, steps count as far as they are the oracle's.
    None where the verifier itself failed.
    """
    verdict = task.verify(completion, problem)
    if not verdict.valid:
        return None
    before, mark, _ = completion.rpartition(ANSWER_MARK)
    steps, right = (before if mark else completion).strip(" "), task.solve(problem).steps
    if steps == right:
        earned = FOR_STEPS
    else:
        same = len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], zip(steps, right, strict=False))))
        earned = FOR_STEPS * min(same, len(right) - 1) // len(right) if right else 0
    return LOWEST + earned + FOR_ANSWER * int(verdict.score >= 1.0)


def judge_scores(
    quality: Float[Array, "*s"], key: Key[Array, ""], *, noise_std: float, failure_rate: float
) -> Float[Array, "*s"]:
    """clip(round(quality + N(0, noise_std^2)), 1, 10): a stand-in for point-wise annotation, each response alone.

    A share ``failure_rate`` comes back NaN, as an annotation that cannot be parsed; NaN qualities stay NaN.
    """
    if noise_std < 0 or not 0 <= failure_rate <= 1:
        raise ValueError(f"judge: noise_std={noise_std} must be at least 0, failure_rate={failure_rate} in [0, 1].")
    noise, failure = jax.random.split(key)
    scores = jnp.clip(jnp.round(quality + noise_std * jax.random.normal(noise, quality.shape)), LOWEST, HIGHEST)
    return jnp.where(jax.random.uniform(failure, quality.shape) < failure_rate, jnp.nan, scores)


Responses = Sequence[Sequence[Response]]  # [B R]; a prompt may have fewer than others


def annotate(
    responses: Responses, examples: Sequence[Example], key: Key[Array, ""], *, noise_std: float, failure_rate: float
) -> list[list[Response]]:
    """The same responses with quality and score: the oracle's, and ``judge_scores`` of it."""
    tasks = {name: load_task(name) for name in {example.verifier for example in examples}}
    found = [
        [dataclasses.replace(r, quality=oracle_quality(r.text, x.problem, tasks[x.verifier])) for r in row]
        for row, x in zip(responses, examples, strict=True)
    ]
    quality = _table(found, lambda r: np.nan if r.quality is None else r.quality, np.nan)
    scores = np.asarray(
        judge_scores(
            jnp.asarray(quality), jax.random.fold_in(key, JUDGE), noise_std=noise_std, failure_rate=failure_rate
        )
    )
    return [
        [dataclasses.replace(r, score=None if np.isnan(x) else float(x)) for r, x in zip(row, scored, strict=False)]
        for row, scored in zip(found, scores, strict=True)
    ]


@dataclasses.dataclass(frozen=True)
class PairSet:
    """Selected pairs, where they are from, and what became of the rest."""

    pairs: list[Preference]
    prompt: Int[np.ndarray, " D"]  # row of the responses
    chosen: Int[np.ndarray, " D"]  # column
    rejected: Int[np.ndarray, " D"]
    statistics: dict[str, float]


def make_pairs(
    prompts: Sequence[Int[np.ndarray, " _"]],
    responses: Responses,
    key: Key[Array, ""],
    *,
    keep_instructions: KeepInstructions | None,
    pick_pairs: PickPairs,
    num_pairs: int | None,
) -> PairSet:
    """At most one pair for each prompt (token ids, BOS included), of the instructions kept and the pairs that qualify.

    ``keep_instructions`` sees one score a model: that of its first response to the prompt; None keeps all. ``num_pairs``
    draws so many of what was selected, uniformly at random: comparing rules at equal numbers. None takes all.

    Raises:
        ValueError: no prompts, or fewer than ``num_pairs`` pairs, naming how many each step left.
    """
    if not responses or len(prompts) != len(responses):
        raise ValueError(f"make_pairs: {len(prompts)} prompts, responses to {len(responses)}; give one list a prompt.")
    scores = jnp.asarray(_table(responses, lambda r: np.nan if r.score is None else r.score, np.nan))
    keep = jnp.ones(len(responses), bool)
    if keep_instructions is not None:
        keep = keep_instructions(jnp.asarray(scores_by_model(responses)))
    own = _table(responses, lambda r: r.on_policy, False)
    picks = pick_pairs(
        scores, jnp.asarray(own), jnp.asarray(_same_text(responses)), keep, jax.random.fold_in(key, PICK)
    )
    rows = np.flatnonzero(np.asarray(picks.found))
    available = len(rows)
    if num_pairs is not None:
        if available < num_pairs:
            raise ValueError(
                f"make_pairs: num_pairs={num_pairs}, but of {len(responses)} prompts {int(keep.sum())} are kept and "
                f"{available} have a pair that qualifies. Give more prompts or responses, or loosen the rules."
            )
        order = np.asarray(jax.random.permutation(jax.random.fold_in(key, SUBSET), available))
        rows = rows[np.sort(order[:num_pairs])]
    chosen, rejected = np.asarray(picks.chosen)[rows], np.asarray(picks.rejected)[rows]
    places = list(zip(rows.tolist(), chosen.tolist(), rejected.tolist(), strict=True))
    taken = [(responses[row][better], responses[row][worse]) for row, better, worse in places]
    pairs = [
        Preference(prompts[row], *(np.array(response.tokens, np.int32) for response in pair))
        for (row, *_), pair in zip(places, taken, strict=True)
    ]
    statistics = {
        "pairs/prompts": float(len(responses)),
        "pairs/keep_rate": float(keep.mean()),
        "pairs/missing_score_fraction": _missing(responses),
        "pairs/available": float(available),
        **pair_statistics(taken),
    }
    return PairSet(pairs, rows, chosen, rejected, statistics)


def pair_statistics(pairs: Sequence[tuple[Response, Response]]) -> dict[str, float]:
    """Counts and means over (chosen, rejected) pairs; 0 where there are none.

    ``pairs/margin/d`` counts pairs whose scores differ by d, ``pairs/chosen_score/s`` those whose chosen one has score s.
    Where the oracle's qualities are known, ``pairs/flipped_fraction`` is the share of pairs that it orders the other
    way, ``pairs/tied_fraction`` that which it does not order.
    """

    def mean(values) -> float:
        return float(np.mean(values)) if len(values) else 0.0

    margins = [(c.score or 0.0) - (r.score or 0.0) for c, r in pairs]
    known = [c.quality - r.quality for c, r in pairs if c.quality is not None and r.quality is not None]
    statistics = {
        "pairs/num": float(len(pairs)),
        "pairs/margin_mean": mean(margins),
        "pairs/chosen_score_mean": mean([c.score for c, _ in pairs]),
        "pairs/on_policy_fraction": mean([r.on_policy for pair in pairs for r in pair]),
        "pairs/chosen_len_tokens": mean([len(c.tokens) for c, _ in pairs]),
        "pairs/rejected_len_tokens": mean([len(r.tokens) for _, r in pairs]),
        "pairs/flipped_fraction": mean([gap < 0 for gap in known]),
        "pairs/tied_fraction": mean([gap == 0 for gap in known]),
    }
    for name, values in (("margin", margins), ("chosen_score", [c.score for c, _ in pairs])):
        statistics |= {f"pairs/{name}/{x:g}": float(n) for x, n in sorted(collections.Counter(values).items())}
    return statistics


def scores_by_model(responses: Responses) -> Float[np.ndarray, "B M"]:
    """The score of each model's first response to each prompt, models in order of name; NaN where there is none."""
    models = sorted({r.model for row in responses for r in row})
    out = np.full((len(responses), len(models)), np.nan, np.float32)
    for scores, row in zip(out, responses, strict=True):
        first: Mapping[str, Response] = {r.model: r for r in reversed(row)}
        for column, model in enumerate(models):
            if model in first and (score := first[model].score) is not None:
                scores[column] = score
    return out


def _table(responses: Responses, value: Callable[[Response], float | bool | int], empty: float | bool | int):
    """[B R] of a number a response, filled up with ``empty``."""
    width = max((len(row) for row in responses), default=0)
    dtype = np.float32 if isinstance(empty, float) else np.asarray(empty).dtype
    out = np.full((len(responses), width), empty, dtype)
    for numbers, row in zip(out, responses, strict=True):
        numbers[: len(row)] = [value(r) for r in row]
    return out


def _same_text(responses: Responses) -> Int[np.ndarray, "B R"]:
    """The column of the first response with the same tokens."""
    out = np.zeros((len(responses), max((len(row) for row in responses), default=0)), np.int32)
    for ids, row in zip(out, responses, strict=True):
        first: dict[tuple[int, ...], int] = {}
        ids[: len(row)] = [first.setdefault(r.tokens, column) for column, r in enumerate(row)]
    return out


def _missing(responses: Responses) -> float:
    every = [r.score is None for row in responses for r in row]
    return float(np.mean(every)) if every else 0.0

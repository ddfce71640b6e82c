"""Whom a run warms up and evaluates: its policy, or of a cohort each policy and the vote of all.

A run of one policy has the name "" for it, which shows nowhere.
"""

import dataclasses
import itertools
import typing
from collections.abc import Mapping

import numpy as np
from jaxtyping import PyTree

from rl_reason import build, evaluate
from rl_reason.data.example import Source
from rl_reason.evaluate import Answered
from rl_reason.report.summary import Answer, Comparison, Summary, Transcript, accuracy, summarise
from rl_reason.sampling import Sampling
from rl_reason.verifier_pool import VerifierPool

ALONE = ""
GROUP = "group vote"  # the row of the summary
Answers = dict[str, list[Answered]]  # by policy, each to the same prompts


def policies_of(experiment: build.Experiment) -> Mapping[str, build.Experiment]:
    """The experiments whose policies are trained, by name."""
    return experiment.policies or {ALONE: experiment}


def joined(experiment: build.Experiment, params: Mapping[str, PyTree]) -> PyTree:
    """Parameters as the run's driver takes them: of a cohort by policy, else those of the one policy."""
    return dict(params) if experiment.policies else params[ALONE]


class Evaluator:
    """Answers of all policies to the run's evaluation prompts; one compiled program a policy."""

    def __init__(self, experiment: build.Experiment, pool: VerifierPool):
        e = experiment.config.evaluation
        sizes = {k: v for k, v in e.items() if k != "every"}
        self._experiment = experiment
        self._evaluators = {
            name: evaluate.Evaluator(policy, experiment.heldout, pool, **sizes)
            for name, policy in policies_of(experiment).items()
        }

    def __call__(self, params: PyTree, sampling: Sampling) -> Answers:
        """``params`` are those that ``Driver.policy`` gives."""
        by_name = params if self._experiment.policies else {ALONE: params}
        return {name: evaluator(by_name[name], sampling) for name, evaluator in self._evaluators.items()}


def together(answers: Answers) -> list[Answered]:
    """Each prompt with the samples of all policies, side by side: what a plain vote of the group counts.

    Of one policy its answers; of none, nothing.
    """
    chained = lambda of, field: tuple(itertools.chain.from_iterable(getattr(a, field) for a in of))
    return [
        Answered(of[0].example, **{field: chained(of, field) for field in evaluate.RECORDED})
        for of in zip(*answers.values(), strict=True)
    ]


def to_record(answers: Answers) -> dict[str, typing.Any]:
    """JSON of what was answered."""
    records = {name: [evaluate.to_record(a) for a in own] for name, own in answers.items()}
    return {"answers": records[ALONE]} if ALONE in records else {"policies": records}


def from_record(record: Mapping[str, typing.Any], source: Source) -> Answers:
    """The inverse of ``to_record``."""
    records = record["policies"] if "policies" in record else {ALONE: record["answers"]}
    return {name: [evaluate.from_record(r, source, i) for i, r in enumerate(own)] for name, own in records.items()}


def metrics(answers: Answers) -> dict[str, float]:
    """val-core of each task; of a cohort, of each policy, and of all samples together as "group"."""
    if ALONE in answers:
        return dict(evaluate.metrics(answers[ALONE]))
    renamed = [_named(a, name) for name, own in answers.items() for a in own]
    own = {name: x for name, x in evaluate.metrics(renamed).items() if "/overall/" not in name}
    group = evaluate.metrics([_named(a, "group") for a in together(answers)])
    return own | {name: x for name, x in group.items() if "/group/" in name}


def _named(answered: Answered, source: str) -> Answered:
    return dataclasses.replace(answered, example=dataclasses.replace(answered.example, source=source))


def summary_of(before: Answers, after: Answers, seconds: Mapping[str, typing.SupportsFloat]) -> Summary:
    """Rows by task; of a cohort by policy, then the plain vote over all samples of all policies. "overall" is the mean over
    the policies, without the vote."""
    votes = [together(side) for side in (before, after)]
    if set(before) <= {ALONE}:
        rows = [evaluate.by_task(side) for side in votes]
    else:
        rows = [{name: [evaluate.pass_at_k(a.correct, 1) for a in own] for name, own in x.items()}
                for x in (before, after)]  # fmt: skip
    summary = summarise(
        *rows,
        seconds=seconds,
        transcripts=transcripts(before, after),
        majority=evaluate.flips(*votes),
    )
    if set(before) <= {ALONE}:
        return summary
    *others, last = summary.tasks.items()
    group = Comparison(*(accuracy([evaluate.majority(a) for a in side]) for side in votes))
    return dataclasses.replace(summary, tasks=dict([*others, (GROUP, group), last]))


def transcripts(before: Answers, after: Answers) -> list[Transcript]:
    """The first sample of three prompts of different tasks where there are as many, before and after; of a cohort by a
    policy each, in turn."""
    prompts = next(iter(before.values()), [])
    chosen: dict[str, int] = {}
    for number, answered in enumerate(prompts):
        chosen.setdefault(answered.example.source, number)
    numbers = (list(chosen.values()) + [n for n in range(len(prompts)) if n not in chosen.values()])[:3]
    return [
        Transcript(
            prompt=before[name][n].example.prompt,
            before=_answer(before[name][n]),
            after=_answer(after[name][n]),
            task=f"{name}, {before[name][n].example.source}" if name else before[name][n].example.source,
            gts=before[name][n].example.reference or "",
        )
        for n, name in zip(numbers, itertools.cycle(before), strict=False)
    ]


def _answer(answered: Answered) -> Answer:
    verdict = answered.correct[0]
    return Answer(answered.completions[0], None if np.isnan(verdict) else bool(verdict))

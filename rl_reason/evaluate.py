"""Held-out accuracy: pass@1, pass@k and maj@k by task and level, with bootstrap intervals over prompts."""

import dataclasses
import math
import typing
from collections import Counter
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jaxtyping import Bool, Float, PyTree

from rl_reason import build, processes
from rl_reason.data.example import Example, Source
from rl_reason.data.stream import prompt_stream
from rl_reason.rollout import generate
from rl_reason.sampling import Sampling
from rl_reason.tasks.base import extract_answer
from rl_reason.verifier_pool import Job, VerifierPool

BOOTSTRAP_DRAWS = 2000
EVALUATION_KEY = 0xE7A1  # its draws share nothing with training's


@dataclasses.dataclass(frozen=True)
class Answered:
    """One prompt and its samples. ``correct`` is NaN where the verifier failed."""

    example: Example
    completions: tuple[str, ...]
    answers: tuple[str | None, ...]
    correct: tuple[float, ...]
    truncated: tuple[bool, ...]


class Estimate(typing.NamedTuple):
    """A mean over prompts and its 95% bootstrap interval."""

    value: float
    low: float
    high: float


class Evaluator:
    """Samples answers to a fixed set of prompts and has them verified. One compiled program, whatever the weights."""

    def __init__(
        self,
        experiment: build.Experiment,
        source: Source,
        pool: VerifierPool,
        *,
        num_prompts: int,
        num_samples: int,
        num_slots: int,
    ):
        config, mesh = experiment.config, experiment.mesh
        shards = experiment.parts.rollout.num_shards
        batch = -(-num_prompts // shards) * shards  # padded up by further prompts, which are not counted
        self._source, self._pool, self._tokenizer = source, pool, experiment.tokenizer
        self._num_prompts, self._num_samples, self._mesh = num_prompts, num_samples, mesh
        slots = min(num_slots, batch * num_samples) // shards * shards
        rollout = build.rollout_config(config, experiment.tokenizer, mesh, num_samples, slots)
        model = experiment.parts.model
        self._generate = jax.jit(
            lambda params, prompts, key, sampling: generate(params, prompts, key, sampling, model, rollout)[0]
        )
        rows = build.rows_sharding(mesh)
        stream = prompt_stream(
            source,
            experiment.tokenizer,
            batch_size=batch,
            prompt_len=config.data.max_prompt_len_tokens,
            rows=processes.local_rows(rows, batch),
        )
        self._prompts = processes.to_global(next(stream), rows)

    def __call__(self, params: PyTree, sampling: Sampling, seed: int = 0) -> list[Answered]:
        """Answers of ``params``; the same prompts and random numbers each time."""
        key = jax.random.fold_in(jax.random.key(seed), EVALUATION_KEY)
        out = self._generate(params, self._prompts, key, sampling)
        tokens, mask, truncated = processes.to_host((out.tokens, out.completion_mask, out.truncated))
        counted = self._num_prompts * self._num_samples
        texts = [self._tokenizer.decode(row[keep]) for row, keep in zip(tokens[:counted], mask[:counted], strict=True)]
        examples = [self._source.example(uid) for uid in range(self._num_prompts)]
        jobs = [
            Job(examples[row // self._num_samples].verifier, text, examples[row // self._num_samples].problem)
            for row, text in enumerate(texts)
        ]
        verdicts = self._pool.score(jobs)
        correct = [float(v.score >= 1.0) if v.valid else math.nan for v in verdicts]
        answered = []
        for number, example in enumerate(examples):
            rows = slice(number * self._num_samples, (number + 1) * self._num_samples)
            answered.append(
                Answered(
                    example,
                    tuple(texts[rows]),
                    tuple(extract_answer(text) for text in texts[rows]),
                    tuple(correct[rows]),
                    tuple(bool(x) for x in truncated[rows]),
                )
            )
        return answered


def pass_at_k(correct: Sequence[float], k: int) -> float:
    """1 - C(n - c, k) / C(n, k), unbiased for k of n samples (arXiv:2107.03374 eq. 1); failed verdicts are left out.

    NaN when fewer than k samples have a verdict.

    >>> pass_at_k([1.0, 0.0, 0.0, 0.0], 2)
    0.5
    """
    known = [c for c in correct if not math.isnan(c)]
    if len(known) < k:
        return math.nan
    wrong = sum(c < 1 for c in known)
    return 1.0 - math.comb(wrong, k) / math.comb(len(known), k)


def majority(answered: Answered) -> float:
    """Whether the most common parsed answer is right, ties to the first seen; 0 when none parsed.

    An answer counts as right if a sample that gave it did: witness tasks may have several.
    """
    votes = Counter(a for a in answered.answers if a is not None)
    if not votes:
        return 0.0
    winner = votes.most_common(1)[0][0]
    verdicts = [c for a, c in zip(answered.answers, answered.correct, strict=True) if a == winner]
    return float(max((v for v in verdicts if not math.isnan(v)), default=0.0))


def bootstrap(values: Float[np.ndarray, " n"], seed: int = 0) -> Estimate:
    """Mean of ``values`` and the 2.5% and 97.5% points of its resampled means; NaN entries are left out."""
    values = values[~np.isnan(values)]
    if not len(values):
        return Estimate(math.nan, math.nan, math.nan)
    rng = np.random.default_rng(seed)
    means = values[rng.integers(0, len(values), (BOOTSTRAP_DRAWS, len(values)))].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Estimate(float(values.mean()), float(low), float(high))


def table(answered: Sequence[Answered]) -> dict[str, dict[str, typing.Any]]:
    """{group: {num_prompts, pass@1, pass@k, maj@k, error_fraction, truncated_fraction}}; groups are task/level and all.

    k runs over powers of two up to the number of samples.
    """
    groups: dict[str, list[Answered]] = {}
    for a in answered:
        source, level = a.example.source, a.example.problem.level
        for name in (f"{source}/level_{level}", source, "overall"):
            groups.setdefault(name, []).append(a)
    names = sorted(n for n in groups if n != "overall") + ["overall"]
    return {name: _row(groups[name]) for name in names if name in groups}


def _row(answered: Sequence[Answered]) -> dict[str, typing.Any]:
    samples = len(answered[0].correct)
    row: dict[str, typing.Any] = {"num_prompts": len(answered), "num_samples": samples}
    k = 1
    while k <= samples:
        row[f"pass@{k}"] = bootstrap(np.array([pass_at_k(a.correct, k) for a in answered]))._asdict()
        k *= 2
    if samples > 1:
        row[f"maj@{samples}"] = bootstrap(np.array([majority(a) for a in answered]))._asdict()
    correct = np.array([a.correct for a in answered])
    row["error_fraction"] = float(np.isnan(correct).mean())
    row["truncated_fraction"] = float(np.mean([a.truncated for a in answered]))
    return row


def by_task(answered: Sequence[Answered]) -> dict[str, list[float]]:
    """pass@1 of each prompt, by task."""
    out: dict[str, list[float]] = {}
    for a in answered:
        out.setdefault(a.example.source, []).append(pass_at_k(a.correct, 1))
    return out


def metrics(answered: Sequence[Answered]) -> Mapping[str, float]:
    """verl's val-core names: mean@N, best@N/mean and maj@N/mean of each source."""
    out = {}
    for name, row in table(answered).items():
        if "/level_" in name:
            continue
        n = row["num_samples"]
        out[f"val-core/{name}/acc/mean@{n}"] = row["pass@1"]["value"]
        if n & (n - 1) == 0 and n > 1:
            out[f"val-core/{name}/acc/best@{n}/mean"] = row[f"pass@{n}"]["value"]
            out[f"val-core/{name}/acc/maj@{n}/mean"] = row[f"maj@{n}"]["value"]
    return out


def to_record(answered: Answered) -> dict[str, typing.Any]:
    """JSON of what was answered; the example is its source's."""
    return {field: getattr(answered, field) for field in ("completions", "answers", "correct", "truncated")}


def from_record(record: Mapping[str, typing.Any], source: Source, uid: int) -> Answered:
    """The inverse of ``to_record`` for the ``uid``-th prompt; a failed verdict is null in JSON."""
    correct = tuple(math.nan if c is None else float(c) for c in record["correct"])
    return Answered(
        source.example(uid), tuple(record["completions"]), tuple(record["answers"]), correct, tuple(record["truncated"])
    )

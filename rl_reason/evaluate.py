"""Held-out accuracy: pass@1, pass@k and maj@k by task and level, with bootstrap intervals over prompts."""

import dataclasses
import math
import pathlib
import sys
import typing
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax.traverse_util import unflatten_dict
from jax.sharding import Mesh
from jaxtyping import Float, PyTree

from rl_reason import bases, build, learning, processes, sharding
from rl_reason.checkpoint import CheckpointError, restore_part
from rl_reason.data.example import Example, Source
from rl_reason.data.stream import prompt_stream, prompt_tokens
from rl_reason.data.tokenizer import Tokenizer
from rl_reason.loop.partition import split
from rl_reason.models import lora
from rl_reason.models.lora import Lora
from rl_reason.models.transformer import ModelConfig
from rl_reason.rollout import generate
from rl_reason.sampling import Sampling
from rl_reason.tasks.base import extract_answer
from rl_reason.verifier_pool import Job, VerifierPool

BOOTSTRAP_DRAWS = 2000
MAJORITY_DRAWS = 200  # random subsets of k samples that stand for all of them in maj@k
EVALUATION_KEY = 0xE7A1  # its draws share nothing with training's


@dataclasses.dataclass(frozen=True)
class Setup:
    """What sampling from a policy needs to know of its run; ``config`` gives ``data`` and ``rollout``."""

    config: build.Config
    mesh: jax.sharding.Mesh
    tokenizer: Tokenizer
    model: ModelConfig
    lora: Lora | None


def setup_of(config: build.Config, devices: list | None = None) -> Setup:
    """A setup from a config alone: its batch, optimizer and method are not looked at.

    Raises:
        ValueError: a mesh that does not cover the devices, a tokenizer that is not there.
    """
    mesh = sharding.make_mesh(config.mesh.to_dict(), devices)
    tokenizer = build.load_tokenizer(config)
    model = build.model_config(config, tokenizer)
    return Setup(config, mesh, tokenizer, model, learning.adapters(config.lora.to_dict(), model))


@dataclasses.dataclass(frozen=True)
class Answered:
    """One prompt and its samples. ``correct`` is NaN where the verifier failed, or where there is none."""

    example: Example
    completions: tuple[str, ...]
    answers: tuple[str | None, ...]
    correct: tuple[float, ...]
    truncated: tuple[bool, ...]
    num_tokens: tuple[int, ...] = ()  # EOS included; empty when read back from a record without it


class Estimate(typing.NamedTuple):
    """A mean over prompts and its 95% bootstrap interval."""

    value: float
    low: float
    high: float


class Calls(typing.NamedTuple):
    """How many prompts are answered: in so many calls, at a time, by so many slots."""

    count: int
    prompts: int
    slots: int


def calls_of(num_prompts: int, per_call: int, num_samples: int, num_slots: int, mesh: Mesh) -> Calls:
    """At most ``per_call`` prompts a call (0: all), padded up to equal calls by further prompts, which are not counted."""
    shards = sharding.num_row_shards(mesh)
    count = -(-num_prompts // (per_call or num_prompts))
    prompts = -(-num_prompts // (count * shards)) * shards
    return Calls(count, prompts, max(min(num_slots, prompts * num_samples) // shards, 1) * shards)


class Evaluator:
    """Samples answers to a fixed set of prompts and has them verified. One compiled program, whatever the weights.

    What is drawn for a prompt does not depend on how many are sampled at a time.
    """

    def __init__(
        self,
        experiment: build.Experiment | Setup,
        source: Source,
        pool: VerifierPool | None,
        *,
        num_prompts: int,
        num_samples: int,
        num_slots: int,
        prompt_len: int | None = None,
        prompts_per_call: int = 0,
    ):
        """``pool`` None leaves everything unverified. ``prompt_len``: tokens, the config's by default, 0 for the
        longest there is; ``prompts_per_call``: prompts sampled by one call, which bounds memory; 0 is all.
        """
        setup = experiment
        if isinstance(setup, build.Experiment):
            setup = Setup(setup.config, setup.mesh, setup.tokenizer, setup.parts.model, setup.parts.lora)
        config, mesh, model = setup.config, setup.mesh, setup.model
        calls, batch, slots = calls_of(num_prompts, prompts_per_call, num_samples, num_slots, mesh)
        if prompt_len is None:
            prompt_len = config.data.max_prompt_len_tokens
        if not prompt_len:
            examples = (source.example(uid) for uid in range(calls * batch))
            prompt_len = max(len(prompt_tokens(setup.tokenizer, example, sys.maxsize)) for example in examples)
        self._source, self._pool, self._tokenizer = source, pool, setup.tokenizer
        self._num_prompts, self._num_samples, self._mesh = num_prompts, num_samples, mesh
        rollout = build.rollout_config(config, setup.tokenizer, mesh, num_samples, slots)
        self._generate = jax.jit(
            lambda params, prompts, key, sampling: generate(params, prompts, key, sampling, model, rollout)[0]
        )
        rows = build.rows_sharding(mesh)
        stream = prompt_stream(
            source,
            setup.tokenizer,
            batch_size=batch,
            prompt_len=prompt_len,
            rows=processes.local_rows(rows, batch),
        )
        self._prompts = [processes.to_global(next(stream), rows) for _ in range(calls)]

    def __call__(
        self,
        params: PyTree,
        sampling: Sampling,
        seed: int = 0,
        on_prompts: Callable[[int], None] = lambda done: None,
    ) -> list[Answered]:
        """Answers of ``params``; the same prompts and random numbers each time. ``on_prompts`` hears how many."""
        key = jax.random.fold_in(jax.random.key(seed), EVALUATION_KEY)
        answered: list[Answered] = []
        for prompts in self._prompts:
            out = self._generate(params, prompts, key, sampling)
            tokens, mask, truncated = processes.to_host((out.tokens, out.completion_mask, out.truncated))
            first = len(answered)
            examples = [
                self._source.example(uid)
                for uid in range(first, min(first + prompts.prompt_len.shape[0], self._num_prompts))
            ]
            answered += self._verified(examples, tokens, mask, truncated)
            on_prompts(len(answered))
        return answered

    def _verified(
        self,
        examples: list[Example],
        tokens: np.ndarray,
        mask: np.ndarray,
        truncated: np.ndarray,
    ) -> Iterator[Answered]:
        """The samples [N T] of some prompts with their verdicts; rows past the last example are padding."""
        per_prompt = self._num_samples
        rows = range(len(examples) * per_prompt)
        texts = [self._tokenizer.decode(tokens[row][mask[row]]) for row in rows]
        correct = [math.nan] * len(texts)
        if self._pool is not None:
            of_row = [examples[row // per_prompt] for row in rows]
            jobs = [Job(e.verifier, text, e.problem) for e, text in zip(of_row, texts, strict=True)]
            correct = _verdicts(self._pool, jobs).tolist()
        lengths = mask.sum(1)
        for number, example in enumerate(examples):
            own = slice(number * per_prompt, (number + 1) * per_prompt)
            yield Answered(
                example,
                tuple(texts[own]),
                tuple(extract_answer(text) for text in texts[own]),
                tuple(correct[own]),
                tuple(bool(x) for x in truncated[own]),
                tuple(int(x) for x in lengths[own]),
            )


def _verdicts(pool: VerifierPool, jobs: Sequence[Job]) -> Float[np.ndarray, " n"]:
    """1, 0, or NaN where the verifier failed; each process asks about its share, and hears of the others'."""
    own = slice(jax.process_index(), None, jax.process_count())
    correct = np.zeros(len(jobs), np.float32)
    correct[own] = [float(v.score >= 1.0) if v.valid else math.nan for v in pool.score(jobs[own])]
    return processes.sum_over_processes(correct)


def restore_policy(
    directory: pathlib.Path, setup: Setup, step: int | None = None, policy: str | None = None
) -> tuple[int, PyTree]:
    """(step, parameters) of a run's checkpoint, the newest by default; nothing else of it is read or touched. Of a cohort,
    those of the ``policy``.

    Safe beside a process that trains: the directory is opened for reading only.

    Raises:
        CheckpointError: no such checkpoint, or one of another model.
    """
    options = ocp.CheckpointManagerOptions(step_prefix="step", read_only=True)
    steps = []
    if directory.is_dir():
        with ocp.CheckpointManager(directory.absolute(), options=options) as manager:
            steps = sorted(manager.all_steps())
    if not steps:
        raise CheckpointError(
            f"{directory} holds no complete checkpoint; go on with the run (--resume) until it saves one."
        )
    step = steps[-1] if step is None else step
    if step not in steps:
        raise CheckpointError(f"{directory} holds no step {step}; it has {', '.join(map(str, steps))}.")
    return step, _restore_params(directory.absolute(), step, setup, policy)


def _restore_params(directory: pathlib.Path, step: int, setup: Setup, policy: str | None) -> PyTree:
    """The parameters of a saved (TrainState, rollout in flight), whose arrays are named by their paths. Of a cohort there
    is a TrainState by policy; of adapters the base lies apart."""
    whole = build.placed_shapes(setup.model, setup.lora, setup.mesh)
    apart = (lora.BASE,) if setup.lora is not None else ()
    which = () if policy is None else (jax.tree_util.DictKey(policy),)
    in_state = (jax.tree_util.SequenceKey(0), *which, jax.tree_util.GetAttrKey("params"))
    params = restore_part(directory / f"step_{step}/state", split(whole, apart)[0], in_state)
    if not apart:
        return params
    base = bases.read(directory, policy or "", setup.model, lora.base(whole))
    return unflatten_dict(sharding.by_path(params) | sharding.by_path(base), sep="/")


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


def majority(answered: Answered, k: int | None = None, seed: int = 0) -> float:
    """maj@k: how often the most common parsed answer of k samples is right; ties go to the answer seen first.

    With all samples (the default) that is 0 or 1; with fewer it is a mean over MAJORITY_DRAWS random subsets, kept in
    their order. An answer counts as right if a sample that gave it did. 0 when none parsed, but NaN for a verifier of
    one's own, whose answers need no mark; NaN also where the verifier failed on every sample of the winner.
    """
    votes = Counter(a for a in answered.answers if a is not None)
    total = len(answered.answers)
    if not votes:
        return math.nan if ":" in answered.example.verifier else 0.0
    names = list(votes)
    ids = np.array([-1 if a is None else names.index(a) for a in answered.answers])
    correct = np.array(answered.correct)
    right = np.array([_best(correct[ids == i]) for i in range(len(names))])
    if k is None or k >= total:
        subsets = np.arange(total)[None]
    else:
        order = np.random.default_rng(seed).random((MAJORITY_DRAWS, total)).argsort(1)
        subsets = np.sort(order[:, :k], axis=1)
    hits = ids[subsets][..., None] == np.arange(len(names))  # [draws k answers]
    count, first = hits.sum(1), np.where(hits.any(1), hits.argmax(1), subsets.shape[1])
    winner = (count * (subsets.shape[1] + 1) - first).argmax(1)
    won = np.where(count.any(1), right[winner], 0.0)
    won = won[~np.isnan(won)]
    return float(won.mean()) if len(won) else math.nan


def _best(verdicts: Float[np.ndarray, " n"]) -> float:
    """The best verdict there is; NaN when all failed."""
    known = verdicts[~np.isnan(verdicts)]
    return float(known.max()) if len(known) else math.nan


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
    """{group: {num_prompts, pass@1, pass@k, maj@k, error_fraction, truncated_fraction}}; groups: tasks, levels, all.

    k runs over the powers of two up to the number of samples, and that number; a group's levels follow it.
    """
    groups: dict[tuple[str, int], list[Answered]] = {}
    for a in answered:
        for level in (-1, a.example.problem.level):
            groups.setdefault((a.example.source, level), []).append(a)
    rows = {
        source if level < 0 else f"{source}/level_{level}": _row(groups[source, level])
        for source, level in sorted(groups)
    }
    return rows | ({"overall": _row(answered)} if answered else {})


def ks_of(num_samples: int) -> list[int]:
    """Powers of two up to the number of samples, and that number.

    >>> ks_of(6)
    [1, 2, 4, 6]
    """
    return [2**i for i in range(num_samples.bit_length()) if 2**i < num_samples] + [num_samples]


def _row(answered: Sequence[Answered]) -> dict[str, typing.Any]:
    samples = len(answered[0].correct)
    row: dict[str, typing.Any] = {"num_prompts": len(answered), "num_samples": samples}
    for k in ks_of(samples):
        row[f"pass@{k}"] = bootstrap(np.array([pass_at_k(a.correct, k) for a in answered]))._asdict()
    for k in ks_of(samples)[1:]:
        row[f"maj@{k}"] = bootstrap(np.array([majority(a, k) for a in answered]))._asdict()
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
        if n > 1:
            out[f"val-core/{name}/acc/best@{n}/mean"] = row[f"pass@{n}"]["value"]
            out[f"val-core/{name}/acc/maj@{n}/mean"] = row[f"maj@{n}"]["value"]
    return out


def flips(before: Sequence[Answered], after: Sequence[Answered]) -> dict[str, float]:
    """Which questions' majorities changed sides: a harm audit; {} with fewer than two samples a prompt.

    Questions whose majority has no verdict are left out; {} also when that is all of them.
    """
    if not before or len(before[0].correct) < 2:
        return {}
    sides = np.array([[majority(a), majority(b)] for a, b in zip(before, after, strict=True)])
    was, now = (sides[~np.isnan(sides).any(1)] > 0.5).T
    if not len(was):
        return {}
    return {
        "before": float(was.mean()),
        "after": float(now.mean()),
        "right_to_wrong": int((was & ~now).sum()),
        "wrong_to_right": int((~was & now).sum()),
        "num_samples": len(before[0].correct),
    }


RECORDED = ("completions", "answers", "correct", "truncated", "num_tokens")


def to_record(answered: Answered) -> dict[str, typing.Any]:
    """JSON of what was answered; the example is its source's."""
    return {field: getattr(answered, field) for field in RECORDED}


def from_record(record: Mapping[str, typing.Any], source: Source, uid: int) -> Answered:
    """The inverse of ``to_record`` for the ``uid``-th prompt; a failed verdict is null in JSON."""
    fields: dict[str, typing.Any] = {name: tuple(record.get(name, ())) for name in RECORDED}
    fields["correct"] = tuple(math.nan if c is None else float(c) for c in record["correct"])
    return Answered(source.example(uid), **fields)

"""Where verdicts come from: verifiers in graph on token ids, or Python ones on the host, each group asked about once."""

import functools
import json
import os
import typing
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import io_callback
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from rl_reason.data.example import Example, Source
from rl_reason.sharding import AXES, ROWS
from rl_reason.tasks.answer_ids import class_ids, make_answer_ids
from rl_reason.tasks.base import Problem, Verdict
from rl_reason.tasks.in_graph import make_verifier
from rl_reason.types import Prompts, Rollout, Verdicts, Verify
from rl_reason.verifier_pool import Job, VerifierPool

# (tokens [n T], completion_mask [n T], uid [n]) -> (score [n], valid [n]) or, where votes are wanted, (score, valid,
# answers [n]), all numpy. Must not raise.
ScoreRows = Callable[[np.ndarray, np.ndarray, np.ndarray], tuple[np.ndarray, ...]]
GROUP_CLASSES = "rl_reason.tasks.math_answer:group_classes"  # the verifier that says which answers are the same

CALLBACK_LIMIT_BYTES = 64 * 1024  # a shard; above it callbacks on several CPU devices can hang jax 0.10


def in_graph(
    task_names: Sequence[str],
    tokenizer: typing.Any,
    *,
    group_size: int,
    completion_len: int,
    answer_rule: str | None = None,
) -> Verify:
    """Verdicts computed inside the program, on token ids; with an ``answer_rule`` the answers of each group too.

    Raises:
        ValueError: a task without such a verifier, by name, or an unknown rule.
    """
    verifier = make_verifier(task_names, tokenizer)
    spell = None if answer_rule is None else make_answer_ids(tokenizer, rule=answer_rule)

    def verify(rollout: Rollout, prompts: Prompts) -> Verdicts:
        if prompts.reference is None or prompts.route is None:
            raise ValueError(
                "Verifiers in graph need prompts with reference and route; give data.max_reference_len_tokens."
            )
        width = rollout.tokens.shape[1]
        index = jnp.minimum(rollout.prompt_len[:, None] + jnp.arange(completion_len), width - 1)
        inside = rollout.prompt_len[:, None] + jnp.arange(completion_len) < width
        spread = lambda x: jnp.repeat(x, group_size, axis=0)
        right = verifier(
            spread(prompts.tokens),
            rollout.prompt_len,
            spread(prompts.reference),
            jnp.take_along_axis(rollout.tokens, index, axis=1),
            jnp.take_along_axis(rollout.completion_mask, index, axis=1) & inside,
            spread(prompts.route),
        )
        answers = None
        if spell is not None:
            answers = class_ids(spell(rollout.tokens, rollout.completion_mask), group_size)
        return Verdicts(right.astype(rollout.rollout_logprobs.dtype), jnp.ones_like(right), answers)

    return verify


class HostVerifier:
    """Asks a pool of killable processes about rows of tokens; a broken verifier makes its rows invalid, nothing else.

    With an ``answer_rule`` it also asks which rows of each group of ``group_size`` gave the same answer; a group that
    nobody could sort in time has no answers.
    """

    def __init__(
        self,
        source: Source,
        tokenizer: typing.Any,
        pool: VerifierPool,
        *,
        answer_rule: str | None = None,
        group_size: int = 1,
    ):
        self._example: Callable[[int], Example] = functools.lru_cache(maxsize=4096)(source.example)
        self._tokenizer, self._pool = tokenizer, pool
        self._answer_rule, self._group_size = answer_rule, group_size
        self.last_error: str | None = None  # the newest reason a verifier gave for failing

    def __call__(self, tokens: np.ndarray, completion_mask: np.ndarray, uid: np.ndarray):
        return self.submit(tokens, completion_mask, uid)()

    def submit(self, tokens: np.ndarray, completion_mask: np.ndarray, uid: np.ndarray):
        """Starts scoring; the returned function waits for (score [n], valid [n]), and answers [n] if they are wanted."""
        texts = decoded(self._tokenizer, tokens, completion_mask)
        jobs = _row_jobs(self._example, uid, texts)
        if self._answer_rule is not None:
            jobs += _group_jobs(texts, self._group_size, self._answer_rule)
        future = self._pool.submit(jobs)

        def wait():
            verdicts = future.result()
            self.last_error = next((v.why for v in verdicts if not v.valid), self.last_error)
            said = _scores(verdicts[: len(texts)])
            return said if self._answer_rule is None else (*said, _answers(verdicts[len(texts) :], self._group_size))

        return wait


class CohortVerifier:
    """The same for several policies, each with a tokenizer of its own, whose answers to a prompt are compared with each
    other: ``samples`` of each policy."""

    def __init__(
        self,
        source: Source,
        tokenizers: Mapping[str, typing.Any],
        pool: VerifierPool,
        *,
        answer_rule: str,
        samples: int,
    ):
        self._example: Callable[[int], Example] = functools.lru_cache(maxsize=4096)(source.example)
        self._tokenizers, self._pool = tokenizers, pool
        self._answer_rule, self._samples = answer_rule, samples
        self.last_error: str | None = None

    def __call__(self, rows: Mapping[str, tuple[np.ndarray, np.ndarray]], uid: np.ndarray) -> dict[str, tuple]:
        """(score [n], valid [n], answers [n]) of each policy's (tokens [n T], completion_mask [n T]); answers are numbered
        over all of a prompt's rows, policy by policy."""
        texts = {name: decoded(self._tokenizers[name], *own) for name, own in rows.items()}
        jobs = [job for own in texts.values() for job in _row_jobs(self._example, uid, own)]
        size = len(texts) * self._samples
        together = np.stack([np.reshape(own, (-1, self._samples)) for own in texts.values()], axis=1)  # [B M K]
        verdicts = self._pool.submit(
            jobs + _group_jobs(together.reshape(-1).tolist(), size, self._answer_rule)
        ).result()
        self.last_error = next((v.why for v in verdicts if not v.valid), self.last_error)
        answers = _answers(verdicts[len(jobs) :], size).reshape(together.shape)
        said = [_scores(verdicts[m * len(uid) :][: len(uid)]) for m in range(len(texts))]
        return {name: (*said[m], answers[:, m].reshape(-1)) for m, name in enumerate(texts)}


def decoded(tokenizer: typing.Any, tokens: np.ndarray, mask: np.ndarray) -> list[str]:
    """What the masked tokens of each row say."""
    return [tokenizer.decode(row[own]) for row, own in zip(tokens, mask, strict=True)]


def _row_jobs(example_of: Callable[[int], Example], uid: np.ndarray, texts: Sequence[str]) -> list[Job]:
    examples = [example_of(int(draw)) for draw in uid]
    return [Job(example.verifier, text, example.problem) for example, text in zip(examples, texts, strict=True)]


def _group_jobs(texts: Sequence[str], size: int, answer_rule: str) -> list[Job]:
    """One job a group, so that a hostile answer costs its own group the deadline."""
    groups = [texts[i : i + size] for i in range(0, len(texts), size)]
    problem = Problem("answers", 0, {"ground_truth": answer_rule, "extra_info": None})
    return [Job(GROUP_CLASSES, json.dumps(group), problem) for group in groups]


def _scores(verdicts: Sequence[Verdict]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([v.score for v in verdicts], np.float32), np.array([v.valid for v in verdicts], bool)


def _answers(verdicts: Sequence[Verdict], size: int) -> np.ndarray:
    """The classes that each group's verdict carries in its parts; -1 throughout for a group without."""
    nobody = np.full(size, -1, np.int32)
    found = [np.array([number for _, number in v.parts], np.int32) if v.valid else nobody for v in verdicts]
    return np.concatenate(found)


def by_callback(score_rows: ScoreRows, mesh: Mesh, *, group_size: int, with_answers: bool = False) -> Verify:
    """Makes a host verifier callable inside the program: each shard of rows asks the host it lives on, once.

    Rows are cut over data, fsdp and expert; along tensor only index 0 asks and the verdict is summed over it, because
    replicas that each asked could be told different things and would drift apart.
    """
    others = tuple(axis for axis in AXES if axis not in ROWS)

    def on_host(tokens, completion_mask, uid):
        score, valid, *answers = score_rows(np.asarray(tokens), np.asarray(completion_mask), np.asarray(uid))
        numbers = answers[0] if with_answers else np.full(len(score), -1)
        return np.asarray(score, np.float32), np.asarray(valid, bool), np.asarray(numbers, np.int32)

    def ask(tokens, completion_mask, uid):
        rows = tokens.shape[0]
        if rows % group_size:
            raise ValueError(
                f"A shard of {rows} rows cuts a group of {group_size}; fewer row shards, or more prompts."
            )
        shapes = tuple(jax.ShapeDtypeStruct((rows,), dtype) for dtype in (jnp.float32, jnp.bool_, jnp.int32))

        def call(*args):
            return io_callback(on_host, shapes, *args, ordered=False)

        def skip(*_):
            return jnp.zeros(rows, jnp.float32), jnp.zeros(rows, bool), jnp.zeros(rows, jnp.int32)

        if all(mesh.shape[axis] == 1 for axis in others):
            return call(tokens, completion_mask, uid)
        asks = jnp.bool_(True)
        for axis in others:
            asks &= jax.lax.axis_index(axis) == 0
        score, valid, answers = jax.lax.cond(asks, call, skip, tokens, completion_mask, uid)
        total = lambda x: jax.lax.psum(x, others)
        return total(score), total(valid.astype(jnp.int32)) > 0, total(answers)

    sharded = jax.shard_map(ask, mesh=mesh, in_specs=P(ROWS), out_specs=P(ROWS), check_vma=False)

    def verify(rollout: Rollout, prompts: Prompts) -> Verdicts:
        uid = jnp.repeat(prompts.uid, group_size)
        score, valid, answers = sharded(rollout.tokens, rollout.completion_mask, uid)
        return Verdicts(score.astype(rollout.rollout_logprobs.dtype), valid, answers if with_answers else None)

    return verify


def check_callback_threads(rollout_bytes: int, mesh: Mesh) -> None:
    """Refuses the one set-up in which callbacks hang: jax 0.10, several CPU devices, and too few host threads.

    Raises:
        ValueError: with the environment variable to set.
    """
    devices = mesh.local_mesh.size
    if jax.default_backend() != "cpu" or devices == 1 or rollout_bytes // devices <= CALLBACK_LIMIT_BYTES:
        return
    wanted = devices + (os.cpu_count() or 1)
    if int(os.environ.get("NPROC", 0)) < wanted:
        raise ValueError(
            f"Callbacks of {rollout_bytes // devices} bytes a shard on {devices} CPU devices can hang; "
            f"set NPROC={wanted} in the environment before Python starts."
        )

"""Models that judge, asked inside the program: a generative verifier and a preference model over the same rows.

    prompt | reference | candidate ?          where | and ? are control bytes that no task writes

A case is read once, and one position decides: what comes after ``?``. The verifier's most likely token there is its reply,
of the whole vocabulary (CompassVerifier's A, B or C; xtuner draws one token, greedily). The preference model has a number
there instead (POLAR, arXiv:2507.05197, whose rows are prompt, reference, <|reward|>, prompt, candidate, a last token).
A candidate is the completion with its EOS, so that one that did not finish looks unfinished.
"""

import dataclasses
import typing
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, PyTree

from rl_reason.batch import in_pieces
from rl_reason.models import reward_head, transformer
from rl_reason.models.transformer import ModelConfig
from rl_reason.splice import pack, spell
from rl_reason.tags import Tokenizer
from rl_reason.types import Prompts, Rollout, struct

SEPARATOR, ASK = b"\x1f", b"\x1e"
LABELS = ("A", "B", "C")  # right; wrong; unfinished, or no answer
TRAINED = frozenset({"model", "tasks", "num_steps", "steps_per_call", "batch_size", "learning_rate"})
KEYS = {"judge": TRAINED, "preference": TRAINED | {"focal_gamma"}}  # of config.models


@struct
class Cases:
    """What is judged; each is filled up on the right."""

    prompt: Int[Array, "*K N P"]
    prompt_len: Int[Array, "*K N"]
    reference: Int[Array, "*K N R"]
    reference_len: Int[Array, "*K N"]
    candidate: Int[Array, "*K N C"]
    candidate_len: Int[Array, "*K N"]


def cases_of(rollout: Rollout, prompts: Prompts, pad_id: int) -> Cases:
    """The completions of a rollout, each with its prompt and its reference.

    Raises:
        ValueError: prompts without references.
    """
    if prompts.reference is None:
        raise ValueError("judges read references; give the prompts some with data.max_reference_len_tokens.")
    width = rollout.tokens.shape[1]
    index = rollout.prompt_len[:, None] + jnp.arange(width - prompts.tokens.shape[1])
    return Cases(
        prompt=prompts.tokens[rollout.prompt_id],
        prompt_len=rollout.prompt_len,
        reference=prompts.reference[rollout.prompt_id],
        reference_len=(prompts.reference != pad_id).sum(1)[rollout.prompt_id],
        candidate=jnp.take_along_axis(rollout.tokens, jnp.minimum(index, width - 1), axis=1),
        candidate_len=rollout.completion_mask.sum(1),
    )


@dataclasses.dataclass(frozen=True)
class Reader:
    """What both models share: their shapes, and how a case becomes a row."""

    model: ModelConfig
    separator_id: int
    ask_id: int
    pad_id: int

    def rows(self, cases: Cases) -> tuple[Int[Array, "N T"], Int[Array, " N"]]:
        """Tokens and lengths; a row's last token is the question."""
        one = jnp.ones((cases.prompt.shape[0], 1), bool)
        mark = lambda token: (jnp.full(one.shape, token, jnp.int32), one)
        filled = lambda tokens, length: (tokens, jnp.arange(tokens.shape[1]) < length[:, None])
        parts = [
            filled(cases.prompt, cases.prompt_len),
            mark(self.separator_id),
            filled(cases.reference, cases.reference_len),
            mark(self.separator_id),
            filled(cases.candidate, cases.candidate_len),
            mark(self.ask_id),
        ]
        tokens, _, length = pack(parts, sum(tokens.shape[1] for tokens, _ in parts), self.pad_id)
        return tokens, length

    def read(self, params: PyTree, cases: Cases) -> Float[Array, "N D"]:
        """The hidden state at the question."""
        tokens, length = self.rows(cases)
        valid = jnp.arange(tokens.shape[1]) < length[:, None]
        hidden = transformer.forward(params, tokens, valid, self.model).hidden
        return jnp.take_along_axis(hidden, length[:, None, None] - 1, axis=1)[:, 0]


@dataclasses.dataclass(frozen=True)
class Verifier(Reader):
    """A language model that replies with a letter."""

    label_ids: tuple[int, ...]

    def init(self, key: Key[Array, ""]) -> PyTree:
        """Random parameters."""
        return transformer.init(key, self.model)

    def logits(self, params: PyTree, cases: Cases) -> Float[Array, "N V"]:
        """Of its one token, in fp32 or wider."""
        return transformer.logits(self.read(params, cases), transformer.unembedding(params, self.model), self.model)

    def __call__(self, params: PyTree, cases: Cases) -> Int[Array, " N"]:
        """0 for A, 1 for B, 2 for C; -1 for any other token, which nobody can read."""
        reply = jnp.argmax(self.logits(params, cases), axis=1)
        said = reply[:, None] == jnp.array(self.label_ids)
        return jnp.where(said.any(1), jnp.argmax(said, axis=1), -1).astype(jnp.int32)


@dataclasses.dataclass(frozen=True)
class Preference(Reader):
    """A reward model; its numbers compare candidates of one prompt, and mean nothing across prompts."""

    def init(self, key: Key[Array, ""]) -> PyTree:
        """Random parameters."""
        backbone, head = jax.random.split(key)
        return reward_head.init(head, transformer.init(backbone, self.model), self.model)

    def __call__(self, params: PyTree, cases: Cases) -> Float[Array, " N"]:
        """A score a case."""
        hidden = self.read(params["backbone"], cases)
        return reward_head.logits(params["head"], hidden)


Judge = Verifier | Preference


def ask(judge: Judge, params: PyTree, rollout: Rollout, prompts: Prompts, pieces: int) -> Array:
    """What a judge says of each row, ``pieces`` of them at a time."""
    return in_pieces(lambda cases: judge(params, cases), cases_of(rollout, prompts, judge.pad_id), pieces)


def described(
    models: Mapping[str, Mapping[str, typing.Any]], policy: ModelConfig, sources: Sequence[str], tokenizer: Tokenizer
) -> dict[str, Judge]:
    """The models that ``config.models`` describes: the policy's shapes without experts, but for what ``model`` changes.

    Raises:
        ValueError: an unknown name, keys missing or unknown, or tasks that the data lacks.
    """
    judges: dict[str, Judge] = {}
    for name, own in models.items():
        if name not in KEYS:
            raise ValueError(f"config.models: no {name!r}; there are {', '.join(KEYS)}.")
        if set(own) != KEYS[name]:
            raise ValueError(f"config.models.{name} has keys {sorted(own)}; it takes exactly {sorted(KEYS[name])}.")
        if not own["tasks"] or set(own["tasks"]) - set(sources):
            raise ValueError(
                f"config.models.{name}.tasks={tuple(own['tasks'])}: name tasks of config.data.tasks, or sources of its "
                f"files, which are {tuple(sources)}."
            )
        if own["num_steps"] % max(own["steps_per_call"], 1):
            raise ValueError(f"config.models.{name}: num_steps is no multiple of steps_per_call.")
        dense = dataclasses.asdict(policy) | dict(num_experts=0, experts_per_token=0)
        shapes = ModelConfig.of({**dense, **own["model"]})
        separator_id, ask_id = (_one_id(text, tokenizer) for text in (SEPARATOR, ASK))
        if name == "preference":
            judges[name] = Preference(shapes, separator_id, ask_id, tokenizer.pad_id)
        else:
            labels = tuple(_one_id(label.encode(), tokenizer) for label in LABELS)
            judges[name] = Verifier(shapes, separator_id, ask_id, tokenizer.pad_id, labels)
    return judges


def _one_id(text: bytes, tokenizer: Tokenizer) -> int:
    ids = spell(text, tokenizer)
    if len(ids) != 1:
        raise ValueError(f"config.models: the tokenizer writes {text!r} with {len(ids)} tokens; judges need one.")
    return ids[0]

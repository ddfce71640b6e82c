"""Texts with tags in them, tokens that cut them up in every way, and searches in plain bytes to compare with."""

import re
import typing

import jax.numpy as jnp
import numpy as np

from rl_reason.data.sentencepiece_tokenizer import SentencePieceTokenizer
from rl_reason.tags import Format
from rl_reason.types import Prompts, Rollout

TOKENIZER = SentencePieceTokenizer.load()
R1 = Format("<think>", "</think>", "<answer>", "</answer>")
NOTHINK = Format("", "", "<answer>", "</answer>")
MARK = Format("", "", "####", "")
WORKED = Format("<think>", "</think>", "####", "")
ROWS, WIDTH = 16, 64
TEXT = "".join(tag for form in (R1, MARK) for tag in form) + " x<think>1</think> <answer> 4 2\n</answer>"
# Pieces of one to nine bytes out of texts with tags, so that tags lie in and across them in every way; then every byte.
CHUNKS = np.random.default_rng(0)
PIECES = (
    b"",
    *sorted({TEXT[i : i + n].encode() for i, n in CHUNKS.integers((0, 1), (len(TEXT) - 1, 10), (150, 2))}),
    b"<answer>4</answer>",
    b"#####",
    *(bytes([b]) for b in range(256)),
)
FORMS = {"r1": R1, "nothink": NOTHINK, "mark": MARK, "worked": WORKED}
TAGGED = [i for i, piece in enumerate(PIECES) if len(piece) > 1]


def rows_of(ids):
    """[ROWS WIDTH] tokens behind a prompt of one token, and the completion's mask."""
    tokens = np.zeros((ROWS, WIDTH), np.int32)
    lengths = np.zeros(ROWS, np.int32)
    for row, sequence in enumerate(ids):
        tokens[row, 1 : 1 + len(sequence)] = sequence
        lengths[row] = len(sequence)
    tokens[:, 0] = 5
    return jnp.asarray(tokens), (jnp.arange(WIDTH) >= 1) & (jnp.arange(WIDTH) < 1 + lengths[:, None])


def bytes_of(ids, pieces):
    return b"".join(pieces[i] for i in ids if i < len(pieces))


def cut_at_random(rng, text, pieces):
    """Ids that write ``text``, each token chosen at random among the pieces that fit."""
    ids, beginning = [], {}
    for i, piece in enumerate(pieces):
        beginning.setdefault(piece[:1], []).append(i)
    while text:
        fits = [i for i in beginning[text[:1]] if text.startswith(pieces[i])]
        ids.append(int(rng.choice(fits)))
        text = text[len(pieces[ids[-1]]) :]
    return ids


def host_occurrences(text, tag):
    """Where each begins, overlapping ones too."""
    return [m.start() for m in re.finditer(b"(?=" + re.escape(tag) + b")", text)]


def host_answer(text, form):
    """(begin, end) of the one well-formed answer, by searches in the bytes; None without."""
    *before, opening, closing = (tag.encode() for tag in form)
    stops, at = [], 0
    for tag in filter(None, (*before, opening, closing)):
        where = host_occurrences(text, tag)
        if tag == opening and not closing:
            where = where[-1:]
        if len(where) != 1 or where[0] < at:
            return None
        at = where[0] + len(tag)
        stops.append((where[0], at))
    return (stops[-2][1], stops[-1][0]) if closing else (stops[-1][1], len(text))


class Pieces(typing.NamedTuple):
    """A tokenizer of PIECES: the longest piece that fits comes next. Padding is 0, EOS writes nothing either."""

    piece_bytes: tuple[bytes, ...] = (*PIECES, b"")
    eos_id: int = len(PIECES)
    pad_id: int = 0

    def encode(self, text: str) -> list[int]:
        """Ids by longest match."""
        rest, ids = text.encode(), []
        while rest:
            fits = [i for i, piece in enumerate(PIECES) if piece and rest.startswith(piece)]
            ids.append(max(fits, key=lambda i: len(PIECES[i])))
            rest = rest[len(PIECES[ids[-1]]) :]
        return ids


TOKENIZERS = {"embedded": TOKENIZER, "pieces": Pieces()}

ASKED, FIVE = TOKENIZER.encode("2+3="), TOKENIZER.encode("5")
COMPLETION = 48  # tokens


def sampled(texts, baseline=None, truncated=False, reference=FIVE):
    """(rollout, prompts): completions of one prompt, EOS behind each."""
    width = len(ASKED) + COMPLETION
    lists = [[*ASKED, *TOKENIZER.encode(text), TOKENIZER.eos_id] for text in texts]
    tokens = np.full((len(texts), width), TOKENIZER.pad_id, np.int32)
    for row, ids in zip(tokens, lists, strict=True):
        row[: len(ids)] = ids
    columns, length = np.arange(width), np.array([[len(ids)] for ids in lists])
    one = jnp.zeros(1, jnp.int32)
    prompts = Prompts(
        tokens=jnp.array([ASKED]),
        prompt_len=one + len(ASKED),
        example_id=one,
        uid=one,
        reference=jnp.array([[*reference, TOKENIZER.pad_id]]),
        baseline=None if baseline is None else jnp.array([baseline]),
    )
    rollout = Rollout(
        tokens=jnp.asarray(tokens),
        prompt_len=jnp.full(len(texts), len(ASKED), jnp.int32),
        completion_mask=jnp.asarray((columns >= len(ASKED)) & (columns < length)),
        rollout_logprobs=jnp.full(tokens.shape, -0.5),
        sampled_logprobs=jnp.full(tokens.shape, -0.25),
        prompt_id=jnp.zeros(len(texts), jnp.int32),
        truncated=jnp.full(len(texts), truncated),
        off_policy=jnp.zeros(len(texts), bool),
    )
    return rollout, prompts


def always(probability):
    """Log-probabilities of a policy that gives every token the same."""
    return lambda params, rollout: jnp.where(rollout.completion_mask, jnp.log(probability), 0.0)


def judged(scores):
    return jnp.array(scores, jnp.float32), jnp.ones(len(scores), bool)

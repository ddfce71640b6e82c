"""Which samples of a prompt gave the same answer, in graph: the bytes of the answer, then ids by equality.

The answer is what ``in_graph`` compares with the oracle's: the bytes after the last mark, without spaces around them. Where
there is none the rules differ (TTRL, arXiv:2504.16084; its code had both):

* "v2": without a mark, or with nothing after it, a sample has no answer. "equivalence" is the same here: answers of
  the embedded tasks have one spelling.
* "v1": without a mark the answer is the last run of digits in the text, with a minus sign before it if there is one; without
  digits it is empty. The empty answer is a class like any other, and can win a vote.

Answers of more than MAX_ANSWER_BYTES bytes are none, under any rule: no task here has one. Equality is of bytes; texts in
which a decoder wrote U+FFFD for different bytes differ.
"""

import typing
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from rl_reason.tasks.in_graph import (
    MAX_ANSWER_BYTES,
    HasPieceBytes,
    Text,
    TokenBytes,
    answer_span,
    read,
    spelled,
    token_bytes,
)
from rl_reason.types import struct

RULES = ("v1", "v2", "equivalence")
DIGITS, MINUS = b"0123456789", ord("-")


@struct
class Spelled:
    """The answers of some rows."""

    text: Int[Array, "*b A"]  # bytes, zeros after the last
    length: Int[Array, "*b"]  # in bytes; 0 is the empty answer, -1 is none


Spell = Callable[[Int[Array, "N C"], Bool[Array, "N C"]], Spelled]  # (tokens, completion_mask) -> answers


@struct
class _Digits:
    """Per token of the vocabulary, as offsets within it."""

    last: Int[Array, " V"]  # of its last digit; -1 without
    before: Int[Array, " V"]  # of the last other byte before that; -1 without
    last_other: Int[Array, " V"]  # of its last byte that is no digit; -1 without


def _digit_tables(piece_bytes: Sequence[bytes]) -> _Digits:
    def of(piece: bytes) -> tuple[int, int, int]:
        last = max((i for i, byte in enumerate(piece) if byte in DIGITS), default=-1)
        others = [i for i, byte in enumerate(piece) if byte not in DIGITS]
        return last, max((i for i in others if i < last), default=-1), max(others, default=-1)

    last, before, last_other = (jnp.array(x, jnp.int32) for x in zip(*map(of, piece_bytes), strict=True))
    return _Digits(last, before, last_other)


def _last_number(
    text: Text, vocabulary: TokenBytes, digits: _Digits
) -> tuple[Int[Array, " N"], Int[Array, " N"], Bool[Array, " N"]]:
    """First and last byte of the last run of digits, a minus sign before it included; and whether there is one."""
    writes = text.end > text.start
    at = lambda offset: jnp.where(writes & (offset >= 0), text.start + offset, -1)
    lasts = at(digits.last[text.tokens])
    last = lasts.max(1)
    # The last byte before the run that is no digit: within the token of its last digit, or in an earlier one.
    owner = lasts == last[:, None]
    earlier = text.end <= last[:, None]
    own = jnp.where(owner, at(digits.before[text.tokens]), -1)
    before = jnp.maximum(own, jnp.where(earlier, at(digits.last_other[text.tokens]), -1)).max(1)
    signed = spelled(text, before, before, 1, vocabulary)[:, 0] == MINUS
    return jnp.where((before >= 0) & signed, before, before + 1), last, last >= 0


def make_answer_ids(tokenizer: HasPieceBytes, *, rule: str) -> Spell:
    """``fn(tokens [N C], mask [N C]) -> Spelled``, to be jitted; whole rows will do, since only masked tokens are read.

    Raises:
        ValueError: an unknown rule.
    """
    if rule not in RULES:
        raise ValueError(f"rule={rule!r}; there are {', '.join(RULES)}.")
    vocabulary = token_bytes(tokenizer.piece_bytes)
    digits = _digit_tables(tokenizer.piece_bytes)

    def spell(tokens: Int[Array, "N C"], mask: Bool[Array, "N C"]) -> Spelled:
        text = read(tokens, mask, vocabulary)
        first, last, found = answer_span(text, vocabulary)
        if rule == "v1":
            number_first, number_last, number = _last_number(text, vocabulary, digits)
            first = jnp.where(found, first, jnp.where(number, number_first, 0))
            last = jnp.where(found, last, jnp.where(number, number_last, -1))
            found = jnp.ones_like(found)
        length = last - first + 1
        counts = found & (length >= (0 if rule == "v1" else 1)) & (length <= MAX_ANSWER_BYTES)
        answer = spelled(text, first, last, MAX_ANSWER_BYTES, vocabulary)
        return Spelled(jnp.where(counts[:, None], answer, 0), jnp.where(counts, length, -1))

    return spell


def class_ids(answers: Spelled, group_size: int) -> Int[Array, " N"]:
    """Ids of answers within groups of consecutive rows: the place in its group of the first row with the same bytes; -1
    without an answer.

    >>> text = jnp.array([[55], [51], [55], [0]])
    >>> class_ids(Spelled(text, jnp.array([1, 1, 1, -1])), 4).tolist()
    [0, 1, 0, -1]
    """
    grouped = jax.tree.map(lambda x: x.reshape(-1, group_size, *x.shape[1:]), answers)
    equal = jnp.all(grouped.text[:, :, None] == grouped.text[:, None, :], axis=-1)
    equal &= grouped.length[:, :, None] == grouped.length[:, None, :]
    first = jnp.argmax(equal, axis=-1).astype(jnp.int32)
    return jnp.where(grouped.length >= 0, first, -1).reshape(-1)


def join(answers: Sequence[Spelled], num_prompts: int) -> Spelled:
    """The answers of several policies to the same prompts, a prompt's rows side by side: policy by policy, [B M K] flat.

    ``class_ids(join(...), M * K)`` are then comparable over the policies of a prompt.
    """

    def side_by_side(*x: Array) -> Array:
        by_prompt = [leaf.reshape(num_prompts, -1, *leaf.shape[1:]) for leaf in x]
        joined = jnp.concatenate(by_prompt, axis=1)
        return joined.reshape(-1, *joined.shape[2:])

    return typing.cast(Spelled, jax.tree.map(side_by_side, *answers))

"""Puts the reference in the place of the answer, on token ids and in graph.

A row ``prompt ... <answer> 41 </answer> ... EOS`` becomes ``prompt ... <answer> 42 </answer> ... EOS``: the completion up to
and with the blanks behind the opening tag (one space where there are none), the reference's own ids, one space, and the
completion from the closing tag on. Without a closing tag the row ends in EOS. Where a cut falls inside a token, the part
that stays is spelled by other tokens, byte for byte, from a table made on the host; every other token is the sample's.

Departure from RLPR's code, which edits text and tokenises it anew: the reference keeps the ids that it has by itself, so
no token joins it to the space before it, and the mask is on exactly its tokens.
"""

import dataclasses
import functools
import typing

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from rl_reason.tags import WHITESPACE, Answer, Format, Tokenizer, find_answer, vocabulary, written
from rl_reason.types import Prompts, Rollout, struct


class Spellings(typing.NamedTuple):
    """Ids that write a part of a token. Rows of ``ids`` are shared; row 0 is empty, and no cut that can occur has it."""

    left: Int[np.ndarray, " cuts"]  # row for the bytes before a cut, which ``tags.Vocabulary.cut`` finds
    right: Int[np.ndarray, " cuts"]  # and from it on
    ids: Int[np.ndarray, "rows L"]
    length: Int[np.ndarray, " rows"]
    space: Int[np.ndarray, " S"]


@struct
class Spliced:
    """Rows with the reference in the answer's place; as they were, with nothing marked as reference, where that failed."""

    tokens: Int[Array, "N T"]
    completion_mask: Bool[Array, "N T"]
    reference_mask: Bool[Array, "N T"]
    sampled_mask: Bool[Array, "N T"]  # what stands before the reference and is the sample's own, in its old column


def spell(text: bytes, tokenizer: Tokenizer) -> list[int]:
    """Ids that write exactly these bytes: the tokenizer's own for them, else one a byte.

    Raises:
        ValueError: a byte that no token writes alone.
    """
    pieces = tokenizer.piece_bytes
    try:
        ids = tokenizer.encode(text.decode())
    except UnicodeDecodeError:
        ids = []
    if b"".join(pieces[i] for i in ids) == text:
        return ids
    single = {piece: i for i, piece in reversed(list(enumerate(pieces))) if len(piece) == 1}
    missing = sorted({bytes([byte]) for byte in text} - set(single))
    if missing:
        raise ValueError(f"no token writes the byte {missing[0]!r} alone; splicing needs a tokenizer with byte pieces")
    return [single[bytes([byte])] for byte in text]


def _opens(part: bytes, tag: bytes) -> bool:
    """Whether a token may be cut after ``part``: what it ends with, blanks aside, is in the opening tag or its end."""
    for stop in range(len(part), -1, -1):
        head = part[:stop]
        if tag.endswith(head) or head.endswith(tag):
            return True
        if stop and part[stop - 1] not in WHITESPACE:
            return False
    return False


def spellings(form: Format, tokenizer: Tokenizer) -> Spellings:
    """Every part of a token that can be left where a tag ends or begins inside it."""
    return _spellings(form.answer_open.encode(), form.answer_close.encode(), tokenizer, tuple(tokenizer.piece_bytes))


@functools.lru_cache(maxsize=8)
def _spellings(opening: bytes, closing: bytes, tokenizer: Tokenizer, pieces: tuple[bytes, ...]) -> Spellings:
    cuts = vocabulary(pieces)
    left, right = np.zeros((2, len(cuts.blank_after)), np.int32)
    rows: dict[bytes, int] = {b"": 0}
    for start, piece in zip(cuts.cut, pieces, strict=False):
        for c in range(1, len(piece)):
            before, after = piece[:c], piece[c:]
            if _opens(before, opening):
                left[start + c] = rows.setdefault(before, len(rows))
            if closing and (closing.startswith(after) or after.startswith(closing)):
                right[start + c] = rows.setdefault(after, len(rows))
    spelled = [spell(text, tokenizer) for text in rows]
    ids = np.full((len(rows), max(1, *map(len, spelled)) if len(rows) > 1 else 1), tokenizer.pad_id, np.int32)
    for row, found in zip(ids, spelled, strict=True):
        row[: len(found)] = found
    length = np.array([len(found) for found in spelled], np.int32)
    return Spellings(left, right, ids, length, np.array(spell(b" ", tokenizer), np.int32))


Parts = list[tuple[Int[Array, "N _"], Bool[Array, "N _"]]]


def pack(
    parts: Parts, width: int, pad_id: int
) -> tuple[Int[Array, "N T"], list[Bool[Array, "N T"]], Int[Array, " N"]]:
    """What is valid in each part, one part after the other without gaps; where each part came to lie, and the length.

    What lies beyond ``width`` is lost; the length counts it.
    """
    ids = jnp.concatenate([x for x, _ in parts], axis=1)
    valid = jnp.concatenate([x for _, x in parts], axis=1)
    owner = np.repeat(np.arange(len(parts)), [x.shape[1] for x, _ in parts])
    column = jnp.where(valid, jnp.cumsum(valid, axis=1) - 1, width)
    row = jnp.arange(ids.shape[0])[:, None]
    tokens = jnp.full((ids.shape[0], width), pad_id, ids.dtype).at[row, column].set(ids, mode="drop")
    blank = jnp.full((ids.shape[0], width), -1, jnp.int32)
    came_from = blank.at[row, column].set(jnp.broadcast_to(jnp.asarray(owner, jnp.int32), ids.shape), mode="drop")
    return tokens, [came_from == part for part in range(len(parts))], valid.sum(1, dtype=jnp.int32)


def _spelled(
    rows: np.ndarray,
    cut: Int[Array, " N"],
    owners: Int[Array, "N T"],
    answer: Answer,
    table: Spellings,
    first: np.ndarray,
) -> tuple[Int[Array, "N L"], Bool[Array, "N L"]]:
    """The ids of one part of the token that the byte ``cut`` falls inside of; none where it falls between two."""
    token_begin = answer.token_end - answer.token_len
    inside = (token_begin < cut[:, None]) & (cut[:, None] < answer.token_end)
    column = jnp.argmax(inside, axis=1)[:, None]
    pick = lambda x: jnp.take_along_axis(x, column, axis=1)[:, 0]
    at = jnp.where(inside.any(1), jnp.asarray(first)[pick(owners)] + cut - pick(token_begin), 0)
    row = jnp.asarray(rows)[at]  # cut 0 of a token has row 0
    within = jnp.arange(table.ids.shape[1])[None, :] < jnp.asarray(table.length)[row][:, None]
    return jnp.asarray(table.ids)[row], within


def splice(
    rollout: Rollout,
    reference: Int[Array, "N R"],
    answer: Answer,
    form: Format,
    tokenizer: Tokenizer,
    *,
    completion_len: int,
    pad_with_space: bool,
) -> Spliced:
    """Each row's answer replaced by its reference, whose ids are padded with pad on the right.

    A row without a well-formed answer, with an empty reference, or longer than ``completion_len`` tokens after its prompt
    stays as it is, with an empty ``reference_mask``. Without ``pad_with_space`` no space is put in on either side.
    """
    table, words = spellings(form, tokenizer), vocabulary(tuple(tokenizer.piece_bytes))
    owners = written(rollout.tokens, rollout.completion_mask, len(tokenizer.piece_bytes))
    rows, width = rollout.tokens.shape
    columns = jnp.arange(width)[None, :]
    cut = answer.ink_begin  # the blanks behind the opening tag stay
    writes = answer.token_len > 0
    # Tokens that write nothing belong to the answer where they touch it, EOS behind an empty one for example.
    kept_until = jnp.max(jnp.where(writes & (answer.token_end <= cut[:, None]), columns + 1, 0), axis=1)
    kept = rollout.completion_mask & (columns < kept_until[:, None])
    in_prompt = columns < rollout.prompt_len[:, None]

    every = lambda ids: jnp.broadcast_to(jnp.asarray(ids), (rows, len(ids)))
    space = every(table.space)
    lacks_space = pad_with_space & (cut == answer.begin)[:, None]
    true = jnp.ones((rows, 1), bool)
    if form.answer_close:
        early = writes & (answer.token_end - answer.token_len < answer.end[:, None])
        tail_from = jnp.max(jnp.where(early, columns + 1, 0), axis=1)
        right = _spelled(table.right, answer.end, owners, answer, table, words.cut)
        tail = [right, (rollout.tokens, rollout.completion_mask & (columns >= tail_from[:, None]))]
    else:
        tail = [(every(np.array([tokenizer.eos_id], np.int32)), true)]
    parts = [
        (rollout.tokens, in_prompt | kept),
        _spelled(table.left, cut, owners, answer, table, words.cut),
        (space, jnp.broadcast_to(lacks_space, space.shape)),
        (reference, reference != tokenizer.pad_id),
        (space, jnp.broadcast_to(pad_with_space & true, space.shape)),
        *tail,
    ]
    tokens, lies, length = pack(parts, width, tokenizer.pad_id)
    fits = (length - rollout.prompt_len <= completion_len) & (length <= width)
    done = (answer.formed & fits & (reference != tokenizer.pad_id).any(1))[:, None]
    return Spliced(
        tokens=jnp.where(done, tokens, rollout.tokens),
        completion_mask=jnp.where(done, (columns < length[:, None]) & ~in_prompt, rollout.completion_mask),
        reference_mask=done & lies[3],
        sampled_mask=jnp.where(done, kept, rollout.completion_mask),
    )


def splice_references(
    rollout: Rollout, prompts: Prompts, form: Format, tokenizer: Tokenizer, *, pad_with_space: bool
) -> tuple[Spliced, Answer]:
    """``splice`` of a step's rollout with its prompts' references, in as many tokens as a completion may have.

    Raises:
        ValueError: prompts without references.
    """
    if prompts.reference is None:
        raise ValueError("the prompts carry no reference answers; this reward needs data that has them.")
    answer = find_answer(rollout.tokens, rollout.completion_mask, form, tokenizer.piece_bytes)
    reference = prompts.reference[rollout.prompt_id]
    completion_len = rollout.tokens.shape[1] - prompts.tokens.shape[1]
    spliced = splice(
        rollout, reference, answer, form, tokenizer, completion_len=completion_len, pad_with_space=pad_with_space
    )
    return spliced, answer


def as_rollout(spliced: Spliced, rollout: Rollout) -> Rollout:
    """The rollout with spliced rows. Its log-probabilities are still the old rows', right only before the cut."""
    return dataclasses.replace(
        rollout,
        tokens=spliced.tokens,
        completion_mask=spliced.completion_mask,
        reference_mask=spliced.reference_mask,
    )


def baseline_rows(prompts: Prompts, tokenizer: Tokenizer, *, width: int, pad_with_space: bool) -> Rollout:
    """One row a prompt without any reasoning: prompt, space, reference, space, EOS; ``width`` is the rollout's T.

    An empty reference gives an empty ``reference_mask``.

    Raises:
        ValueError: prompts without references, or references that a row cannot hold.
    """
    if prompts.reference is None:
        raise ValueError("the prompts carry no reference answers; a baseline needs data that has them.")
    rows, prompt_width = prompts.tokens.shape
    space = np.array(spell(b" ", tokenizer), np.int32)
    wanted = prompt_width + prompts.reference.shape[1] + 2 * pad_with_space * len(space) + 1
    if wanted > width:
        raise ValueError(
            f"references of {prompts.reference.shape[1]} tokens need rows of {wanted}, and there are {width}; raise "
            "rollout.completion_len or lower data.max_reference_len_tokens."
        )
    every = lambda ids: jnp.broadcast_to(jnp.asarray(ids), (rows, len(ids)))
    spaces = (every(space), jnp.full((rows, len(space)), pad_with_space))
    in_prompt = jnp.arange(prompt_width)[None, :] < prompts.prompt_len[:, None]
    reference = (prompts.reference, prompts.reference != tokenizer.pad_id)
    end = (every(np.array([tokenizer.eos_id], np.int32)), jnp.ones((rows, 1), bool))
    tokens, lies, length = pack([(prompts.tokens, in_prompt), spaces, reference, spaces, end], width, tokenizer.pad_id)
    columns = jnp.arange(width)[None, :]
    return Rollout(
        tokens=tokens,
        prompt_len=prompts.prompt_len,
        completion_mask=(columns >= prompts.prompt_len[:, None]) & (columns < length[:, None]),
        rollout_logprobs=jnp.zeros(tokens.shape),
        sampled_logprobs=jnp.zeros(tokens.shape),
        prompt_id=jnp.arange(rows, dtype=jnp.int32),
        truncated=jnp.zeros(rows, bool),
        off_policy=jnp.ones(rows, bool),
        reference_mask=lies[2],
    )

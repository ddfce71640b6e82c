"""Spliced rows write what the same edit of the decoded text gives, whatever tokens the completion was made of."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl_reason import splice
from rl_reason.tags import WHITESPACE, find_answer
from rl_reason.types import Prompts, Rollout
from tests.support import tiny_prompts
from tests.tagged import (
    FORMS,
    MARK,
    R1,
    ROWS,
    TOKENIZER,
    TOKENIZERS,
    WIDTH,
    Pieces,
    bytes_of,
    cut_at_random,
    host_answer,
    rows_of,
)

REFERENCE_WIDTH = 12
PROMPT = 1  # tokens, in rows_of


def rollout_of(ids, eos):
    """Completions with EOS behind each, cut off where the row ends."""
    ids = [[*sequence, eos][: WIDTH - PROMPT] for sequence in ids]
    tokens, mask = rows_of(ids)
    zeros = jnp.zeros(tokens.shape)
    return ids, Rollout(
        tokens=tokens,
        prompt_len=jnp.full(ROWS, PROMPT, jnp.int32),
        completion_mask=mask,
        rollout_logprobs=zeros,
        sampled_logprobs=zeros,
        prompt_id=jnp.arange(ROWS, dtype=jnp.int32),
        truncated=jnp.zeros(ROWS, bool),
        off_policy=jnp.zeros(ROWS, bool),
    )


@functools.partial(jax.jit, static_argnums=(2, 3), static_argnames=("completion_len", "pad_with_space"))
def spliced(rollout, reference, form, tokenizer, *, completion_len=WIDTH - PROMPT, pad_with_space=True):
    answer = find_answer(rollout.tokens, rollout.completion_mask, form, tokenizer.piece_bytes)
    return splice.splice(
        rollout, reference, answer, form, tokenizer, completion_len=completion_len, pad_with_space=pad_with_space
    )


def host_splice(text, form, reference, pad_with_space):
    """(before, after) the reference in the text, by plain edits; None where there is no answer or no reference."""
    span = host_answer(text, form)
    if span is None or not reference:
        return None
    inside, space = text[span[0] : span[1]], b" " if pad_with_space else b""
    blanks = inside[: len(inside) - len(inside.lstrip(WHITESPACE))]
    return text[: span[0]] + (blanks or space), space + (text[span[1] :] if form.answer_close else b"")


def check(ids, references, form, tokenizer, pad_with_space=True, completion_len=WIDTH - PROMPT):
    """Compares all rows; returns how many were spliced."""
    pieces = tokenizer.piece_bytes
    ids, rollout = rollout_of(ids, tokenizer.eos_id)
    padded = np.full((ROWS, REFERENCE_WIDTH), tokenizer.pad_id, np.int32)
    for row, reference in zip(padded, references, strict=False):
        row[: len(reference)] = reference
    out = spliced(
        rollout, jnp.asarray(padded), form, tokenizer, completion_len=completion_len, pad_with_space=pad_with_space
    )
    out = jax.tree.map(np.asarray, out)
    done = 0
    for row, (sequence, reference) in enumerate(zip(ids, references, strict=False)):
        text = bytes_of(sequence, pieces)
        wanted = host_splice(text, form, bytes_of(reference, pieces), pad_with_space)
        tokens, mask, marked = out.tokens[row], out.completion_mask[row], out.reference_mask[row]
        if not marked.any():
            np.testing.assert_array_equal(tokens, rollout.tokens[row])
            np.testing.assert_array_equal(mask, rollout.completion_mask[row])
            np.testing.assert_array_equal(out.sampled_mask[row], rollout.completion_mask[row])
            if wanted is not None:  # it cannot have fitted: every token writes at most so many bytes, but one for EOS
                size = len(wanted[0]) + len(reference) + len(wanted[1]) + 1
                assert size > completion_len, text
            continue
        assert wanted is not None, text
        done += 1
        before, after = wanted
        first, last = np.flatnonzero(marked)[[0, -1]]
        assert list(tokens[marked]) == list(reference) and last - first + 1 == len(reference)
        assert mask.sum() <= completion_len and mask[PROMPT : PROMPT + mask.sum()].all()
        assert tokens[0] == rollout.tokens[row, 0]
        assert bytes_of(tokens[PROMPT:first], pieces) == before, text
        assert bytes_of(tokens[last + 1 : PROMPT + mask.sum()], pieces) == after, text
        assert (tokens[PROMPT + mask.sum() :] == tokenizer.pad_id).all()
        if not form.answer_close or sequence[-1] == tokenizer.eos_id:
            assert tokens[PROMPT + mask.sum() - 1] == tokenizer.eos_id
        sampled = np.flatnonzero(out.sampled_mask[row])
        np.testing.assert_array_equal(tokens[sampled], rollout.tokens[row, sampled])
        assert list(sampled) == list(range(PROMPT, PROMPT + len(sampled)))
        assert before.startswith(bytes_of(tokens[sampled], pieces))
    return done


HAND = [  # form, completion as pieces, reference, spliced text
    ("r1", [b"<think>", b"1", b"</think><answer>", b" 41", b"</answer>"], "<think>1</think><answer> 42 </answer>"),
    # The reference's text stands in the reasoning too: it is the answer that is replaced.
    ("r1", [b"<think>", b"42", b"</think><answer>4", b"1</answer>."], "<think>42</think><answer> 42 </answer>."),
    # Tags across tokens: "k>" + "<an" + "swer>4" ends with a byte of the answer, "1</a" begins with one.
    ("r1", [b"<think></thin", b"k>", b"<an", b"swer>4", b"1</a", b"nswer>"], "<think></think><answer> 42 </answer>"),
    # The model's blanks stay: a newline, and two spaces of which one begins a token of the answer.
    ("r1", [b"<think></think><answer>", b"\n", b"9</answer>"], "<think></think><answer>\n42 </answer>"),
    ("nothink", [b"<answer> ", b" 9", b"9", b"\n</answer>"], "<answer>  42 </answer>"),
    # An answer of several tokens shrinks to the reference's one, an empty one grows.
    ("nothink", [b"<answer>", b"1", b"2", b"3", b"4", b"5", b"</answer>"], "<answer> 42 </answer>"),
    ("nothink", [b"x", b"<answer></answer>"], "x<answer> 42 </answer>"),
    # One token holds opening tag, answer and closing tag.
    ("nothink", [b"<answer>7</answer>"], "<answer> 42 </answer>"),
    ("nothink", [b"<answer>7</answer> <answer>8</answer>"], None),
    ("r1", [b"<answer>7</answer>"], None),
    # Nothing closes the answer: it ends with EOS, and so does the spliced row.
    ("mark", [b"1+1", b"####", b"7", b" ok"], "1+1#### 42 "),
    ("mark", [b"1", b"#", b"###1", b"####7"], "1####1#### 42 "),
    ("mark", [b"####"], "#### 42 "),
    ("mark", [b"7"], None),
]


class Chunks(Pieces):
    """The hand cases' tokens, and every byte."""

    ALL = (b"", b"", b"42", *dict.fromkeys(piece for _, chunks, _ in HAND for piece in chunks))
    __slots__ = ()

    def __new__(cls):
        pieces = (*cls.ALL, *(bytes([b]) for b in range(256)))
        return super().__new__(cls, pieces, eos_id=1, pad_id=0)

    def encode(self, text):
        return [self.piece_bytes.index(bytes([b]), 3) for b in text.encode()]


@pytest.mark.parametrize("name", FORMS)
def test_hand_cases(name):
    tokenizer = Chunks()
    pieces, form = tokenizer.piece_bytes, FORMS[name]
    cases = [(chunks, text) for of, chunks, text in HAND if of == name]
    _, rollout = rollout_of([[pieces.index(c, 2) for c in chunks] for chunks, _ in cases], tokenizer.eos_id)
    reference = jnp.zeros((ROWS, 2), jnp.int32).at[:, 0].set(pieces.index(b"42"))
    out = spliced(rollout, reference, form, tokenizer)
    for row, (chunks, text) in enumerate(cases):
        assert bool(out.reference_mask[row].any()) == (text is not None), chunks
        np.testing.assert_array_equal(out.tokens[row][out.reference_mask[row]], [2] if text else [])
        written = out.tokens[row][out.completion_mask[row]]
        assert bytes_of(np.asarray(written), pieces).decode() == (text or b"".join(chunks).decode()), chunks
        assert int(written[-1]) == tokenizer.eos_id


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@settings(max_examples=12, deadline=None)
@given(
    st.lists(st.text("<>/# 4\né", max_size=6), min_size=8, max_size=8),
    st.lists(st.text(" 47é", max_size=5), min_size=3, max_size=3),
    st.integers(0, 2**32 - 1),
)
def test_any_tokens(form, name, texts, references, seed):
    tokenizer, rng = TOKENIZERS[name], np.random.default_rng(seed)
    framed = [
        form.think_open + a + form.think_close + b + form.answer_open + c + form.answer_close + tail
        for a, b, c, tail in rng.choice(["", *texts], (ROWS, 4))
    ]
    pieces = tokenizer.piece_bytes
    ids = [cut_at_random(rng, text.encode(), pieces) for text in framed]
    encoded = [tokenizer.encode(reference)[:REFERENCE_WIDTH] for reference in rng.choice(references, ROWS)]
    check(ids, encoded, form, tokenizer, pad_with_space=name == "pieces")


def test_rows_that_do_not_fit_stay_as_they_are():
    # "1####7" and EOS, 4 tokens; spliced with five digits: 1, mark, five, EOS: 8. With six: 9.
    ids = [TOKENIZER.encode("1####7")] * 3
    references = [TOKENIZER.encode(text) for text in ("12345", "123456", "1")]
    assert check(ids, references, MARK, TOKENIZER, pad_with_space=False, completion_len=8) == 2


def test_an_empty_reference_marks_nothing():
    assert check([TOKENIZER.encode("1####7")], [[]], MARK, TOKENIZER) == 0


def test_bytes_without_tokens_are_refused_by_name():
    with pytest.raises(ValueError, match=r"no token writes the byte b' ' alone"):
        splice.spell(b" \xc3", Pieces(piece_bytes=(b"", b"4", b"\xc3"), eos_id=0))
    assert splice.spell(b"\xc3", TOKENIZER) == [TOKENIZER.piece_bytes.index(b"\xc3")]


def with_references(prompts: Prompts, references) -> Prompts:
    reference = np.zeros((len(references), 4), np.int32)
    for row, ids in zip(reference, references, strict=True):
        row[: len(ids)] = ids
    arrays = {name: getattr(prompts, name) for name in ("tokens", "prompt_len", "example_id", "uid")}
    return Prompts(**arrays, reference=jnp.asarray(reference))


def test_baseline_rows():
    prompts = with_references(tiny_prompts(4), [[7, 8], [9], [], [3, 4, 5, 6]])
    space = TOKENIZER.encode(" ")
    for pad in (True, False):
        rows = splice.baseline_rows(prompts, TOKENIZER, width=12, pad_with_space=pad)
        assert rows.reference_mask is not None
        for row, reference in enumerate([[7, 8], [9], [], [3, 4, 5, 6]]):
            length = int(prompts.prompt_len[row])
            around = space if pad else []
            wanted = [*around, *reference, *around, TOKENIZER.eos_id]
            assert rows.tokens[row, :length].tolist() == prompts.tokens[row, :length].tolist()
            assert rows.tokens[row, length : length + len(wanted)].tolist() == wanted
            assert rows.tokens[row][rows.reference_mask[row]].tolist() == reference
            assert rows.completion_mask[row].tolist() == [length <= t < length + len(wanted) for t in range(12)]
    with pytest.raises(ValueError, match=r"rows of 12, and there are 11; raise rollout\.completion_len"):
        splice.baseline_rows(prompts, TOKENIZER, width=11, pad_with_space=True)


def test_prompts_without_references_are_refused():
    without = dataclasses.replace(tiny_prompts(4), reference=None)
    with pytest.raises(ValueError, match="no reference answers"):
        splice.baseline_rows(without, TOKENIZER, width=12, pad_with_space=True)
    _, rollout = rollout_of([], TOKENIZER.eos_id)
    with pytest.raises(ValueError, match="no reference answers"):
        splice.splice_references(rollout, without, R1, TOKENIZER, pad_with_space=True)

"""Tags found in graph, against searches in the decoded bytes; with the embedded tokenizer and with pieces cut at random."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl_reason import tags
from rl_reason.data.tokenizer import Tokenizer
from rl_reason.tags import Format

TOKENIZER = Tokenizer.load()
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
TAGGED = [i for i, piece in enumerate(PIECES) if len(piece) > 1]
VOCABULARIES = {"embedded": TOKENIZER.piece_bytes, "pieces": PIECES}


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
    ids = []
    while text:
        fits = [i for i, piece in enumerate(pieces) if piece and text.startswith(piece)]
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


@functools.partial(jax.jit, static_argnums=(2, 3))
def find_answer(tokens, mask, form, pieces):
    return tags.find_answer(tokens, mask, form, pieces)


@functools.partial(jax.jit, static_argnums=(2, 3))
def find(tokens, mask, wanted, pieces):
    return tags.find(tokens, mask, tags.automata(wanted, pieces), tags.vocabulary(pieces).length)


def check_answers(ids, form, pieces):
    found = jax.tree.map(np.asarray, find_answer(*rows_of(ids), form, pieces))
    for row, sequence in enumerate(ids):
        text = bytes_of(sequence, pieces)
        wanted = host_answer(text, form)
        assert bool(found.formed[row]) == (wanted is not None), text
        assert (found.begin[row], found.end[row]) == (wanted or (0, 0)), text
        begin, end = wanted or (0, 0)
        inside = text[begin:end]
        assert text[found.ink_begin[row] : found.ink_end[row]] == inside.strip(tags.WHITESPACE), text
        assert found.ink_begin[row] == begin + len(inside) - len(inside.lstrip(tags.WHITESPACE)), text
        assert found.token_end[row, -1] == len(text)


@pytest.mark.parametrize("form", [R1, NOTHINK, MARK, WORKED], ids=["r1", "nothink", "mark", "worked"])
@pytest.mark.parametrize("name", VOCABULARIES)
def test_hand_cases(form, name):
    texts = [
        b"<think>1</think> <answer> 42 </answer>",
        b"<think>1</think><answer></answer>",
        b"<think>a<answer>1</answer></think><answer>2</answer>",  # two answers
        b"<answer>2</answer><think></think>",  # out of order
        b"</answer><answer>",
        b"<think></think><answer>  \n</answer>",  # all blank
        b"<think><answer>1</answer>",
        b"1+1####2####3",  # the last mark counts
        b"#####4",  # and of five '#' the last four
        b"<think>1</think>####7 ",
        b"####5<think></think>",
        b"####",
        b"",
    ]
    rng = np.random.default_rng(1)
    check_answers([cut_at_random(rng, text, VOCABULARIES[name]) for text in texts], form, VOCABULARIES[name])


ids_of_pieces = st.lists(st.sampled_from([*TAGGED, *TAGGED, *range(len(PIECES) + 1)]), max_size=16)


@settings(max_examples=60, deadline=None)
@given(st.lists(ids_of_pieces, min_size=ROWS, max_size=ROWS))
def test_random_tokens(ids):
    wanted = (*R1, "####", "aa", "<answer>4")
    found = jax.tree.map(np.asarray, find(*rows_of(ids), wanted, PIECES))
    for row, sequence in enumerate(ids):
        text = bytes_of(sequence, PIECES)  # id len(PIECES) is outside the vocabulary and writes nothing
        for k, tag in enumerate(wanted):
            where = host_occurrences(text, tag.encode())
            assert found.count[row, k] == len(where), (text, tag)
            assert found.first_end[row, k] == (where[0] + len(tag) if where else -1), (text, tag)
            assert found.last_end[row, k] == (where[-1] + len(tag) if where else -1), (text, tag)


fragments = st.lists(st.sampled_from([*R1, *R1, "####", " ", "4", "\n ", "<", "_é"]), max_size=7).map("".join)


@settings(max_examples=40, deadline=None)
@given(st.lists(fragments, min_size=ROWS, max_size=ROWS), st.integers(0, 2**32 - 1))
@pytest.mark.parametrize("form", [R1, NOTHINK, MARK, WORKED], ids=["r1", "nothink", "mark", "worked"])
def test_random_texts_cut_in_random_ways(form, texts, seed):
    rng = np.random.default_rng(seed)
    framed = [f"<think>{x}</think>{y}<answer>{z}</answer>" for x, y, z in zip(texts, texts[1:], texts[2:], strict=False)]
    ids = [cut_at_random(rng, text.encode(), PIECES)[: WIDTH - 1] for text in (*texts[:4], *framed[:12])]
    check_answers(ids, form, PIECES)


def test_one_token_is_not_the_tag_of_another():
    # The same bytes by other tokens are the same tag; with EOS between, which writes nothing, too.
    whole = cut_at_random(np.random.default_rng(0), b"####", PIECES[-256:])
    ids = [[i + len(PIECES) - 256 for i in whole], [PIECES.index(b"#####"), 0], [0, PIECES.index(b"#####")]]
    count = find(*rows_of(ids), ("####",), PIECES).count[:3, 0]
    np.testing.assert_array_equal(count, [1, 2, 2])


def test_only_an_opening_tag_is_needed():
    with pytest.raises(ValueError, match="answer_open"):
        tags.find_answer(*rows_of([]), Format("<think>", "</think>", "", "</answer>"), PIECES)
    with pytest.raises(ValueError, match="empty one"):
        tags.automata(("",), PIECES)

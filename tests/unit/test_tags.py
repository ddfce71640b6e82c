"""Tags found in graph, against searches in the decoded bytes; with the embedded tokenizer and with pieces cut at random."""

import functools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl_reason import tags
from rl_reason.tags import Format
from tests.tagged import (
    FORMS,
    PIECES,
    R1,
    ROWS,
    TAGGED,
    TOKENIZERS,
    WIDTH,
    bytes_of,
    cut_at_random,
    host_answer,
    host_occurrences,
    rows_of,
)


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


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("name", TOKENIZERS)
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
    rng, pieces = np.random.default_rng(1), TOKENIZERS[name].piece_bytes
    check_answers([cut_at_random(rng, text, pieces) for text in texts], form, pieces)


ids_of_pieces = st.lists(st.sampled_from([*TAGGED, *TAGGED, *range(len(PIECES) + 1)]), max_size=16)


@settings(max_examples=50, deadline=None)
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


@settings(max_examples=25, deadline=None)
@given(st.lists(fragments, min_size=4, max_size=4), st.integers(0, 2**32 - 1))
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_random_texts_cut_in_random_ways(form, texts, seed):
    rng = np.random.default_rng(seed)
    framed = [f"<think>{x}</think>{y}<answer>{z}</answer>" for x, y, z in rng.choice(texts, (ROWS - len(texts), 3))]
    ids = [cut_at_random(rng, text.encode(), PIECES)[: WIDTH - 1] for text in (*texts, *framed)]
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

"""Repeated n-grams of words in graph, against the words of the decoded text."""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl_reason import repetition
from rl_reason.data.sentencepiece_tokenizer import SentencePieceTokenizer

TOKENIZER = SentencePieceTokenizer.load()
WIDTH = 48
# Separators at both ends and in the middle, alone and in runs; letters few, so that words come again.
PIECES = (b"", b"a", b"b", b" ", b"_", b"ab", b" a", b"a ", b"_a", b"a_", b"a b", b"__", b"  ", b"_ _", b"a__b c")

words = jax.jit(repetition.words, static_argnums=2)


@functools.partial(jax.jit, static_argnums=2, static_argnames=("ngram", "times"))
def repeats(tokens, mask, piece_bytes, *, ngram, times):
    return repetition.repeats(tokens, mask, piece_bytes, ngram=ngram, times=times)


def rows_of(ids):
    tokens = np.zeros((len(ids), WIDTH), np.int32)
    for row, sequence in zip(tokens, ids, strict=True):
        row[: len(sequence)] = sequence
    return jnp.asarray(tokens), jnp.arange(WIDTH) < jnp.array([len(x) for x in ids])[:, None]


def host_words(text):
    return [word for part in text.split() for word in part.split("_")]


def host_repeats(text, ngram, times):
    found = host_words(text)
    grams = collections.Counter(tuple(found[i : i + ngram]) for i in range(len(found) - ngram + 1))
    return max(grams.values(), default=0) >= times


def texts_of(ids, pieces):
    return [b"".join(pieces[i] for i in sequence).decode("utf-8", "replace") for sequence in ids]


@pytest.mark.parametrize("copies, flagged", [(18, False), (19, True), (24, True)])
def test_ten_ten_grams_of_one_word(copies, flagged):
    # n words have n - 9 ten-grams: 18 copies have 9 equal ones, 19 have 10.
    tokens, mask = rows_of([TOKENIZER.encode("a " * copies)])
    assert bool(repeats(tokens, mask, TOKENIZER.piece_bytes, ngram=10, times=10)[0]) == flagged


def test_an_underscore_separates_and_may_leave_an_empty_word():
    # "_a_" is "", "a", "": three words; blanks in a row separate once.
    texts = ["_a_", "a_b c", "  a  b ", "__", ""]
    tokens, mask = rows_of([TOKENIZER.encode(text) for text in texts])
    hashes, count = words(tokens, mask, TOKENIZER.piece_bytes)
    np.testing.assert_array_equal(count, [3, 3, 2, 3, 0])
    np.testing.assert_array_equal(hashes[0, 0], hashes[0, 2])
    np.testing.assert_array_equal(hashes[0, 1], hashes[1, 0])
    assert (hashes[1, 0] != hashes[1, 1]).all()


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(st.integers(0, len(PIECES)), max_size=24), min_size=16, max_size=16))
def test_words_and_repetitions_are_the_texts(ids):
    tokens, mask = rows_of(ids)  # id len(PIECES) is outside the vocabulary and writes nothing
    texts = texts_of(ids, (*PIECES, b""))
    hashes, count = words(tokens, mask, PIECES)
    np.testing.assert_array_equal(count, [len(host_words(text)) for text in texts])
    seen = {}
    for text, row in zip(texts, np.asarray(hashes), strict=True):
        for word, value in zip(host_words(text), row, strict=False):
            assert seen.setdefault(word, tuple(value)) == tuple(value)
    assert len(set(seen.values())) == len(seen)
    for ngram, times in ((2, 2), (2, 4), (3, 3)):
        wanted = [host_repeats(text, ngram, times) for text in texts]
        np.testing.assert_array_equal(repeats(tokens, mask, PIECES, ngram=ngram, times=times), wanted)


def test_what_is_off_the_completion_is_not_read():
    ids = TOKENIZER.encode("a " * 19)
    tokens, mask = rows_of([ids, ids])
    mask = mask.at[1, 0].set(False)  # its first "a" is of the prompt
    np.testing.assert_array_equal(repeats(tokens, mask, TOKENIZER.piece_bytes, ngram=10, times=10), [True, False])

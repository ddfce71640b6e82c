"""Answers spelled in graph are those of the text, and ids are equality of their bytes."""

import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl_reason.data.sentencepiece_tokenizer import SentencePieceTokenizer
from rl_reason.tasks.answer_ids import RULES, Spelled, class_ids, join, make_answer_ids
from rl_reason.tasks.base import extract_answer
from rl_reason.tasks.in_graph import MAX_ANSWER_BYTES

TOKENIZER = SentencePieceTokenizer.load()
# Pieces such as larger vocabularies have: marks, signs, digits and spaces inside and across tokens.
PIECES = [b"", *(bytes([b]) for b in b"#_ -0127\xe2"), b"##", b"####", b" ####", b"#### ", b"####12", b"12##", b"## 1"]
PIECES += [b"12", b" 12 ", b"-1", b"1-", b"a7b", b"7b12", b"1 -2", b"--0", b"# #", b"1 #### 2", b"\x96\x81", b"0" * 15]
LONG = types.SimpleNamespace(piece_bytes=PIECES)
WIDTH, GROUP = 8, 4


def answer_of(written: bytes, rule: str) -> bytes | None:
    """The rules on the host; surrogates stand for what is no UTF-8, so that different bytes stay different."""
    answer = extract_answer(written.decode("utf-8", "surrogateescape"))
    answer = None if answer is None else answer.encode("utf-8", "surrogateescape")
    if rule == "v1":
        if answer is None:
            answer = [b"", *re.findall(rb"-?[0-9]+", written)][-1]
    elif answer == b"":
        answer = None
    return answer if answer is not None and len(answer) <= MAX_ANSWER_BYTES else None


def ids_of(answers: list) -> list[int]:
    """The place of the first that is equal; -1 for None."""
    return [-1 if a is None else answers.index(a) for a in answers]


def compiled(tokenizer, rule):
    spell = make_answer_ids(tokenizer, rule=rule)

    def run(tokens, mask):
        answers = spell(tokens, mask)
        return answers, class_ids(answers, GROUP)

    return jax.jit(run)


SPELL = {(name, rule): compiled(t, rule) for name, t in (("long", LONG), ("own", TOKENIZER)) for rule in RULES}


def check(name: str, rule: str, tokens: np.ndarray, mask: np.ndarray) -> list[bytes | None]:
    """Spelling and ids against the host's; returns the answers."""
    pieces = LONG.piece_bytes if name == "long" else TOKENIZER.piece_bytes
    answers, ids = SPELL[name, rule](jnp.asarray(tokens, jnp.int32), jnp.asarray(mask))
    written = [b"".join(pieces[i] for i in row[kept]) for row, kept in zip(tokens, mask, strict=True)]
    expected = [answer_of(text, rule) for text in written]
    got = [
        None if n < 0 else bytes(row[:n].astype(np.uint8))
        for row, n in zip(np.asarray(answers.text), np.asarray(answers.length), strict=True)
    ]
    assert got == expected, next((w, g, e) for w, g, e in zip(written, got, expected, strict=True) if g != e)
    groups = [expected[i : i + GROUP] for i in range(0, len(expected), GROUP)]
    assert np.asarray(ids).reshape(-1, GROUP).tolist() == [ids_of(group) for group in groups]
    return expected


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", ["long", "own"])
def test_random_rows(name, rule):
    """Long pieces at random; and characters of the embedded vocabulary, mostly digits, marks, signs and spaces."""
    rng, rows = np.random.default_rng(0), 20_000
    if name == "long":
        tokens = rng.integers(len(PIECES), size=(rows, WIDTH))
    else:
        likely = [TOKENIZER.encode(c)[0] for c in "12-- "] + TOKENIZER.encode("####")
        pick = rng.random((rows, WIDTH)) < 0.9
        tokens = np.where(
            pick, rng.choice(likely, (rows, WIDTH)), rng.integers(TOKENIZER.vocab_size, size=(rows, WIDTH))
        )
    mask = np.arange(WIDTH) < rng.integers(WIDTH + 1, size=(rows, 1))
    mask &= np.arange(WIDTH) >= rng.integers(
        3, size=(rows, 1)
    )  # whole rows: what is before the completion is not read
    answers = check(name, rule, tokens, mask)
    assert len(set(answers)) > 20 and sum(a is None for a in answers) < rows * 0.9
    assert (b"" in answers) == (rule == "v1")


@settings(max_examples=150, deadline=None)
@given(st.lists(st.binary(max_size=WIDTH) | st.text("#1- ", max_size=WIDTH).map(str.encode), min_size=4, max_size=4))
def test_random_bytes(texts):
    """Any bytes whatever, spelled by byte pieces."""
    tokens = np.zeros((GROUP, WIDTH), np.int32)
    mask = np.arange(WIDTH) < np.array([[len(text)] for text in texts])
    for row, text in zip(tokens, texts, strict=True):
        row[: len(text)] = [TOKENIZER._byte_ids[byte] for byte in text]
    for rule in RULES:
        check("own", rule, tokens, mask)


def test_adversarial_answers():
    """Each group is four texts that must not, or must, be one class: (text, its answer under v1, under v2)."""
    digits, longer = "1" * MAX_ANSWER_BYTES, "1" * (MAX_ANSWER_BYTES + 1)
    groups = [
        [("####7", "7", "7"), ("7", "7", None), ("#### 7  ", "7", "7"), ("x7y", "7", None)],
        [("####", "", None), ("", "", None), ("####  ", "", None), ("abc", "", None)],
        [("####-7", "-7", "-7"), ("5-7", "-7", None), ("-7-", "-7", None), ("- 7", "7", None)],
        [("####07", "07", "07"), ("####7", "7", "7"), ("####7####", "", None), ("7####8", "8", "8")],
        [
            ("#####7", "7", "7"),
            ("####\x007", "\x007", "\x007"),
            ("####7\x00", "7\x00", "7\x00"),
            ("####\x00", "\x00", "\x00"),
        ],
        [
            (f"####{digits}", digits, digits),
            (f"####{longer}", None, None),
            (longer, None, None),
            (digits, digits, None),
        ],
    ]
    width = MAX_ANSWER_BYTES + 8
    texts = [[TOKENIZER.encode(text) for text, *_ in group] for group in groups]
    lists = [ids for group in texts for ids in group]
    tokens = np.array([ids + [0] * (width - len(ids)) for ids in lists], np.int32)
    mask = np.arange(width) < np.array([[len(ids)] for ids in lists])
    for rule, column in (("v1", 1), ("v2", 2), ("equivalence", 2)):
        answers = check("own", rule, tokens, mask)
        expected = [case[column] for group in groups for case in group]
        assert answers == [None if answer is None else answer.encode() for answer in expected]


def test_joined_policies_share_ids_a_prompt():
    """Two prompts, policies a and b with two samples each: ids count over both policies of a prompt and over none else."""
    spelled = lambda *answers: Spelled(
        jnp.array([[ord(c)] if c else [0] for c in answers]), jnp.array([1 if c else -1 for c in answers])
    )
    a, b = spelled("7", "3", "5", None), spelled("3", "3", "7", "5")
    ids = class_ids(join([a, b], num_prompts=2), 4).reshape(2, 2, 2)
    # prompt 0: a 7 3, b 3 3 -> 0 1 | 1 1; prompt 1: a 5 none, b 7 5 -> 0 -1 | 2 0
    assert ids.tolist() == [[[0, 1], [1, 1]], [[0, -1], [2, 0]]]


def test_ids_outside_the_vocabulary_write_nothing_and_rules_are_named():
    spell = make_answer_ids(TOKENIZER, rule="v2")
    row = jnp.array([[-1, *TOKENIZER.encode("####"), TOKENIZER.vocab_size + 3, *TOKENIZER.encode("4")]])
    answers = spell(row, jnp.ones(row.shape, bool))
    assert answers.length.tolist() == [1] and int(answers.text[0, 0]) == ord("4")
    with pytest.raises(ValueError, match="rule='v3'; there are v1, v2, equivalence"):
        make_answer_ids(TOKENIZER, rule="v3")

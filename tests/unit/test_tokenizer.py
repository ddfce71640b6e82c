"""The embedded tokenizer: what it promises of ids, bytes, files and rebuilding."""

import copy
import pathlib
import pickle

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.build_tokenizer import corpus, main
from rl_reason.data.sentencepiece_tokenizer import EMBEDDED, SentencePieceTokenizer
from rl_reason.tasks import TASKS
from rl_reason.tasks.base import ANSWER_MARK, draw

TOKENIZER = SentencePieceTokenizer.load()
PEER = sentencepiece.SentencePieceProcessor(model_file=str(EMBEDDED))
# Pieces, and what imitates pieces: names, marks, specials' and bytes' spellings, sentencepiece's space.
FRAGMENTS = [
    "add ",
    "close ",
    "####",
    "#",
    "##",
    " ",
    "\u2581",
    "<s>",
    "</s>",
    "<pad>",
    "<0x41>",
    "\x00",
    "\n",
    "é",
    "7",
]
texts = st.lists(st.one_of(st.sampled_from(FRAGMENTS), st.text(max_size=8))).map("".join)


def test_specials_and_size():
    assert (TOKENIZER.pad_id, TOKENIZER.bos_id, TOKENIZER.eos_id, TOKENIZER.unk_id) == (0, 1, 2, 3)
    assert TOKENIZER.vocab_size <= 384
    assert [TOKENIZER.piece_bytes[i] for i in range(4)] == [b""] * 4
    assert len(TOKENIZER.piece_bytes) == TOKENIZER.vocab_size


def test_every_byte_has_one_byte_piece():
    ids = TOKENIZER._byte_ids
    assert [TOKENIZER.piece_bytes[i] for i in ids] == [bytes([byte]) for byte in range(256)]


def test_names_marks_and_characters_are_one_id():
    # "add " 1, "47" 2, "+" 1, "85" 2, "=" 1, then the mark 1 and "132" 3.
    assert len(TOKENIZER.encode("add 47+85=####132")) == 11
    for piece in (ANSWER_MARK, *(f"{name} " for name in TASKS), *"0123456789"):
        assert len(TOKENIZER.encode(piece)) == 1, piece


@settings(max_examples=400, deadline=None)
@given(texts)
def test_any_text_survives(text):
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids) == text == PEER.decode(ids)
    assert all(0 <= i < TOKENIZER.vocab_size for i in ids)
    assert TOKENIZER.unk_id not in ids


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(min_value=-9, max_value=TOKENIZER.vocab_size + 9)))
def test_any_ids_decode_to_their_bytes(ids):
    known = [i for i in ids if 0 <= i < TOKENIZER.vocab_size]
    wanted = b"".join(TOKENIZER.piece_bytes[i] for i in known).decode("utf-8", errors="replace")
    assert TOKENIZER.decode(ids) == TOKENIZER.decode(np.array(ids, np.int64)) == wanted


def test_prompt_ids_then_completion_ids_are_the_ids_of_the_text():
    for text in list(corpus())[::3]:
        end = text.index("?") + 1 if "?" in text else text.index("=") + 1
        assert TOKENIZER.encode(text[:end]) + TOKENIZER.encode(text[end:]) == TOKENIZER.encode(text)


def test_the_tasks_write_no_byte_pieces():
    bytes_ids = set(TOKENIZER._byte_ids)
    for task in TASKS.values():
        for level in task.levels:
            for index in range(4):
                problem = draw(task, level, seed=1, split="heldout", index=index)
                text = task.prompt(problem) + task.solve(problem).completion
                assert not bytes_ids.intersection(TOKENIZER.encode(text)), text


def test_lone_surrogates_are_refused():
    with pytest.raises(UnicodeEncodeError):
        TOKENIZER.encode("\ud800")


def test_a_missing_or_broken_file_is_named_with_its_cure(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.model.*experiments\.build_tokenizer --out"):
        SentencePieceTokenizer.load(tmp_path / "none.model")
    for content in (b"", b"not a model", EMBEDDED.read_bytes()[:-7]):
        (tmp_path / "broken.model").write_bytes(content)
        with pytest.raises(ValueError, match=r"broken\.model.*experiments\.build_tokenizer --out"):
            SentencePieceTokenizer.load(tmp_path / "broken.model")


def test_equality_copies_and_fingerprint():
    again = SentencePieceTokenizer.load(pathlib.Path(EMBEDDED))
    assert again == TOKENIZER and hash(again) == hash(TOKENIZER) and len(TOKENIZER.fingerprint) == 64
    for other in (pickle.loads(pickle.dumps(TOKENIZER)), copy.deepcopy(TOKENIZER)):
        assert other == TOKENIZER and other.encode("add 1+1=") == TOKENIZER.encode("add 1+1=")


def test_rebuilding_gives_the_committed_bytes(tmp_path, capsys):
    assert main(["--check"]) == 0
    out = tmp_path / "new.model"
    assert main(["--check", "--out", str(out)]) == 1 and not out.exists()
    assert main(["--out", str(out)]) == 0 and out.read_bytes() == EMBEDDED.read_bytes()
    out.write_bytes(out.read_bytes() + b"\0")
    assert main(["--check", "--out", str(out)]) == 1
    assert "experiments.build_tokenizer" in capsys.readouterr().err

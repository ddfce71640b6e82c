"""Tokenizers of Hugging Face folders: ids, bytes, specials, and what is said of folders that cannot be read."""

import copy
import functools
import json
import logging
import pathlib
import pickle
import shutil
import tempfile

import jax.numpy as jnp
import numpy as np
import pytest
import sentencepiece
import tokenizers as hf
from hypothesis import given, settings
from hypothesis import strategies as st

from rl_reason import build
from rl_reason.data import tokenizer as tokenizers
from rl_reason.data.sentencepiece_tokenizer import EMBEDDED
from rl_reason.tasks import TASKS
from rl_reason.tasks.base import draw
from rl_reason.tasks.in_graph import make_verifier
from tests import made_tokenizers
from tests.made_tokenizers import FAMILIES, TEXTS
from tests.support import load_config, one_device

NAMED = {  # pad, what begins a text, what ends one, all that ends a completion
    "qwen": ("<|endoftext|>", None, "<|im_end|>", ("<|im_end|>", "<|endoftext|>")),
    "llama3": ("<|finetune_right_pad_id|>", "<|begin_of_text|>", "<|eot_id|>", ("<|eot_id|>", "<|end_of_text|>")),
    "gemma": ("<pad>", "<bos>", "<eos>", ("<eos>", "<end_of_turn>")),
    "llama2": ("<unk>", "<s>", "</s>", ("</s>",)),
    "mistral": ("<unk>", "<s>", "</s>", ("</s>",)),
}
FRAGMENTS = [
    *(
        "add ",
        "####",
        "  ",
        "\n\n",
        "\u2581",
        "<s>",
        "<|im_end|>",
        "<eos>",
        "<think>",
        "<0x41>",
        "Ġ",
        "e\u0301",
        "\x00",
    ),
    "\U0001f469\u200d\U0001f680",
]
texts = st.lists(st.one_of(st.sampled_from(FRAGMENTS), st.text(max_size=8))).map("".join)


TEMPORARY = tempfile.TemporaryDirectory()


@functools.cache
def folder_of(family):
    return made_tokenizers.write(family, pathlib.Path(TEMPORARY.name) / family)


@functools.cache
def made(family):
    return tokenizers.load(folder_of(family))


@functools.cache
def peer(family):
    return hf.Tokenizer.from_file(str(folder_of(family) / "tokenizer.json"))


@pytest.mark.parametrize("family", FAMILIES)
def test_specials(family):
    tokenizer, name = made(family), peer(family).id_to_token
    names = lambda ids: tuple(map(name, ids))
    begin = None if tokenizer.bos_id is None else name(tokenizer.bos_id)
    found = (name(tokenizer.pad_id), begin, name(tokenizer.eos_id), names(tokenizer.stop_ids))
    assert found == NAMED[family]
    assert tokenizer.pad_id != tokenizer.eos_id
    assert all(tokenizer.piece_bytes[i] == b"" for i in (tokenizer.pad_id, *tokenizer.stop_ids))
    assert tokenizer.vocab_size == peer(family).get_vocab_size() == len(tokenizer.piece_bytes)


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=100, deadline=None)
@given(text=texts)
def test_any_text_survives(family, text):
    tokenizer = made(family)
    ids = tokenizer.encode(text)
    wanted = hf.normalizers.NFC().normalize_str(text) if family == "qwen" else text
    assert tokenizer.decode(ids) == wanted
    assert b"".join(tokenizer.piece_bytes[i] for i in ids) == wanted.encode()
    assert all(tokenizer.piece_bytes[i] for i in ids)  # no special, no <unk>


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=50, deadline=None)
@given(ids=st.lists(st.integers(min_value=-3, max_value=720)))
def test_any_ids_decode_to_their_bytes(family, ids):
    tokenizer = made(family)
    known = [i for i in ids if 0 <= i < tokenizer.vocab_size]
    wanted = b"".join(tokenizer.piece_bytes[i] for i in known).decode("utf-8", errors="replace")
    assert tokenizer.decode(ids) == tokenizer.decode(np.array(ids, np.int64)) == wanted


@pytest.mark.parametrize("family", FAMILIES)
def test_pieces_write_what_the_library_decodes(family):
    """One by one, where that is text; a decoder may take a space from the front."""
    compared = 0
    for i, piece in enumerate(made(family).piece_bytes):
        text = peer(family).decode([i], skip_special_tokens=True)
        if "\ufffd" not in text:
            assert text in (piece.decode(), piece.decode().removeprefix(" ")), i
            compared += bool(piece)
    assert compared > 250
    assert {bytes([byte]) for byte in range(256)} <= set(made(family).piece_bytes)


@pytest.mark.parametrize("family", FAMILIES)
def test_only_what_begins_a_row_is_given_something_in_front(family):
    tokenizer = made(family)
    begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    space = " " if family in ("llama2", "mistral") else ""
    for text in ("a", "Où", "47+85="):
        assert tokenizer.prompt(text) == begin + tokenizer.encode(space + text)
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode(tokenizer.prompt(" a")) == ("  a" if family == "llama2" else " a")
    with pytest.raises(ValueError, match=r"a chat needs a template: set config\.data\.chat='template'"):
        tokenizer.prompt([dict(role="user", content="a")])


def test_texts_never_hold_specials_but_added_tokens_are_pieces():
    tokenizer, ids = made("qwen"), peer("qwen").token_to_id
    assert tokenizer.encode("<think>1</think>") == [ids("<think>"), *tokenizer.encode("1"), ids("</think>")]
    assert tokenizer.decode([ids("<think>"), ids("<|im_start|>")]) == "<think>"
    for family, (pad, _, end, stops) in NAMED.items():
        for name in (pad, end, *stops):
            found = made(family).encode(f"a{name}b")
            assert made(family).decode(found) == f"a{name}b"
            assert peer(family).token_to_id(name) not in found


def test_lone_surrogates_are_refused():
    for family in ("qwen", "gemma"):
        with pytest.raises(UnicodeEncodeError):
            made(family).encode("a\ud800")


def test_equality_copies_and_fingerprint(tmp_path):
    for family in FAMILIES:
        tokenizer = made(family)
        shutil.copytree(folder_of(family), tmp_path / family)
        others = (pickle.loads(pickle.dumps(tokenizer)), copy.deepcopy(tokenizer), tokenizers.load(tmp_path / family))
        for other in others:
            assert other == tokenizer and hash(other) == hash(tokenizer)
            assert [other.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]
    assert len({made(family).fingerprint for family in FAMILIES}) == len(FAMILIES)
    rewrite(tmp_path / "gemma", generation_config=dict(eos_token_id=1))
    assert tokenizers.load(tmp_path / "gemma") != made("gemma")


@pytest.mark.parametrize("family", ["qwen", "gemma"])
def test_verified_in_graph(family):
    """The tables of pieces with several digits, marks or spaces: solutions are right, others' answers wrong."""
    tokenizer, names = made(family), ["add", "sort", "color"]
    verify = make_verifier(names, tokenizer)
    rows = []
    for route, name in enumerate(names):
        problems = [draw(TASKS[name], 2, seed=0, split="train", index=index) for index in range(8)]
        for asked, answered in [(i, i) for i in range(8)] + [(i, (i + 1) % 8) for i in range(8)]:
            solution, problem = TASKS[name].solve(problems[answered]), problems[asked]
            right = TASKS[name].verify(solution.completion, problem).score
            prompt, reference = TASKS[name].prompt(problem), TASKS[name].solve(problem).answer
            rows.append((*map(tokenizer.encode, (prompt, reference, solution.completion)), route, right))
    prompts, references, completions, route, right = zip(*rows, strict=True)
    padded = lambda lists: jnp.array([ids + [tokenizer.pad_id] * (300 - len(ids)) for ids in lists])
    lengths = lambda lists: jnp.array([len(ids) for ids in lists])
    mask = jnp.arange(300) < lengths(completions)[:, None]
    found = verify(padded(prompts), lengths(prompts), padded(references), padded(completions), mask, jnp.array(route))
    assert found.astype(float).tolist() == list(right)
    assert 24 <= sum(right) < len(right)


# Folders


def rewrite(folder, **files):
    """Changes keys of a folder's JSON files; None takes a key out."""
    for name, changes in files.items():
        path = folder / f"{name}.json"
        content = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def broken(folder, how):
    """One way in which a folder does not hold what it should."""
    file, layout = folder / "tokenizer.json", json.loads((folder / "tokenizer.json").read_text())
    match how:
        case "no tokenizer":
            file.unlink()
        case "cut short":
            file.write_text(file.read_text()[:5000])
        case "a pointer":
            file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 11422654\n")
        case "not text":
            file.write_bytes(b"\xff\xfe\x00")
        case "a list":
            file.write_text("[]")
        case "odd layout":
            rewrite(folder, tokenizer=dict(decoder=[1]))
        case "not for this library":
            rewrite(folder, tokenizer=dict(pre_tokenizer=dict(type="Telepathy")))
        case "another kind":
            rewrite(folder, tokenizer=dict(model=dict(type="WordPiece", vocab={})))
        case "no fallback":
            rewrite(folder, tokenizer=dict(decoder=dict(type="Fuse")))
        case "a byte less":
            vocab = {piece: i for piece, i in layout["model"]["vocab"].items() if piece != "Ā"}
            rewrite(folder, tokenizer=dict(model=layout["model"] | dict(vocab=vocab, merges=[])))
        case "an odd piece":
            vocab = layout["model"]["vocab"] | {"你": 500}
            rewrite(folder, tokenizer=dict(model=layout["model"] | dict(vocab=vocab)))
        case "no end":
            rewrite(folder, tokenizer_config=dict(eos_token=None), generation_config=dict(eos_token_id=None))
        case "an end that is no id":
            rewrite(folder, generation_config=dict(eos_token_id="<|im_end|>"))
        case "another checkpoint's end":
            rewrite(folder, generation_config=dict(eos_token_id=[151645]))
        case "nothing to pad with":
            rewrite(folder, tokenizer=dict(added_tokens=[t for t in layout["added_tokens"] if t["id"] == 562]))
            rewrite(folder, generation_config=dict(eos_token_id=562))
        case "specials by merges":
            model = layout["model"]
            model["vocab"]["qz"], model["merges"] = 999, [["q", "z"], *model["merges"]]
            layout["added_tokens"][-1] |= dict(id=999, content="qz", special=True)
            rewrite(folder, tokenizer=dict(model=model, added_tokens=layout["added_tokens"]))


CURES = {
    "no tokenizer": "has no tokenizer.json and 0 sentencepiece models. .*save_pretrained",
    "cut short": "tokenizer.json is truncated or no JSON: .*copy it from the checkpoint again",
    "a pointer": "tokenizer.json is truncated or no JSON: .*git lfs pull",
    "not text": "tokenizer.json cannot be read: .*copy it",
    "a list": "tokenizer.json holds a JSON list, not an object",
    "odd layout": "tokenizer.json is not laid out as one",
    "not for this library": r"tokenizer.json: tokenizers [\d.]+ cannot read it: .*newer version",
    "another kind": "its model is WordPiece; byte-pair encodings",
    "no fallback": "its decoder is Fuse without byte_fallback",
    "a byte less": "tokenizer.json: no piece writes the byte 0x00 alone",
    "an odd piece": "tokenizer.json: its piece '你' has '你', no letter of a byte-level encoding",
    "no end": "names no token that ends a text: put eos_token into tokenizer_config.json",
    "an end that is no id": r"generation_config.json: eos_token_id='<\|im_end\|>' is neither",
    "another checkpoint's end": r"ids \[151645\], which end or pad texts .* are not among its added_tokens",
    "nothing to pad with": "has no token to pad with: .*name it as pad_token",
    "specials by merges": "its merges make special tokens of plain text",
}


@pytest.mark.parametrize("how", CURES)
def test_a_folder_that_cannot_be_read_is_named_with_its_cure(how, tmp_path):
    folder = tmp_path / "checkpoint"
    shutil.copytree(folder_of("qwen"), folder)
    broken(folder, how)
    with pytest.raises(ValueError, match=f"checkpoint.*{CURES[how]}|{CURES[how]}"):
        tokenizers.load(folder)


def test_a_pad_that_is_the_end_is_replaced_and_said(tmp_path, caplog):
    shutil.copytree(folder_of("qwen"), tmp_path / "base")
    ids, end = peer("qwen").token_to_id, "<|endoftext|>"
    rewrite(tmp_path / "base", tokenizer_config=dict(eos_token=end), generation_config=dict(eos_token_id=ids(end)))
    with caplog.at_level(logging.WARNING):
        tokenizer = tokenizers.load(tmp_path / "base")
    assert (tokenizer.eos_id, tokenizer.pad_id) == (ids(end), ids("<|vision_pad|>"))
    assert "rows are padded with <|vision_pad|>" in caplog.text


def test_which_end_is_the_end(tmp_path):
    """The tokenizer's own where generation_config.json knows it, else the first there, else that of config.json."""
    shutil.copytree(folder_of("qwen"), tmp_path / "other")
    start, end = (peer("qwen").token_to_id(f"<|im_{name}|>") for name in ("start", "end"))
    rewrite(tmp_path / "other", generation_config=dict(eos_token_id=[start]))
    assert tokenizers.load(tmp_path / "other").stop_ids == (start,)
    (tmp_path / "other" / "generation_config.json").unlink()
    assert tokenizers.load(tmp_path / "other").stop_ids == (end,)
    (tmp_path / "other" / "config.json").write_text(json.dumps(dict(eos_token_id=[start, end])))
    assert tokenizers.load(tmp_path / "other").stop_ids == (end, start)


def test_a_folder_with_a_sentencepiece_model(tmp_path):
    shutil.copy(EMBEDDED, tmp_path / "tokenizer.model")
    assert tokenizers.load(tmp_path) == tokenizers.load("embedded")
    with pytest.raises(ValueError, match="a sentencepiece model has no chat template"):
        tokenizers.load(tmp_path, tokenizers.ChatSettings())


def test_a_sentencepiece_model_that_rewrites_texts_is_refused(tmp_path):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_prefix=str(tmp_path / "dummy"), model_type="bpe", vocab_size=600,
        byte_fallback=True, normalization_rule_name="identity", pad_id=0, bos_id=1, eos_id=2, unk_id=3, minloglevel=2,
        hard_vocab_limit=False,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"dummy\.model is not a usable tokenizer: the model rewrites texts"):
        tokenizers.load(tmp_path / "dummy.model")


# A run


def test_a_run_stops_at_every_end():
    config = load_config("base")
    config.tokenizer, config.rollout.stop = str(folder_of("qwen")), ("\n\n", "<|im_start|>")
    experiment = build.build(config, one_device())
    tokenizer, rollout = experiment.tokenizer, experiment.parts.rollout
    assert tokenizer == made("qwen") and experiment.parts.model.vocab_size == tokenizer.vocab_size
    assert (rollout.eos_id, rollout.pad_id) == (tokenizer.eos_id, tokenizer.pad_id)
    assert rollout.stop == ("\n\n",) and rollout.piece_bytes == tokenizer.piece_bytes
    assert rollout.stop_ids == (tokenizer.stop_ids[1], tokenizer.special_ids["<|im_start|>"])
    config.rollout.stop = ("",)
    with pytest.raises(ValueError, match=r"config\.rollout\.stop=.*would end every completion; leave it out"):
        build.build(config, one_device())


def test_a_vocabulary_that_the_model_lacks_is_refused():
    config = load_config("base")
    config.tokenizer, config.model.vocab_size = str(folder_of("llama2")), 512
    with pytest.raises(
        ValueError, match=r"config\.model\.vocab_size=512 is less than the 700 ids of config\.tokenizer"
    ):
        build.build(config, one_device())


def test_prompts_that_do_not_begin_with_the_problem_cannot_be_read_in_graph():
    config = load_config("base")
    config.data.update(tasks=("color",), levels=((1,),), max_prompt_len_tokens=40, max_demonstration_len_tokens=90)
    config.tokenizer = str(folder_of("llama2"))
    with pytest.raises(
        ValueError, match=r"reads the prompts of color from their first byte.*config\.verify='callback'"
    ):
        build.build(config, one_device())

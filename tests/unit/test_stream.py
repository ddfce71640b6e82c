"""Streams: a batch is a pure function of the step, whoever makes it and whenever."""

import json
import re

import jax
import numpy as np
import pytest

from rl_reason.data.sentencepiece_tokenizer import SentencePieceTokenizer
from rl_reason.data.sources import make_source
from rl_reason.data.stream import prompt_stream, supervised_stream

TOKENIZER = SentencePieceTokenizer.load()
SIZES = dict(batch_size=8, prompt_len=64)
LONG = dict(reference_len=64, demonstration_len=512)


@pytest.fixture(scope="module")
def source():
    return make_source(tasks=["sort", "add"], seed=3)


def take(stream, num: int) -> list:
    return [next(stream) for _ in range(num)]


def same(a, b) -> bool:
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        x.dtype == y.dtype and np.array_equal(x, y)
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def test_rows_are_bos_prompt_padding(source):
    batch = take(prompt_stream(source, TOKENIZER, **SIZES, **LONG), 3)[2]
    assert batch.tokens.shape == (8, 64) and batch.reference.shape == (8, 64) and batch.demonstration.shape == (8, 512)
    assert all(isinstance(leaf, np.ndarray) and leaf.dtype == np.int32 for leaf in jax.tree.leaves(batch))
    assert batch.uid.tolist() == list(range(16, 24))
    for row, uid in enumerate(batch.uid):
        example = source.example(int(uid))
        length = batch.prompt_len[row]
        assert batch.tokens[row, 0] == TOKENIZER.bos_id
        assert TOKENIZER.decode(batch.tokens[row, 1:length]) == example.prompt
        assert (batch.tokens[row, length:] == TOKENIZER.pad_id).all()
        assert (batch.example_id[row], batch.route[row]) == (example.example_id, example.route)
        answer = [*TOKENIZER.encode(example.reference)]
        assert batch.reference[row].tolist() == answer + [TOKENIZER.pad_id] * (64 - len(answer))
        worked = [*TOKENIZER.encode(example.demonstration), TOKENIZER.eos_id]
        assert batch.demonstration[row].tolist() == worked + [TOKENIZER.pad_id] * (512 - len(worked))


def test_what_is_not_asked_for_is_absent(source):
    batch = next(prompt_stream(source, TOKENIZER, **SIZES))
    assert batch.reference is None and batch.demonstration is None and batch.baseline is None


@pytest.mark.parametrize("num_processes", [1, 2, 4])
def test_processes_make_their_rows_of_the_same_batch(source, num_processes):
    share = 8 // num_processes
    streams = [
        prompt_stream(source, TOKENIZER, **SIZES, **LONG, rows=range(p * share, (p + 1) * share))
        for p in range(num_processes)
    ]
    whole = prompt_stream(source, TOKENIZER, **SIZES, **LONG, num_threads=0)
    for _ in range(3):
        joined = jax.tree.map(lambda *parts: np.concatenate(parts), *(next(stream) for stream in streams))
        assert same(joined, next(whole))
    assert all(stream.get_state() == whole.get_state() for stream in streams)


@pytest.mark.parametrize("make", [prompt_stream, supervised_stream])
def test_resuming_is_exact(source, make):
    sizes = dict(SIZES, demonstration_len=512)
    stream = make(source, TOKENIZER, **sizes, num_threads=2, prefetch=3)
    take(stream, 3)
    state = json.loads(json.dumps(stream.get_state()))
    rest = take(stream, 3)
    resumed = make(source, TOKENIZER, **sizes, rows=range(8), num_threads=1, prefetch=1)
    next(resumed)
    resumed.set_state(state)
    assert all(same(a, b) for a, b in zip(rest, take(resumed, 3), strict=True))
    stream.set_state(state)  # and backwards
    assert same(next(stream), rest[0])


def test_supervised_rows(source):
    tokens, mask = take(supervised_stream(source, TOKENIZER, **SIZES, demonstration_len=512), 2)[1]
    assert tokens.shape == mask.shape == (8, 576) and (tokens.dtype, mask.dtype) == (np.int32, np.bool_)
    for row in range(8):
        example = source.example(8 + row)
        prompt = [TOKENIZER.bos_id, *TOKENIZER.encode(example.prompt)]
        worked = [*TOKENIZER.encode(example.demonstration), TOKENIZER.eos_id]
        assert tokens[row][mask[row]].tolist() == worked
        assert tokens[row, : len(prompt)].tolist() == prompt and not mask[row, : len(prompt)].any()
        assert (tokens[row, len(prompt) + len(worked) :] == TOKENIZER.pad_id).all()


@pytest.mark.parametrize(
    ("sizes", "key"),
    [
        (dict(prompt_len=3), "max_prompt_len_tokens is 3"),
        (dict(reference_len=0), "max_reference_len_tokens is 0"),
        (dict(demonstration_len=2), "max_demonstration_len_tokens is 2"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(source, sizes, key):
    example = source.example(0)
    stream = prompt_stream(source, TOKENIZER, **SIZES | sizes)
    with pytest.raises(ValueError, match=rf"example {example.example_id} of '{example.source}' has \d+ tokens.*{key}"):
        next(stream)


def test_finite_rows_go_round_and_lack_demonstrations(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{i}+1=", "answer": str(i + 1)}) + "\n" for i in range(10)))
    source = make_source(files=[str(path)], seed=0, verifier="fake_verifiers:exact")
    batches = take(prompt_stream(source, TOKENIZER, **SIZES), 4)
    ids = np.concatenate([batch.example_id for batch in batches])
    n = source.num_examples
    assert sorted(ids[:n]) == sorted(ids[n : 2 * n]) and len(set(ids[:n])) == n
    with pytest.raises(ValueError, match=re.escape("has no demonstration; set data.demonstration_key")):
        next(prompt_stream(source, TOKENIZER, **SIZES, demonstration_len=5))


@pytest.mark.parametrize("rows", [range(0), range(4, 9), range(-1, 3)])
def test_rows_outside_the_batch_are_refused(source, rows):
    with pytest.raises(ValueError, match="within the batch"):
        prompt_stream(source, TOKENIZER, **SIZES, rows=rows)

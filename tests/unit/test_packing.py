"""Packed rows: what is in them, where the stream stands, and that neighbours in a row do not see each other."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_reason.data.packing import packed_stream
from rl_reason.data.sentencepiece_tokenizer import SentencePieceTokenizer
from rl_reason.data.sources import make_source
from rl_reason.data.stream import ExampleError, demonstration_tokens, prompt_tokens
from rl_reason.loop.supervised import Demonstrations, negative_log_likelihood
from tests import support

TOKENIZER = SentencePieceTokenizer.load()
SOURCE = make_source(seed=0, tasks=("add",), levels=((1, 2),))


def stream(row_len=64, **kwargs):
    return packed_stream(SOURCE, TOKENIZER, **dict(rows_per_batch=3, row_len=row_len, direct_share=0.0) | kwargs)


def examples_in(batch):
    """(tokens, loss mask) of every example, row by row."""
    for tokens, mask, segments in zip(*batch, strict=True):
        for k in range(1, segments.max(initial=0) + 1):
            yield tokens[segments == k], mask[segments == k]


def test_every_example_is_whole_and_in_turn():
    batches = list(itertools.islice(stream(), 3))
    seen = [x for batch in batches for x in examples_in(batch)]
    wanted = []
    for uid in range(len(seen)):
        example = SOURCE.example(uid)
        wanted.append((prompt_tokens(TOKENIZER, example, 64), demonstration_tokens(TOKENIZER, example, 64)))
    # First-fit may put a later example into an earlier row of the same batch, so they are compared as sets.
    assert sorted(tuple(tokens) for tokens, _ in seen) == sorted(tuple(p + d) for p, d in wanted)
    predicted = {tuple(p + d): len(d) for p, d in wanted}
    assert all(mask.sum() == predicted[tuple(tokens)] and not mask[0] for tokens, mask in seen)
    used = np.mean([(batch.segments > 0).mean() for batch in batches])
    assert used > 0.75, "first-fit should leave little padding"


def test_going_back_to_a_state():
    there = stream()
    next(there)
    state = there.get_state()
    want = next(there)
    again = stream()
    again.set_state(state)
    for a, b in zip(next(again), want, strict=True):
        np.testing.assert_array_equal(a, b)


def test_processes_see_parts_of_the_same_rows():
    whole, last = next(stream()), next(stream(rows=range(2, 3)))
    np.testing.assert_array_equal(whole.tokens[2:], last.tokens)


def test_an_example_longer_than_a_row_is_refused():
    with pytest.raises(ExampleError, match=r"data\.max_|supervised\.row_len_tokens is 12"):
        next(stream(row_len=12))


def test_neighbours_do_not_see_each_other(x64):
    # The loss and gradient of three packed examples are those of three rows.
    model = support.tiny_model(**support.FLOAT64)
    params = support.tiny_params(model)
    rng = np.random.default_rng(0)
    lengths = (4, 3, 5)
    pieces = [rng.integers(3, support.VOCAB, n) for n in lengths]
    tokens, segments = np.zeros((1, 14), np.int32), np.zeros((1, 14), np.int32)
    tokens[0, :12], segments[0, :12] = np.concatenate(pieces), np.repeat([1, 2, 3], lengths)
    starts = np.cumsum([0, *lengths[:-1]])
    mask = (segments > 0) & ~np.isin(np.arange(14), starts)
    packed = Demonstrations(jnp.asarray(tokens), jnp.asarray(mask), jnp.asarray(segments))
    rows = np.zeros((3, 5), np.int32)
    for row, piece in zip(rows, pieces, strict=True):
        row[: len(piece)] = piece
    columns = np.arange(5)
    apart = Demonstrations(jnp.asarray(rows), jnp.asarray((columns > 0) & (columns < np.array(lengths)[:, None])))
    run = jax.jit(jax.value_and_grad(lambda p, b: negative_log_likelihood(p, b, model)[0]))
    (loss, grads), (want, want_grads) = run(params, packed), run(params, apart)
    assert float(loss) == pytest.approx(float(want), rel=1e-12)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(want_grads), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-12)

"""What a sample may depend on: its prompt, its weights and its own key; not its slot, schedule, batch or program."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_reason.rollout import generate
from rl_reason.sampling import make_sampling
from tests import support

NUM_PROMPTS, GROUP = 6, 3
ROWS = NUM_PROMPTS * GROUP
LENGTH = 8  # tokens of a completion


@pytest.fixture(autouse=True, scope="module")
def float64():
    """Everything here is in double precision, so that equal means equal."""
    with jax.enable_x64(True):
        yield


@functools.cache
def params(model):
    """Random weights under which completions end anywhere from the first token to the last."""
    return support.tiny_params(model, scale=0.5)


def draw(model=None, prompts=None, sampling=None, max_new_tokens=None, **changes):
    """Rollout of numpy arrays from a program of its own."""
    model = support.tiny_model(**support.FLOAT64 | (model or {}))
    rollout = support.tiny_rollout(
        **dict(group_size=GROUP, completion_len=LENGTH, num_slots=ROWS, check_every=1) | changes
    )
    prompts = support.tiny_prompts(NUM_PROMPTS) if prompts is None else prompts
    sampling = make_sampling(1.0) if sampling is None else sampling
    run = jax.jit(lambda *args: generate(*args, model, rollout, max_new_tokens))
    out, steps = run(params(model), prompts, jax.random.key(11), sampling)
    return jax.tree.map(np.asarray, out), int(steps)


@functools.cache
def lock_step(**model):
    """The reference: a slot for every row, so none is ever refilled."""
    return draw(model)[0]


def completions(out) -> list[list[int]]:
    """The tokens that each row drew."""
    return [tokens[mask].tolist() for tokens, mask in zip(out.tokens, out.completion_mask, strict=True)]


def assert_same(out, expected):
    """Equal tokens, bit for bit, and log-probabilities to the rounding of products of other shapes."""
    np.testing.assert_array_equal(out.tokens, expected.tokens)
    np.testing.assert_array_equal(out.completion_mask, expected.completion_mask)
    np.testing.assert_array_equal(out.truncated, expected.truncated)
    np.testing.assert_allclose(out.rollout_logprobs, expected.rollout_logprobs, rtol=0, atol=1e-12)


def test_the_reference_has_rows_of_many_lengths():
    """Otherwise the laws below say little."""
    lengths = {len(row) for row in completions(lock_step())}
    assert len(lengths) >= 4, lengths
    assert lock_step().truncated.any() and not lock_step().truncated.all()


@pytest.mark.parametrize(
    "num_slots, check_every, model",
    [(4, 1, {}), (4, 3, {}), (2, 8, {}), (ROWS, 8, {}), (ROWS + 5, 3, {}), (4, 3, support.MOE)],
    ids=str,
)
def test_refilled_slots_equal_lock_step(num_slots, check_every, model):
    out, _ = draw(model, num_slots=num_slots, check_every=check_every)
    assert_same(out, lock_step(**model))


def test_fewer_slots_are_kept_busy():
    """The decode steps of 4 slots are those of packing the rows greedily in order, not of the longest row a batch."""
    _, steps = draw(num_slots=4)
    busy = [0] * 4
    for row in completions(lock_step()):
        busy[busy.index(min(busy))] += len(row)
    assert steps == max(busy)


@pytest.mark.parametrize(
    "model, changes",
    [
        (dict(scan_decode=True, scan_layers=True), dict(num_slots=4)),
        (dict(remat="full"), {}),
        ({}, dict(prefill_rows=2)),
        ({}, dict(num_shards=2, num_slots=4, prefill_rows=2)),
    ],
    ids=["scanned", "remat", "prefill in chunks", "two shards"],
)
def test_another_program_draws_the_same(model, changes):
    assert_same(draw(model, **changes)[0], lock_step())


def test_order_of_the_batch_is_invisible():
    prompts = support.tiny_prompts(NUM_PROMPTS)
    order = np.array([4, 0, 5, 2, 1, 3])
    shuffled = jax.tree.map(lambda x: x[order], prompts)
    out, _ = draw(prompts=shuffled, num_slots=4)
    rows = (order[:, None] * GROUP + np.arange(GROUP)).reshape(-1)
    expected = lock_step()
    np.testing.assert_array_equal(out.tokens, expected.tokens[rows])
    np.testing.assert_allclose(out.rollout_logprobs, expected.rollout_logprobs[rows], rtol=0, atol=1e-12)


def test_uid_is_what_a_sample_hangs_on():
    prompts = support.tiny_prompts(NUM_PROMPTS)
    other, _ = draw(prompts=dataclasses.replace(prompts, uid=prompts.uid + 100))
    assert completions(other) != completions(lock_step())


def test_a_limit_cuts_its_row_alone():
    limits = np.arange(ROWS) % (LENGTH + 2)  # from 0 to more than the buffer: clipped to 1..LENGTH
    out, _ = draw(max_new_tokens=jnp.asarray(limits), num_slots=4)
    for row, (cut, whole) in enumerate(zip(completions(out), completions(lock_step()), strict=True)):
        limit = min(max(limits[row], 1), LENGTH)
        assert cut == whole[:limit]
        assert out.truncated[row] == (len(cut) == limit and cut[-1] != support.EOS)


def test_eos_is_the_last_token_and_only_there():
    out = lock_step()
    for row, tokens in enumerate(completions(out)):
        assert support.EOS not in tokens[:-1]
        assert out.truncated[row] == (tokens[-1] != support.EOS)
        start, stop = out.prompt_len[row], out.prompt_len[row] + len(tokens)
        assert out.completion_mask[row, start:stop].all() and out.completion_mask[row].sum() == len(tokens)
        assert (out.tokens[row, stop:] == support.PAD).all()


def test_stop_texts_end_a_completion_wherever_tokens_are_cut():
    """A text may lie within a token, or begin in one and end inside another; the last id is beyond the tokenizer's."""
    pieces = (b"", b"ab", b"", b"ba", b"bc", b"ca", b"a", b"b", b"c", b"acab", b"aa", b"cb")
    assert len(pieces) == support.VOCAB - 1 and not pieces[support.EOS]
    whole = completions(lock_step())
    out, _ = draw(stop=("abc", "caa", "bb"), piece_bytes=pieces, num_slots=4)
    stops, stopped, beyond = (b"abc", b"caa", b"bb"), 0, 0
    for row, (cut, before) in enumerate(zip(completions(out), whole, strict=True)):
        texts = [b"".join(pieces[t] for t in before[: i + 1] if t < len(pieces)) for i in range(len(before))]
        ends = [i + 1 for i, text in enumerate(texts) if any(stop in text for stop in stops)]
        assert cut == (before[: ends[0]] if ends else before)
        assert out.truncated[row] == (not ends and before[-1] != support.EOS)
        stopped += len(cut) < len(before)
        beyond += bool(ends) and not texts[ends[0] - 1].endswith(stops)
    assert stopped >= 2 and beyond >= 1  # some end a token before its end


def test_other_ids_end_a_completion_as_eos_does():
    whole = completions(lock_step())
    other = next(row[1] for row in whole if len(row) > 3)
    out, _ = draw(stop_ids=(other,), num_slots=4)
    for row, (cut, before) in enumerate(zip(completions(out), whole, strict=True)):
        assert cut == (before[: before.index(other) + 1] if other in before else before)
        assert out.truncated[row] == (cut[-1] not in (other, support.EOS))
    assert sum(map(len, completions(out))) < sum(map(len, whole))


def test_logprobs_of_the_truncated_distribution_are_kept_apart():
    """Under top-k 1 what is drawn was certain; the full vocabulary's log-probability says otherwise."""
    out, _ = draw(sampling=make_sampling(1.0, top_k=1))
    mask = out.completion_mask
    np.testing.assert_allclose(out.sampled_logprobs[mask], 0.0, atol=1e-12)
    assert (out.rollout_logprobs[mask] < -1e-3).all()


def test_sampling_knobs_never_recompile():
    model, rollout = support.tiny_model(**support.FLOAT64), support.tiny_rollout(num_slots=4)
    run = jax.jit(lambda *args: generate(*args, model, rollout)[0].tokens)
    prompts, key = support.tiny_prompts(), jax.random.key(0)
    knobs = [(1.0,), (0.3,), (0.0,), (1.0, 5), (1.0, 0, 0.5), (1.0, 0, 1.0, 0.2), (2.0, 3, 0.9, 0.05)]
    drawn = {np.asarray(run(params(model), prompts, key, make_sampling(*knob))).tobytes() for knob in knobs}
    assert run._cache_size() == 1
    assert len(drawn) > 4

"""Judges: how a case is read, what a reply means, the cases that they learn from, and their place in a run."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_reason import build, judges, judging
from rl_reason.data.task_source import TaskSource
from rl_reason.judges import RIGHT, UNUSABLE, WRONG, Candidate
from rl_reason.judging import Cases, Preference, Verifier
from rl_reason.loop.step import reward_phase
from rl_reason.sampling import make_sampling
from rl_reason.types import Prompts, Rollout, Verdicts
from tests.support import load_config, one_device, tiny_model

SEPARATOR, ASK, A, B, C = 12, 11, 3, 4, 5
MODEL = tiny_model(num_layers=1)
VERIFIER = Verifier(MODEL, SEPARATOR, ASK, 0, (A, B, C))
PREFERENCE = Preference(MODEL, SEPARATOR, ASK, 0)
LIMIT = 24


def cases():
    """Two cases of different lengths; what lies past the lengths must not be read."""
    return Cases(
        prompt=jnp.array([[6, 7, 9], [6, 9, 9]]),
        prompt_len=jnp.array([2, 1]),
        reference=jnp.array([[8, 9], [8, 7]]),
        reference_len=jnp.array([1, 2]),
        candidate=jnp.array([[8, 2, 9, 9], [7, 7, 7, 9]]),
        candidate_len=jnp.array([2, 3]),
    )


def test_a_case_as_a_row():
    tokens, length = VERIFIER.rows(cases())
    assert tokens.tolist() == [
        [6, 7, SEPARATOR, 8, SEPARATOR, 8, 2, ASK, 0, 0, 0, 0],
        [6, SEPARATOR, 8, 7, SEPARATOR, 7, 7, 7, ASK, 0, 0, 0],
    ]
    assert length.tolist() == [8, 9]


@pytest.mark.parametrize("judge", [VERIFIER, PREFERENCE], ids=["verifier", "preference"])
def test_only_what_is_in_a_case_is_read(judge):
    params, clean = judge.init(jax.random.key(0)), cases()
    dirty = dataclasses.replace(
        clean,
        prompt=clean.prompt.at[0, 2].set(1).at[1, 1:].set(10),
        reference=clean.reference.at[0, 1].set(3),
        candidate=clean.candidate.at[:, 3].set(5),
    )
    np.testing.assert_array_equal(judge(params, clean), judge(params, dirty))
    if judge is PREFERENCE:
        changed = dataclasses.replace(clean, candidate=clean.candidate.at[:, 1].set(6))
        assert bool((judge(params, clean) != judge(params, changed)).all())


def test_a_reply_that_is_no_letter_cannot_be_read():
    # The head is turned so that a chosen token always wins: its embedding is the hidden state's own direction.
    params = VERIFIER.init(jax.random.key(0))
    for token, label in ((A, 0), (B, 1), (C, 2), (7, -1), (SEPARATOR, -1)):
        hidden = VERIFIER.read(params, cases())
        logits = hidden @ params["embed"].T
        verifier = _Says(MODEL, SEPARATOR, ASK, 0, (A, B, C), token=token)
        assert verifier(params, cases()).tolist() == [label, label]
        np.testing.assert_allclose(VERIFIER.logits(params, cases()), logits, atol=1e-5)


@dataclasses.dataclass(frozen=True)
class _Says(Verifier):
    """Replies one token to everything."""

    token: int

    def logits(self, params, cases):
        return jax.nn.one_hot(jnp.full(cases.prompt.shape[0], self.token), MODEL.vocab_size)


def rollout_of(prompt_len, length, prompts):
    mask = (jnp.arange(7) >= prompt_len[:, None]) & (jnp.arange(7) < (prompt_len + length)[:, None])
    zeros = jnp.zeros(mask.shape)
    return Rollout(
        tokens=jnp.where(mask, 8, prompts),
        prompt_len=prompt_len,
        completion_mask=mask,
        rollout_logprobs=zeros,
        sampled_logprobs=zeros,
        prompt_id=jnp.array([0, 0, 1, 1]),
        truncated=jnp.zeros(4, bool),
        off_policy=jnp.zeros(4, bool),
    )


def a_rollout():
    prompts = Prompts(
        tokens=jnp.array([[6, 7, 0], [6, 0, 0]]),
        prompt_len=jnp.array([2, 1]),
        example_id=jnp.arange(2),
        uid=jnp.arange(2),
        route=jnp.arange(2),
        reference=jnp.array([[9, 0], [9, 10]]),
    )
    rows = jnp.pad(jnp.repeat(prompts.tokens, 2, axis=0), ((0, 0), (0, 4)))
    return rollout_of(jnp.array([2, 2, 1, 1]), jnp.array([1, 4, 2, 3]), rows), prompts


def test_the_completions_of_a_rollout_as_cases():
    rollout, prompts = a_rollout()
    tokens, length = VERIFIER.rows(judging.cases_of(rollout, prompts, 0))
    s, q = SEPARATOR, ASK
    assert [row[:n] for row, n in zip(tokens.tolist(), length.tolist(), strict=True)] == [
        [6, 7, s, 9, s, 8, q],
        [6, 7, s, 9, s, 8, 8, 8, 8, q],
        [6, s, 9, 10, s, 8, 8, q],
        [6, s, 9, 10, s, 8, 8, 8, q],
    ]
    with pytest.raises(ValueError, match="judges read references"):
        judging.cases_of(rollout, dataclasses.replace(prompts, reference=None), 0)


def test_pieces_do_not_show():
    rollout, prompts = a_rollout()
    params = PREFERENCE.init(jax.random.key(0))
    whole, halves = (judging.ask(PREFERENCE, params, rollout, prompts, pieces) for pieces in (1, 2))
    np.testing.assert_allclose(halves, whole, atol=1e-6)


def test_cases_are_what_the_tasks_say_they_are():
    source = TaskSource(("dfa", "sort"), seed=0, split="train", levels=((1,), (2,)))
    seen = np.zeros(3)
    for uid in range(300):
        example = source.example(uid)
        drawn, label = judges.case(np.random.default_rng(uid), example, LIMIT)
        seen[label] += 1
        assert label == judges.label(drawn, example)
    assert (seen > 70).all()  # about 100 each: below 70 by chance once in 10^4


def test_labels_by_hand():
    example = TaskSource(("sort",), seed=0, split="train", levels=((2,),)).example(0)
    right = example.reference
    wrong = right[::-1] if right != right[::-1] else f"{right}1"
    for text, finished, label in [
        (f"####{right}", True, RIGHT),
        (f"nonsense####{right}", True, RIGHT),  # only the final answer counts
        (f"####{wrong}", True, WRONG),
        (f"####{right}", False, UNUSABLE),  # it did not stop
        (right, True, UNUSABLE),  # no mark
        ("####", True, UNUSABLE),
    ]:
        assert judges.label(Candidate(text, finished), example) == label, text


def test_quality_is_how_much_of_the_answer_is_right():
    example = dataclasses.replace(
        TaskSource(("sort",), seed=0, split="train", levels=((2,),)).example(0), reference="1234"
    )
    quality = lambda text, finished=True: judges.quality(Candidate(text, finished), example)
    assert quality("####1243") == 0.5 and quality("####9234") == 0.0 and quality("####123") == 0.75
    assert quality("####1", finished=False) == -1.0


def test_pairs_are_in_order():
    source = TaskSource(("sort",), seed=0, split="train", levels=((2,),))
    for uid in range(100):
        example = source.example(uid)
        better, worse = judges.pair(np.random.default_rng(uid), example, LIMIT)
        assert judges.quality(better, example) > judges.quality(worse, example)


@functools.cache
def experiment():
    return build.build(load_config("intern_s1"), one_device())


def test_no_candidate_is_cut():
    # What was labelled as finished fits, EOS included: cut, it would be another case.
    e = experiment()
    source = judges.source_of(e, "preference", "train")
    cases, labels = judges.batch_of(e, e.parts.judges["judge"], source, 0, 200)
    last = np.take_along_axis(cases.candidate, np.maximum(cases.candidate_len - 1, 0)[:, None], axis=1)[:, 0]
    assert (last[labels != UNUSABLE] == e.tokenizer.eos_id).all()


def test_training_is_cached_and_takes_its_place_in_the_state(tmp_path, monkeypatch):
    monkeypatch.setenv("RL_REASON_CACHE", str(tmp_path))
    monkeypatch.setattr(judges, "NUM_HELDOUT", 16)
    e = experiment()
    with jax.set_mesh(e.mesh):
        heard = []
        made = judges.make(e, "judge", lambda step, loss: heard.append((step, loss)))
        assert [step for step, _ in heard] == [2, 4] and not made.cached and 0 <= made.accuracy <= 1
        again = judges.make(e, "judge", lambda *_: pytest.fail("trained again"))
        assert again.cached and again.accuracy == made.accuracy
        state = build.init_state(e, e.parts, build.init_params(e))
        state = judges.put(state, {"judge": again})
    for x, y in zip(jax.tree.leaves(state.models["judge"]["params"]), jax.tree.leaves(made.params), strict=True):
        np.testing.assert_array_equal(x, y)
    assert set(state.models) == {"judge", "preference"}


def test_the_reward_slot_asks_them():
    # Rules pass everything; what the random judges say decides the rows of their tasks, sub and dfa, and nothing else.
    e = experiment()
    state = build.new_state(e.parts, build.init_params(e), 0)
    prompts = Prompts(
        tokens=jnp.full((4, 18), 60),
        prompt_len=jnp.full(4, 3),
        example_id=jnp.arange(4),
        uid=jnp.arange(4),
        route=jnp.arange(4),
        reference=jnp.full((4, 8), 61),
    )
    rows = 4 * e.parts.plan.group_size
    mask = jnp.broadcast_to((jnp.arange(42) >= 3) & (jnp.arange(42) < 9), (rows, 42))
    tokens = jnp.asarray(np.random.default_rng(0).integers(60, 90, mask.shape), jnp.int32)
    zeros = jnp.zeros(mask.shape)
    rollout = Rollout(
        tokens=tokens,
        prompt_len=jnp.full(rows, 3),
        completion_mask=mask,
        rollout_logprobs=zeros,
        sampled_logprobs=zeros,
        prompt_id=jnp.repeat(jnp.arange(4), e.parts.plan.group_size),
        truncated=jnp.zeros(rows, bool),
        off_policy=jnp.zeros(rows, bool),
    )
    verdicts = Verdicts(jnp.ones(rows), jnp.ones(rows, bool))
    got, _ = reward_phase(e.parts, state, prompts, rollout, verdicts, make_sampling(1.0))
    by_route = lambda x: np.asarray(x).reshape(4, -1)
    np.testing.assert_array_equal(by_route(got.total)[[0, 3]], 1.0)
    said = judging.ask(e.parts.judges["judge"], state.models["judge"]["params"], rollout, prompts, 1)
    np.testing.assert_array_equal(by_route(got.valid)[2], by_route(said >= 0)[2])
    assert by_route(got.valid)[[0, 1, 3]].all()
    assert by_route(got.total)[1].sum() == pytest.approx(0, abs=1e-5) and by_route(got.total)[1].std() > 0.1


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(judg={}), "no 'judg'; there are judge, preference"),
        (dict(judge={}), "it takes exactly"),
        (dict(tasks=("max",)), "name tasks of config.data.tasks"),
        (dict(num_steps=3), "no multiple"),
    ],
)
def test_refusals(change, message):
    config = load_config("intern_s1")
    own = {**config.models["judge"]}
    config.models = change if set(change) & {"judg", "judge"} else dict(judge=own | change)
    with pytest.raises(ValueError, match=message):
        build.build(config, one_device())

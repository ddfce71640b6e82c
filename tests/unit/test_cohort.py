"""The cohort loop: what it adds to the loop is the vote, and nothing else."""

import dataclasses
import functools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_reason.compilation import CompileClock
from rl_reason.loop.cohort import Cohort, Read, compared, parts_of_models, vote_metrics, vote_phase
from rl_reason.loop.engine import Fused
from rl_reason.loop.step import update_phase
from rl_reason.methods import rlccf, ttrl
from rl_reason.sampling import make_sampling
from rl_reason.slots import Slot
from rl_reason.tasks.answer_ids import Spelled, class_ids, make_answer_ids
from rl_reason.tasks.base import extract_answer
from rl_reason.types import Rewards, Rollout, Verdicts
from tests import support
from tests.e2e import loops

TOLERANCE = 1e-10  # of parameters, float64
STEPS, GROUP = 3, 4
# What the 13 tokens write: few digits, so that samples agree at times; "1" and "2" have two spellings.
PIECES = [b"", b"", b"", b"1", b"1", b"2", b"2", b" ", b" ", b"x", b"x", b"-", b"####"]
SPELL = make_answer_ids(types.SimpleNamespace(piece_bytes=PIECES), rule="v1")
KL = dict(kl=dict(estimator="k3", coef=0.1, how="token_mean", divisor=1.0), entropy=None)


@pytest.fixture(autouse=True, scope="module")
def float64():
    with jax.enable_x64(True):
        yield


@functools.cache
def parts_of(**changes):
    """GRPO on groups of four, all handed out, one update a step; one layer, double precision."""
    sizes = dict(group_size=GROUP, train_group_size=GROUP, minibatches=1)
    parts = support.tiny_parts("base", model=support.FLOAT64 | dict(num_layers=1), **sizes)
    return dataclasses.replace(parts, log_groups=-1, **changes)


def two_policies():
    """A small policy, and one that is wider and held to where it began."""
    parts = parts_of()
    wide = dataclasses.replace(parts.model, mlp_size=16, num_heads=8)
    policies = parts_of_models(parts, {"wide": wide, "small": parts.model})  # not in alphabetical order
    return policies | {"wide": dataclasses.replace(policies["wide"], regularisers=KL)}


def start(policies):
    return {name: loops.start(parts, seed=seed) for seed, (name, parts) in enumerate(policies.items())}


def wrong_verify(rollout, prompts):
    """The opposite of ``support.parity_verify``."""
    verdicts = support.parity_verify(rollout, prompts)
    return Verdicts(1.0 - verdicts.score, verdicts.valid)


def cohort_of(policies, read=None):
    return Cohort(policies, read or Read(wrong_verify, SPELL), rlccf.vote, loops.mesh_of())


def prompts_of(policies, steps, first=0):
    """The same prompts for each policy."""
    return dict.fromkeys(policies, loops.stacked(parts_of(), steps, first=first))


@functools.cache
def trained():
    """(policies, what STEPS steps gave, programs compiled during the first, and after it)."""
    policies, clock = two_policies(), CompileClock()
    engine = cohort_of(policies)
    first, later = [], []
    clock.watch(engine.programs, first.append)
    out = [engine.advance(start(policies), prompts_of(policies, 1), loops.LIVE)]
    clock.watch(engine.programs, later.append)
    out.append(engine.advance(out[0].state, prompts_of(policies, STEPS - 1, first=1), loops.LIVE))
    clock.watch((), later.append)
    metrics, sampled = (
        jax.tree.map(lambda *x: np.concatenate(x), *x) for x in zip(*(o[1:3] for o in out), strict=True)
    )
    return policies, out[1]._replace(metrics=metrics, sampled=sampled), first, later


def test_programs_are_compiled_once_under_their_names():
    _, _, first, later = trained()
    heard = sorted(text.split("(")[1].split(")")[0] for text in first)
    assert heard == ["draw_small", "draw_wide", "learn_small", "learn_wide", "vote"]
    assert later == []


@pytest.mark.parametrize("name", ["wide", "small"])
def test_each_policy_trains_as_if_alone_with_these_rewards(name):
    """No gradient or statistic of another policy reaches it, only rewards."""
    policies, out, _, _ = trained()
    parts, state = policies[name], start(policies)[name]
    began = state.params
    update = jax.jit(lambda state, rollout, rewards: update_phase(parts, state, rollout, rewards, loops.LIVE))
    for k in range(STEPS):
        sampled = jax.tree.map(lambda x, k=k: jnp.asarray(x[k]), out.sampled[name])
        rewards = Rewards(sampled.reward, jnp.zeros_like(sampled.reward), sampled.valid)
        state, metrics, _ = update(state, rollout_of(sampled), rewards)
        for key in ("actor/grad_norm", "actor/kl_loss") if name == "wide" else ("actor/grad_norm",):
            np.testing.assert_allclose(metrics[key], out.metrics[f"{name}/{key}"][k], atol=TOLERANCE)
    assert loops.distance(state.params, out.state[name].params) < TOLERANCE
    assert int(out.state[name].step) == STEPS
    assert loops.distance(state.params, began) > 1e-4
    assert np.any(out.metrics["wide/actor/kl_loss"] > 0) and "small/actor/kl_loss" not in out.metrics


@pytest.mark.slow
def test_asking_the_host_trains_the_same():
    """Verdicts and classes of answers made on the host, of all policies at once, in place of those made in graph."""
    policies, expected, _, _ = trained()
    asked = []

    def ask(rows, uid):
        asked.append((list(rows), np.array(uid)))
        verdicts = {}
        for name, (tokens, mask) in rows.items():
            score, valid, _ = loops.verdicts(tokens, mask, uid)
            verdicts[name] = Verdicts(jnp.asarray(1.0 - score), jnp.asarray(valid))
        spelled = {name: SPELL(jnp.asarray(tokens), jnp.asarray(mask)) for name, (tokens, mask) in rows.items()}
        found = compared(list(rows), GROUP, spelled, verdicts)
        return {name: tuple(np.asarray(x) for x in (v.score, v.valid, v.answers)) for name, v in found.items()}

    out = cohort_of(policies, ask).advance(start(policies), prompts_of(policies, STEPS), loops.LIVE)
    for name in policies:
        np.testing.assert_array_equal(out.sampled[name].tokens, expected.sampled[name].tokens)
        np.testing.assert_array_equal(out.sampled[name].reward, expected.sampled[name].reward)
        assert loops.distance(out.state[name].params, expected.state[name].params) < TOLERANCE
    assert out.metrics["cohort/label_accuracy"].tolist() == expected.metrics["cohort/label_accuracy"].tolist()
    names, uids = asked[1]
    assert names == ["wide", "small"] and len(asked) == STEPS
    assert uids.tolist() == np.repeat(loops.prompts_of(policies["small"], 1).uid, GROUP).tolist()


def rollout_of(sampled):
    """The rollout that was handed out."""
    rows = sampled.tokens.shape[0]
    return Rollout(
        tokens=sampled.tokens,
        prompt_len=sampled.prompt_len,
        completion_mask=sampled.completion_mask,
        rollout_logprobs=sampled.rollout_logprobs,
        sampled_logprobs=sampled.rollout_logprobs,
        prompt_id=jnp.arange(rows, dtype=jnp.int32) // GROUP,
        truncated=sampled.truncated,
        off_policy=jnp.zeros(rows, bool),
    )


def test_rewards_are_the_vote_on_the_decoded_answers():
    """From the tokens alone, by the vote on texts. Groups in which the order of answers decides a tie are left out."""
    policies, out, _, _ = trained()
    names, compared, mixed = list(policies), 0, 0
    for k in range(STEPS):
        texts = {}
        for name in names:
            rows = zip(out.sampled[name].tokens[k], out.sampled[name].completion_mask[k], strict=True)
            written = [b"".join(PIECES[i] for i in row[mask]).decode() for row, mask in rows]
            texts[name] = [host_answer(text) for text in written]
        for b in range(policies["small"].plan.prompts_per_step):
            answers = [texts[name][b * GROUP : (b + 1) * GROUP] for name in names]
            label, rewards, _ = rlccf.vote(answers)
            backwards = rlccf.vote([[f"{9 - len(a)}{a}" for a in row] for row in answers])  # another order of texts
            if not np.array_equal(backwards.rewards, rewards):
                continue
            got = [out.sampled[name].reward[k, b * GROUP : (b + 1) * GROUP] for name in names]
            np.testing.assert_array_equal(got, rewards, err_msg=f"{answers} {label}")
            compared, mixed = compared + 1, mixed + (0 < np.mean(got) < 1)
    assert compared >= 6 and mixed >= 4


def host_answer(text: str) -> str:
    """Rule v1 on a text."""
    answer = extract_answer(text)
    return ["", *re.findall("-?[0-9]+", text)][-1] if answer is None else answer


def test_metrics_of_a_run():
    policies, out, _, _ = trained()
    for name in policies:
        for key in ("critic/score/mean", "critic/rewards/mean", "actor/grad_norm", "self_consistency"):
            assert out.metrics[f"{name}/{key}"].shape == (STEPS,)
        correct = out.sampled[name].correct.mean(1)
        np.testing.assert_allclose(out.metrics[f"{name}/critic/score/mean"], correct)
    both = np.mean([out.metrics[f"{name}/critic/rewards/mean"] for name in policies], axis=0)
    np.testing.assert_allclose(out.metrics["cohort/consistency"], both)
    np.testing.assert_allclose(out.metrics["critic/rewards/mean"], both)
    np.testing.assert_array_equal(out.metrics["training/global_step"], [1, 2, 3])
    tokens = [out.metrics[f"{name}/perf/total_num_tokens"] for name in policies]
    np.testing.assert_array_equal(out.metrics["perf/total_num_tokens"], tokens[0] + tokens[1])
    longest = [out.metrics[f"{name}/response_length/max"] for name in policies]
    np.testing.assert_array_equal(out.metrics["response_length/max"], np.maximum(*longest))
    assert "cohort/agreement/wide_small" in out.metrics and set(out.timing) == {
        "gen",
        "reward",
        "update_actor",
        "step",
    }


def test_vote_metrics_by_hand():
    # Prompt 0: a 5 5 5, b 3 3 7, right are 5 and nothing else. SC 1 and 2/3: W(5) = 3, W(3) = 4/3: label 5, right; plain 5.
    # Prompt 1: a 4 4 4, b 6 6 -, c 6 6 -: SC 1, 2/3, 2/3: W(4) = 3, W(6) = 8/3: label 4, wrong; plain: 6, right.
    # Prompt 2: nobody answers: no label, which is wrong for both. (c gives none in prompt 0 too.)
    none = [-1, -1, -1]
    answers = jnp.array([[[5, 5, 5], [3, 3, 7], none], [[4, 4, 4], [6, 6, -1], [6, 6, -1]], [none] * 3])
    right = (answers == 5) | (answers == 6)
    got = vote_metrics(["a", "b", "c"], answers, rlccf.vote(answers), right, jnp.ones_like(right))
    expected = {
        "cohort/label_accuracy": 1 / 3,
        "cohort/group_vote_accuracy": 2 / 3,
        "cohort/consistency": 6 / 27,  # three 5 and three 4 of 27
        "cohort/labelled_fraction": 2 / 3,
        # Prompt 0: reward and verdict agree on all 9. Prompt 1: on the two samples without an answer. Prompt 2: all 9.
        "cohort/reward_accuracy": 20 / 27,
        "a/self_consistency": 2 / 3,  # 1, 1, 0
        "b/self_consistency": 4 / 9,  # 2/3, 2/3, 0
        "c/majority_accuracy": 1 / 3,  # right in prompt 1 alone
        "b/majority_accuracy": 1 / 3,
        "c/answered_fraction": 2 / 9,
        # SC 1 2/3 0, 1 2/3 2/3, 0 0 0 against right 1 0 0, 0 1 1, 0 0 0: covariance 1/9, variances 14/81 and 2/9.
        "cohort/calibration": 3 / 28**0.5,
        "cohort/agreement/a_b": 0.0,
        "cohort/agreement/b_c": 4 / 27,  # 4 of the 9 pairs in prompt 1
    }
    assert {name: float(got[name]) for name in expected} == pytest.approx(expected)
    # Of prompts whose label has no valid verdict nothing is known: prompt 0 leaves the mean, 0 of 2 remain.
    got = vote_metrics(["a", "b", "c"], answers, rlccf.vote(answers), right, answers != 5)
    assert float(got["cohort/label_accuracy"]) == 0.0 and float(got["cohort/group_vote_accuracy"]) == 0.5


def test_rows_without_a_verdict_vote_and_stay_invalid():
    # One prompt: a says 7 7, b says 3 7, and the verifier failed on a's second: W(7) = 1 * 2 + .5 = 2.5, W(3) = .5.
    spelled = lambda text: Spelled(jnp.array([[ord(c)] for c in text]), jnp.ones(len(text), jnp.int32))
    verdicts = {
        "a": Verdicts(jnp.array([1.0, 0.0]), jnp.array([True, False])),
        "b": Verdicts(jnp.array([0.0, 1.0]), jnp.array([True, True])),
    }
    said = compared(["a", "b"], 2, {"a": spelled("77"), "b": spelled("37")}, verdicts)
    rewards, metrics = vote_phase(["a", "b"], rlccf.vote, 2, said)
    assert rewards["a"].total.tolist() == [1, 1] and rewards["b"].total.tolist() == [0, 1]
    assert rewards["a"].valid.tolist() == [True, False] and rewards["a"].correct.tolist() == [1, 0]
    assert float(metrics["cohort/label_accuracy"]) == 1.0 and float(metrics["cohort/reward_accuracy"]) == 1.0
    assert float(metrics["cohort/agreement/a_b"]) == 0.5  # of the four pairs, 7 with 7 twice


@functools.cache
def one_policy():
    """A cohort of one without KL: its programs, but for the vote, are those of ``trained``'s small policy."""
    parts = parts_of()
    return cohort_of(parts_of_models(parts, {"small": parts.model}))


def test_a_unanimous_cohort_learns_nothing():
    """Greedy samples of a prompt are all the same, and rule v1 always finds an answer: every reward is 1."""
    parts = parts_of()
    prompts = prompts_of(["small"], 1)
    out = one_policy().advance({"small": loops.start(parts)}, prompts, make_sampling(1.0, top_k=1))
    np.testing.assert_array_equal(out.sampled["small"].reward, 1.0)
    np.testing.assert_array_equal(out.metrics["small/actor/grad_norm"], 0.0)
    np.testing.assert_array_equal(out.metrics["cohort/consistency"], 1.0)
    loops.assert_equal(out.state["small"].params, loops.start(parts).params)


def test_one_policy_is_ttrl_and_verdicts_do_not_train():
    """Against the fused loop with TTRL's vote as reward; the cohort's verifier says the opposite of the other's."""
    parts = parts_of()

    def vote(rollout, score, valid):
        ids = class_ids(SPELL(rollout.tokens, rollout.completion_mask), GROUP)
        reward = ttrl.vote(ids.reshape(-1, GROUP)).reshape(-1)
        return Rewards(reward.astype(score.dtype), score, valid)

    slots = {**parts.slots, "reward": Slot(vote, frozenset({"rollout", "score", "valid"}))}
    alone = Fused(dataclasses.replace(parts, slots=slots), support.parity_verify)
    expected = alone.advance(loops.start(parts), loops.stacked(parts, STEPS), loops.LIVE)
    out = one_policy().advance({"small": loops.start(parts)}, prompts_of(["small"], STEPS), loops.LIVE)
    np.testing.assert_array_equal(out.sampled["small"].tokens, expected.sampled.tokens)
    np.testing.assert_array_equal(out.sampled["small"].reward, expected.sampled.reward)
    assert loops.distance(out.state["small"].params, expected.state.params) < TOLERANCE
    np.testing.assert_array_equal(out.sampled["small"].correct, 1.0 - expected.sampled.correct)
    assert 0 < np.mean(expected.sampled.reward) < 1 and np.any(expected.metrics["actor/grad_norm"] > 1e-4)


def test_what_does_not_fit_is_refused():
    parts = parts_of()
    make = cohort_of
    with pytest.raises(ValueError, match=r"named \['a/b'\]"):
        make({"a/b": parts})
    other = dataclasses.replace(parts, plan=dataclasses.replace(parts.plan, group_size=8))
    with pytest.raises(ValueError, match="make group_size and generated_prompts the same"):
        make({"a": parts, "b": other})
    peeking = {**parts.slots, "selection": Slot(lambda correct: correct > 0, frozenset({"correct"}))}
    with pytest.raises(ValueError, match=r"b: config.selection asks for correct"):
        make({"a": parts, "b": dataclasses.replace(parts, slots=peeking)})
    policies = {"a": parts, "b": parts}
    states = start(policies)
    late = dataclasses.replace(states["b"], step=jnp.int32(1))
    with pytest.raises(ValueError, match=r"at steps {'a': 0, 'b': 1}"):
        make(policies).advance(states | {"b": late}, prompts_of(policies, 1), loops.LIVE)
    with pytest.raises(ValueError, match="one for each of a, b"):
        make(policies).advance({"a": late}, prompts_of(policies, 1), loops.LIVE)

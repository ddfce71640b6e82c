"""A run of several policies: what it refuses, that it resumes bit for bit, how it is evaluated and reported."""

import dataclasses
import itertools
import json
import math
import re

import jax
import ml_collections
import numpy as np
import pytest

from configs.common import call
from experiments import build_tokenizer
from experiments import evaluate as cli
from rl_reason import build, evaluate, members, rewards, subjects, warmup
from rl_reason.checkpoint import Checkpoints
from rl_reason.data.example import Example
from rl_reason.data.sentencepiece_tokenizer import SentencePieceTokenizer
from rl_reason.drivers.cohort import Cohort
from rl_reason.evaluate import Answered
from rl_reason.report.panels import agreements, panels_for
from rl_reason.report.plots import RunData, draw_plots
from rl_reason.tasks import TASKS
from rl_reason.tasks.base import Problem
from rl_reason.verifier_pool import VerifierPool
from tests.e2e import harness
from tests.support import load_config, one_device

# The command line imports modules whose hints beartype would have spelled otherwise.
pytestmark = pytest.mark.filterwarnings("ignore::beartype.roar.BeartypeDecorHintPep585DeprecationWarning")


NO_POOL = VerifierPool(1, 1.0)  # starts no process until it is asked


def pair(**changes):
    """rlccf.py:smoke with two tiny policies of different sizes; ``changes`` are of the run."""
    config = load_config("rlccf")
    config.model.update(num_layers=1, hidden_size=16, num_heads=2, num_kv_heads=1, head_dim=8, mlp_size=16)
    config.rollout.update(completion_len=8, num_slots=8)
    config.log.rollout_groups = -1
    config.cohort = dict(narrow=dict(seed=1, model=dict(mlp_size=8)), wide=dict(seed=2, optimizer=dict(b2=0.95)))
    for key, value in changes.items():
        config[key] = value
    return config


def with_policy(**own):
    """``pair`` with a third policy."""
    config = pair()
    config.cohort.third = ml_collections.ConfigDict(own)
    return config


@pytest.mark.parametrize(
    "config, says",
    [
        (pair(cohort={}), "config.loop='cohort' has no policies; give config.cohort one or more, by name"),
        (
            pair(loop="rl"),
            "config.cohort names narrow, wide, and config.loop='rl' trains one policy; set config.loop='coh",
        ),
        (pair(verify="callback"), "config.verify='callback' asks while one draws; set config.verify='graph', with"),
        (
            with_policy(seed=3, tokenizer="checkpoints/other.model"),
            "have tokenizers checkpoints/other.model, embedded, and in graph answers are compared token by token; set conf",
        ),
        (with_policy(seed=2), "not all different: third and wide have 2"),
        (with_policy(), "config.cohort.third.seed=None; each policy needs a seed of its own between 1 and 999"),
        (with_policy(seed=0), "config.cohort.third.seed=0;"),
        (
            with_policy(seed=3, batch={}),
            "config.cohort.third has batch. A policy of a cohort may have its own seed, weights, to",
        ),
        (with_policy(seed=3, modell={}), "config.cohort.third has modell. Did you mean 'model'?"),
        (with_policy(seed=3, model=dict(num_layer=2)), "third.model has num_layer. Did you mean 'num_layers'?"),
        (
            with_policy(seed=3, data=dict(files=("x",))),
            "third.data has files. Of data a policy may have its own tasks,",
        ),
        (with_policy(seed=3, data=dict(weights=(1.0,))), "data.weights has 1 entries for 3 tasks"),
        (
            pair(reward=call("verdict.reward", right=1.0, wrong=0.0)),
            "config.reward.fn='verdict.reward' asks for score, valid; the reward of a cohort is its vote",
        ),
        (pair(reward=call("rlccf.vot")), "rlccf has no function 'vot'. Did you mean 'vote'?"),
        (pair(reward=call("ttrl.vote")), "config.reward.fn='ttrl.vote' does not give the Vote of"),
        (
            pair(selection=call("group_filter.mixed", low=0.1, high=0.9)),
            "narrow: config.selection asks for correct, which verdicts decide",
        ),
        (pair(answer_rule="v3"), "config.answer_rule='v3'; there are v1, v2, equivalence"),
    ],
    ids=itertools.count(),
)
def test_refused(config, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        build.build(config, one_device())


def test_each_policy_is_warmed_up_as_if_alone():
    # Its config is the run's with what it changes: weights and seed of its own, of the run's seed too.
    config = load_config("rlccf", "")
    config.seed = 3
    found = members.configs(config)
    assert {name: own.seed for name, own in found.items()} == dict(sums=3001, differences=3002, automata=3003)
    assert found["sums"].data.weights == (0.8, 0.1, 0.1) and found["automata"].data.num_examples == 0
    assert found["automata"].model.hidden_size == 96 and found["sums"].model.hidden_size == 72
    assert all(own.loop == "rl" and not own.cohort for own in found.values())
    assert config.loop == "cohort" and config.data.num_examples == 200 and len(config.cohort) == 3
    # What the vote is has no part in it, so that variants share warm-ups; what a policy was taught, has.
    prints = {}
    for arg in ("", "plain_vote", "own_vote", "confident", "confident_plain_vote"):
        policies = build.build(load_config("rlccf", arg), one_device()).policies
        prints[arg] = {name: warmup.fingerprint(policy) for name, policy in policies.items()}
    assert prints[""] == prints["plain_vote"] == prints["own_vote"] and len(set(prints[""].values())) == 3
    assert prints["confident"] == prints["confident_plain_vote"]
    assert not set(prints[""].values()) & set(prints["confident"].values())


def start(experiment):
    return {name: build.init_params(policy) for name, policy in experiment.policies.items()}


@pytest.mark.slow  # five programs to compile
def test_two_policies_train_and_resume_bitwise(tmp_path):
    """Four steps at once, and two, a checkpoint, a new driver, and two more."""
    experiment = build.build(pair(), one_device())
    with jax.set_mesh(experiment.mesh):
        driver = Cohort(experiment, NO_POOL)
        state = driver.initial_state(start(experiment))
        first = driver.advance(state)
        checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1)
        checkpoints.save(2, (first.state, driver.pending), {"stream": driver.position()})
        whole = driver.advance(first.state)

        again = Cohort(experiment, NO_POOL)
        again.seek(checkpoints.extra(2)["stream"])
        template = again.initial_state(start(experiment))
        state, again.pending = checkpoints.restore(2, (template, again.pending))
        checkpoints.close()
        resumed = again.advance(state)

    assert again.position() == driver.position() and again.skipped_in_a_row(resumed.state) == 0
    for a, b in zip(jax.tree.leaves(whole[:3]), jax.tree.leaves(resumed[:3]), strict=True):
        if not jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
            np.testing.assert_array_equal(a, b)
    params = again.policy(resumed.state)
    assert list(params) == ["narrow", "wide"]
    moved = [np.abs(x - y).max() for x, y in zip(*map(jax.tree.leaves, (params, start(experiment))), strict=True)]
    assert max(moved) > 0  # the KL term alone moves weights, should nobody answer

    records = list(driver.records(whole, 1))
    plan = experiment.parts.plan
    assert len(records) == 2 * plan.prompts_per_step * plan.group_size
    assert {r["policy"] for r in records} == {"narrow", "wide"}
    assert len({(r["group_id"], r["sample_id"]) for r in records}) == len(records)
    assert {r["group_id"] for r in records if r["policy"] == "wide"} == {4 * 3 + i for i in range(4)}


def answered(answers, right, number):
    example = Example("add", number, f"{number}=", Problem("add", 2, {}), None, right, "add", 0)
    correct = tuple(float(a == right) for a in answers)
    return Answered(example, tuple(f"####{a}" for a in answers), tuple(answers), correct, (False,) * 2, (3, 3))


def test_evaluation_of_a_cohort_by_hand():
    # Prompt 0: a 5 5, b 5 7: right is 5. Prompt 1: a 4 4, b 6 6: right is 6; the tie goes to a, seen first: wrong.
    before = {
        "a": [answered("55", "5", 0), answered("44", "6", 1)],
        "b": [answered("57", "5", 0), answered("66", "6", 1)],
    }
    # Afterwards a has one 6 of two, so that the group's vote is 6.
    after = before | {"a": [answered("55", "5", 0), answered("46", "6", 1)]}
    summary = subjects.summary_of(before, after, {"wall": 1.0})
    values = {name: (row.before.value, row.after.value, row.after.count) for name, row in summary.tasks.items()}
    assert values == {
        "a": (0.5, 0.75, 2),
        "b": (0.75, 0.75, 2),
        "group vote": (0.5, 1.0, 2),
        "overall": (0.625, 0.75, 4),  # the mean over the policies
    }
    assert list(values)[-1] == "overall" and summary.headline == summary.tasks["overall"]
    assert summary.majority == dict(before=0.5, after=1.0, right_to_wrong=0, wrong_to_right=1, num_samples=4)
    assert [t.task for t in summary.transcripts] == ["a, add", "b, add"]
    metrics = subjects.metrics(after)
    assert metrics["val-core/a/acc/mean@2"] == 0.75 and metrics["val-core/group/acc/maj@4/mean"] == 1.0
    assert not any("overall" in name or "/add/" in name for name in metrics)


def test_evaluations_are_read_back():
    source = build.build(load_config("base"), one_device()).heldout
    own = [dataclasses.replace(answered("57", "5", i), example=source.example(i)) for i in range(2)]
    own[1] = dataclasses.replace(own[1], correct=(math.nan, 1.0))
    for answers in ({"": own}, {"a": own, "b": own}):
        record = json.loads(json.dumps(subjects.to_record(answers)).replace("NaN", "null"))
        assert ("answers" in record) == ("" in answers)
        back = subjects.from_record(record, source)
        assert list(back) == list(answers) and str(back) == str(answers)  # NaN is not itself
    one = subjects.summary_of({"": own}, {"": own}, {})
    assert set(one.tasks) == set(evaluate.by_task(own)) | ({"overall"} if len(evaluate.by_task(own)) > 1 else set())
    assert subjects.summary_of({}, {}, {}).headline is None


def columns():
    steps = np.arange(1, 21)
    rising = steps / 20
    names = ("a_b", "c", "d")
    found = {
        "step": steps,
        "critic/score/mean": rising,
        "actor/ppo_kl": 0 * rising,
        "critic/rewards/max": rising,
        "cohort/label_accuracy": rising,
    }
    for name in names:
        found |= {f"{name}/critic/score/mean": rising, f"{name}/actor/ppo_kl": rising, f"{name}/extra": rising}
        found |= {f"{name}/self_consistency": rising, f"{name}/critic/rewards/max": rising}
    for a, b in itertools.combinations(names, 2):
        found[f"cohort/agreement/{a}_{b}"] = rising
    return found | {"self_consistency": rising}


def test_panels_of_a_cohort(tmp_path):
    names = [panel.name for panel in panels_for(columns())]
    assert {"cohort", "policy_score", "self_consistency", "reward", "ppo_kl"} <= set(names)
    # A policy's part of a common metric has no panel of its own, what no panel knows has.
    assert sorted(n for n in names if n.startswith("other_")) == ["other_a_b_extra", "other_c_extra", "other_d_extra"]
    policies, pairs = agreements(columns())
    assert policies == ["a_b", "c", "d"] and set(pairs) == {("a_b", "c"), ("a_b", "d"), ("c", "d")}
    assert pairs["c", "d"] == pytest.approx((0.075, 0.975))  # of steps 1, 2 and 19, 20
    assert "agreement" in draw_plots([RunData("run", columns())], tmp_path)
    alone = {name: x for name, x in columns().items() if "/" not in name or name.startswith(("critic", "actor"))}
    assert "agreement" not in draw_plots([RunData("run", alone)], tmp_path)


def test_which_policy_to_evaluate():
    config = pair()
    with pytest.raises(ValueError, match="say which policy: --policy=narrow or --policy=wide"):
        cli.policy_of(config, None)
    with pytest.raises(ValueError, match="--policy=wid: the run has none of that name; its policies are narrow, wide"):
        cli.policy_of(config, "wid")
    assert cli.policy_of(config, "narrow").model.mlp_size == 8
    with pytest.raises(ValueError, match="it trained one policy: leave --policy out"):
        cli.policy_of(load_config("base"), "wide")
    assert cli.policy_of(load_config("base"), None).model.mlp_size == 64


@pytest.mark.slow
def test_a_run_stopped_half_way_ends_as_the_whole_run(tmp_path):
    """With evaluations and summary; then one of its policies is evaluated by the command line."""
    # Without a warm-up of the rate, which would be shorter in the shorter run.
    flags = ["--config=rlccf.py:smoke", "--config.log.report=False", "--config.optimizer.lr_warmup_updates=0"]
    whole, run = tmp_path / "whole", tmp_path / "run"
    harness.succeed(*flags, f"--run={whole}")
    harness.succeed(*flags, f"--run={run}", "--config.num_steps=2")
    assert "resumed at step 2 of 4" in harness.succeed(*flags, f"--run={run}", "--resume")
    assert harness.metrics(run) == harness.metrics(whole) and harness.rollouts(run) == harness.rollouts(whole)
    harness.assert_bitwise(harness.checkpoint(run, 4), harness.checkpoint(whole, 4))
    rows = [json.loads((x / "summary.json").read_text())["tasks"] for x in (run, whole)]
    assert rows[0] == rows[1] and list(rows[0]) == ["automata", "differences", "sums", "group vote", "overall"]
    for name in ("sums", "automata"):
        said = harness.succeed(f"--run={run}", f"--policy={name}", "--num_prompts=4", "--num_samples=2",
                               module="experiments.evaluate")  # fmt: skip
        assert f"evaluation-4-{name}.json" in said
    done = harness.run(f"--run={run}", module="experiments.evaluate")
    assert done.code == 1 and "say which policy" in done.output


class Spells:
    """A tokenizer whose token i writes the i-th of some letters."""

    def __init__(self, letters):
        self.letters = letters

    def decode(self, ids):
        return "".join(self.letters[i] for i in ids)


class Numbers:
    """The answer to a draw is its number."""

    names, verifiers = ("numbers",), ("rl_reason.tasks.math_answer:compute_score",)
    fingerprint, num_examples = "numbers", None

    def example(self, uid):
        problem = Problem("numbers", 0, {"ground_truth": str(uid), "extra_info": None})
        return Example("numbers", uid, "", problem, None, str(uid), self.verifiers[0], 0)


def test_answers_of_two_tokenizers_are_compared_as_texts():
    # Two samples of each of two policies for draws 7 and 1. Draw 7: a says 7 and 1, b says 7.0 and nothing: classes 0 1 and
    # 0 -1, if classes are numbered by their first row. Draw 1: all four say 1. Token 2 writes "7" for a and "1" for b.
    letters = {"a": ["", "####", "7", "1", ".", "0", "?"], "b": ["", "####", "1", ".", "0", "7", "?"]}
    said = {"a": ["7", "1", "1", "1"], "b": ["7.0", "?", "1", "1"]}
    rows = {}
    for name, texts in said.items():
        ids = [[1, *map(letters[name].index, text), 0, 0, 0][:4] if text != "?" else [6, 0, 0, 0] for text in texts]
        rows[name] = np.array(ids), np.array(ids) > 0
    tokenizers = {name: Spells(own) for name, own in letters.items()}
    with VerifierPool(1, 20.0) as pool:
        verifier = rewards.CohortVerifier(Numbers(), tokenizers, pool, answer_rule="equivalence", samples=2)
        found = verifier(rows, np.array([7, 7, 1, 1]))
    assert found["a"][0].tolist() == [1.0, 0.0, 1.0, 1.0] and found["a"][1].all()
    assert found["b"][0].tolist() == [1.0, 0.0, 1.0, 1.0] and found["b"][1].all()
    assert found["a"][2].tolist() == [0, 1, 0, 0]
    assert found["b"][2].tolist() == [0, -1, 0, 0]


@pytest.mark.slow
def test_policies_of_two_tokenizers_run(tmp_path):
    """Verifiers on the host; one policy reads and writes a tokenizer whose ids are others."""
    model = tmp_path / "other.model"
    model.write_bytes(build_tokenizer.build(names=reversed(TASKS)))
    assert SentencePieceTokenizer.load(model).encode("add 1") != SentencePieceTokenizer.load().encode("add 1")
    file, run = tmp_path / "two_tokenizers.py", tmp_path / "run"
    file.write_text(
        "from configs import rlccf\n\n\ndef get_config(arg=''):\n    config = rlccf.get_config('smoke')\n"
        f"    config.cohort.sums.tokenizer = '{model}'\n    config.verify = 'split'\n"
        "    config.answer_rule = 'equivalence'\n    return config\n"
    )
    harness.succeed(f"--config={file}", f"--run={run}", "--config.log.report=False")
    rows = harness.metrics(run)
    assert [row["step"] for row in rows] == [1, 2, 3, 4] and all(row["reward/error_fraction"] == 0 for row in rows)
    assert all("cohort/labelled_fraction" in row for row in rows)
    inputs = {record["input"] for drawn in harness.rollouts(run).values() for record in drawn}
    assert all(text.split()[0] in ("add", "sub", "dfa") for text in inputs)

"""pass@k, maj@k and their intervals by hand and by counting; then one tiny run, evaluated in every way there is."""

import itertools
import json
import math
import pathlib
import shutil

import jax
import numpy as np
import pytest

from experiments import evaluate as cli
from rl_reason import build, evaluate
from rl_reason.checkpoint import CheckpointError, Checkpoints
from rl_reason.data.example import Example
from rl_reason.evaluate import Answered
from rl_reason.report.rundir import RunError, open_run
from rl_reason.tasks.base import Problem
from tests.support import load_config

NAN = math.nan
# The command line imports modules whose hints beartype would have spelled otherwise.
pytestmark = pytest.mark.filterwarnings("ignore::beartype.roar.BeartypeDecorHintPep585DeprecationWarning")


def answered(answers, correct, *, verifier="add", source="add", level=1) -> Answered:
    example = Example(source, 0, "1+1=", Problem(source, level, {}), None, None, verifier, 0)
    texts = tuple(f"####{a}" for a in answers)
    return Answered(example, texts, tuple(answers), tuple(correct), (False,) * len(texts), (3,) * len(texts))


@pytest.mark.parametrize("right", range(7))
@pytest.mark.parametrize("k", range(1, 7))
def test_pass_at_k_counts_the_subsets_with_a_right_answer(right, k):
    correct = [1.0] * right + [0.0] * (6 - right)
    subsets = list(itertools.combinations(correct, k))
    assert evaluate.pass_at_k(correct, k) == pytest.approx(sum(max(s) for s in subsets) / len(subsets))


def test_pass_at_k_leaves_out_failed_verdicts():
    assert evaluate.pass_at_k([1.0, NAN, 0.0], 1) == 0.5
    assert evaluate.pass_at_k([1.0, NAN, 0.0], 2) == 1.0
    assert math.isnan(evaluate.pass_at_k([1.0, NAN, 0.0], 3))


@pytest.mark.parametrize(
    ("answers", "correct", "expected"),
    [
        (["7", "8", "7"], [1.0, 0.0, 1.0], 1.0),
        (["8", "7", "8"], [0.0, 1.0, 0.0], 0.0),
        (["7", "8"], [1.0, 0.0], 1.0),  # a tie: the first seen
        (["8", "7"], [0.0, 1.0], 0.0),
        ([None, None, "7"], [0.0, 0.0, 1.0], 1.0),  # what did not parse has no vote
        ([None, None], [0.0, 0.0], 0.0),
        (["7", "7"], [NAN, 1.0], 1.0),  # the verifier failed on one of two equal answers
        (["7", "7"], [NAN, NAN], NAN),
    ],
)
def test_majority(answers, correct, expected):
    np.testing.assert_equal(evaluate.majority(answered(answers, correct)), expected)


def test_majority_without_a_mark_says_nothing_of_a_verifier_of_ones_own():
    assert math.isnan(evaluate.majority(answered([None], [1.0], verifier="mine:compute_score")))


def test_majority_of_fewer_samples_is_the_mean_over_subsets():
    answers, correct = ["7", "8", "8", "7", "7", "9"], [1.0, 0.0, 0.0, 1.0, 1.0, 0.0]
    whole = [
        evaluate.majority(answered([answers[i] for i in s], [correct[i] for i in s]))
        for s in itertools.combinations(range(6), 3)
    ]
    drawn = evaluate.majority(answered(answers, correct), 3)
    spread = np.std(whole) / math.sqrt(evaluate.MAJORITY_DRAWS)
    assert drawn == pytest.approx(np.mean(whole), abs=4 * spread)
    assert evaluate.majority(answered(answers, correct), 1) == pytest.approx(0.5, abs=4 * spread)


def test_bootstrap_covers_the_mean_about_as_often_as_it_says():
    rng, hits = np.random.default_rng(0), 0
    for trial in range(200):
        estimate = evaluate.bootstrap(rng.binomial(1, 0.3, 80).astype(float), seed=trial)
        assert estimate.low <= estimate.value <= estimate.high
        hits += estimate.low <= 0.3 <= estimate.high
    assert 0.88 <= hits / 200 <= 0.99  # 95% less what a percentile bootstrap loses on 80 outcomes


def test_bootstrap_of_nothing_and_of_failed_verdicts():
    assert all(map(math.isnan, evaluate.bootstrap(np.array([NAN]))))
    assert evaluate.bootstrap(np.array([1.0, NAN, 1.0])) == (1.0, 1.0, 1.0)


def test_table_has_tasks_levels_and_overall_in_order():
    rows = [answered(["1"] * 3, [1.0, 0.0, 0.0], level=level) for level in (10, 2)]
    rows.append(answered(["1"] * 3, [1.0, 1.0, 1.0], source="sort", verifier="sort"))
    table = evaluate.table(rows)
    assert list(table) == ["add", "add/level_2", "add/level_10", "sort", "sort/level_1", "overall"]
    assert table["add"]["pass@1"]["value"] == pytest.approx(1 / 3)
    assert table["overall"]["pass@1"]["value"] == pytest.approx(5 / 9)
    assert {k for k in table["add"] if "@" in k} == {"pass@1", "pass@2", "pass@3", "maj@2", "maj@3"}
    assert evaluate.table([]) == {}


def test_record_survives_json(tiny_run):
    source = tiny_run.source
    before = Answered(source.example(2), ("a", "b"), (None, "4"), (NAN, 1.0), (True, False), (9, 4))
    record = json.loads(json.dumps(evaluate.to_record(before)).replace("NaN", "null"))
    after = evaluate.from_record(record, source, 2)
    np.testing.assert_equal(after.correct, before.correct)
    assert (after.completions, after.answers, after.truncated) == (
        before.completions,
        before.answers,
        before.truncated,
    )
    assert after.example == before.example
    assert evaluate.from_record({k: v for k, v in record.items() if k != "num_tokens"}, source, 2).num_tokens == ()


class TinyRun:
    """A run directory as a run of no steps would leave it: a config, and a checkpoint of random weights."""

    def __init__(self, root: pathlib.Path):
        config = load_config("clipcov")
        config.rollout.update(completion_len=10, num_slots=8)
        config.evaluation.num_slots = 8
        config.model.update(num_layers=1, hidden_size=16, num_heads=2, num_kv_heads=1, head_dim=8, mlp_size=16)
        config.verifier.num_workers = 1
        self.path = open_run(config.to_dict(), config_name="tiny", run=str(root / "tiny")).path
        experiment = build.build(config)
        self.source, self.params = experiment.heldout, build.init_params(experiment)
        state = build.init_state(experiment, experiment.parts, self.params)
        checkpoints = Checkpoints(self.path / "checkpoints", keep=3)
        for step in (2, 4):
            checkpoints.save(step, (state, None), {})
        checkpoints.close()

    def evaluate(self, *flags: str) -> int:
        return cli.main([f"--run={self.path}", "--num_samples=2", *flags])

    def read(self, name: str):
        """(evaluation, completions)."""
        lines = (self.path / f"completions-{name}.jsonl").read_text().splitlines()
        return json.loads((self.path / f"evaluation-{name}.json").read_text()), [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory) -> TinyRun:
    return TinyRun(tmp_path_factory.mktemp("runs"))


@pytest.fixture(autouse=True)
def keep_caches(monkeypatch, tmp_path):
    """The command line sets jax's compilation cache; put it back."""
    names = "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"
    before = {name: getattr(jax.config, name) for name in names}
    monkeypatch.setenv("RL_REASON_CACHE", str(before[names[0]] or tmp_path))
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def test_evaluate_prints_and_writes_the_table(tiny_run, capsys):
    assert tiny_run.evaluate("--num_prompts=6") == 0
    record, completions = tiny_run.read("4")
    assert (record["step"], record["num_prompts"], record["num_samples"], record["verified"]) == (4, 6, 2, True)
    assert record["groups"]["overall"]["num_prompts"] == 6
    assert record["groups"]["overall"]["error_fraction"] == 0
    assert len(completions) == 12
    assert sum(row["num_tokens"] for row in completions) == record["tokens"]
    assert [row["input"] for row in completions[::2]] == [tiny_run.source.example(uid).prompt for uid in range(6)]
    printed = capsys.readouterr().out
    assert "pass@1" in printed and "overall" in printed and "evaluation-4.json" in printed
    assert "\x1b" not in printed
    assert max(map(len, printed.split("evaluation-4.json")[0].splitlines()[:-1])) <= 100

    # What is drawn for a prompt does not depend on how many are drawn at a time.
    assert tiny_run.evaluate("--num_prompts=6", "--prompts_per_call=4", "--step=2", "--name=pieces") == 0
    again, same = tiny_run.read("2-pieces")
    assert [row["output"] for row in same] == [row["output"] for row in completions]
    assert again["groups"] == record["groups"]


def test_evaluate_on_other_tasks_and_greedily(tiny_run):
    assert tiny_run.evaluate("--tasks=rev,sub", "--levels=1,2", "--num_prompts=5", "--temperature=0") == 0
    record, completions = tiny_run.read("4-rev-sub")
    assert {row["data_source"] for row in completions} == {"rev", "sub"}
    assert {row["level"] for row in completions} <= {1, 2}
    assert record["sampling"]["temperature"] == 0
    assert all(a["output"] == b["output"] for a, b in zip(completions[::2], completions[1::2], strict=True))


def test_evaluate_on_a_file_with_and_without_a_verifier(tiny_run, tmp_path, capsys):
    long = "what is two and two, said at far greater length than any prompt that it was trained on"
    rows = [{"prompt": "1+1=", "answer": "2"}, {"prompt": long, "answer": "4"}, {"prompt": "3+3=", "answer": "6"}]
    file = tmp_path / "asked.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert tiny_run.evaluate(f"--prompts={file}") == 0
    assert "not verified" in capsys.readouterr().out
    record, completions = tiny_run.read("4-asked")
    assert (record["verified"], record["groups"], record["num_prompts"]) == (False, {}, 3)
    assert [row["input"] for row in completions[::2]] == [row["prompt"] for row in rows]
    assert all(row["score"] is None for row in completions)

    assert tiny_run.evaluate(f"--prompts={file}", "--verifier=tests.data.fake_verifiers:exact", "--name=judged") == 0
    record, completions = tiny_run.read("4-judged")
    assert record["verified"] and record["groups"]["overall"]["error_fraction"] == 0
    assert record["groups"]["overall"]["pass@1"]["value"] == np.mean([row["score"] for row in completions])
    assert [row["gts"] for row in completions[::2]] == ["2", "4", "6"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--step=3"], "it has 2, 4"),
        (["--tasks=ad"], "did you mean add"),
        (["--tasks=add", "--levels=99"], "99"),
        (["--prompts=nowhere.jsonl"], "--prompts: no file"),
        (["--temperature=-1"], "want temperature >= 0"),
    ],
)
def test_evaluate_refuses_with_the_cure(tiny_run, capsys, flags, said):
    assert tiny_run.evaluate(*flags) == 1
    assert said in capsys.readouterr().err


def test_evaluate_names_runs_that_are_not_there_or_older(tiny_run, tmp_path, capsys):
    assert cli.main([f"--run={tiny_run.path.parent / 'tinny'}"]) == 1
    assert "tiny" in capsys.readouterr().err
    older = shutil.copytree(tiny_run.path, tmp_path / "older")
    config = json.loads((older / "config.json").read_text())
    del config["model"]["rope_theta"], config["mesh"]
    (older / "config.json").write_text(json.dumps(config))
    with pytest.raises(RunError, match=r"model\.rope_theta \(now 10000\.0\)") as error:
        cli.config_of(older)
    assert "mesh" in str(error.value)
    config = json.loads((tiny_run.path / "config.json").read_text())
    config["model"]["hidden_size"] = 32
    (older / "config.json").write_text(json.dumps(config))
    assert cli.main([f"--run={older}"]) == 1
    assert "does not fit the model" in capsys.readouterr().err
    shutil.rmtree(older / "checkpoints")
    assert cli.main([f"--run={older}"]) == 1
    assert "no complete checkpoint" in capsys.readouterr().err


def test_restore_policy_gives_the_saved_parameters_alone(tiny_run):
    setup = evaluate.setup_of(cli.config_of(tiny_run.path))
    step, params = evaluate.restore_policy(tiny_run.path / "checkpoints", setup, 2)
    assert step == 2
    jax.tree.map(np.testing.assert_array_equal, params, tiny_run.params)
    with pytest.raises(CheckpointError):
        evaluate.restore_policy(tiny_run.path / "checkpoints", setup, 7)


def test_columns_keep_the_ends():
    assert cli.columns_of(64, 6) == ["pass@1", "pass@8", "pass@16", "pass@32", "pass@64", "maj@64"]
    assert cli.columns_of(2, 6) == ["pass@1", "pass@2", "maj@2"]

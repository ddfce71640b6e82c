"""What a user can get wrong: one message that starts "error:" and names the cure, no traceback, exit code 1."""

import concurrent.futures
import json
import pathlib

import pytest

from experiments.config_files import known
from tests.e2e import harness

CLIPCOV = "--config=clipcov.py:smoke"

# What is asked for, and what the message must say.
MISTAKES = {
    "no config": ([], ["--config=NAME.py", *known()]),
    "unknown config": (["--config=clipcof.py"], ["clipcof.py", "Did you mean clipcov.py?", *known()]),
    "unknown variant": (["--config=clipcov.py:smok"], ["no variant 'smok'", "smoke"]),
    "unknown flag": ([CLIPCOV, "--resum"], ["resum"]),
    "stray word": ([CLIPCOV, "resume"], ["unexpected 'resume'"]),
    "unknown section": ([CLIPCOV, "--config.batchh.x=1"], ["--config.batchh.x=1", "batchh", 'Did you mean "batch"']),
    "unknown key": ([CLIPCOV, "--config.batch.group_sise=4"], ["group_sise", 'Did you mean "group_size"']),
    "far from any key": ([CLIPCOV, "--config.qqq=4"], ["no key 'qqq'", "configs/base.py"]),
    "unknown hyperparameter": ([CLIPCOV, "--config.objective.clip_cov_ration=4"], ['Did you mean "clip_cov_ratio"']),
    "wrong type": ([CLIPCOV, "--config.batch.group_size=two"], ["config.batch.group_size", "two"]),
    "fraction for a count": ([CLIPCOV, "--config.num_steps=2.5"], ["config.num_steps", "2.5"]),
    "batch does not divide": (
        [CLIPCOV, "--config.batch.minibatches=3"],
        ["prompts_per_step=8 / minibatches=3 = 2.66667 prompts", "Derived:", "8 x 4 = 32 rows"],
    ),
    "microbatch does not divide": (
        [CLIPCOV, "--config.batch.microbatch_rows=5"],
        ["16 rows a minibatch / microbatch_rows=5 = 3.2 microbatches", "Derived:"],
    ),
    "steps off the chunk": ([CLIPCOV, "--config.num_steps=5"], ["num_steps=5", "steps_per_call=2", "4 or 6"]),
    "checkpoints off the chunk": ([CLIPCOV, "--config.checkpoint.every=3"], ["checkpoint.every=3", "2 or 4"]),
    "unknown task": ([CLIPCOV, "--config.data.tasks=('ad',)"], ["ad", "add"]),
    "unknown slot function": ([CLIPCOV, "--config.objective.fn=clip_cov.objectiv"], ["Did you mean 'objective'?"]),
    "another slot's arguments": ([CLIPCOV, "--config.objective.fn=grpo.objective"], ["missing", "dual_clip_ratio"]),
    "unknown mode": (
        [CLIPCOV, "--config.verify=grap"],
        ["config.verify='grap'", "graph, callback, split, overlapped"],
    ),
    "mesh too large": ([CLIPCOV, "--config.mesh.data=3"], ["mesh(data=3", "1 devices"]),
    "prompt too long": (
        [CLIPCOV, "--config.data.max_prompt_len_tokens=4", "--config.warmup.num_steps=0"],
        ["data.max_prompt_len_tokens is 4", "Raise it"],
    ),
    "no such file": (
        [harness.FILES, "--config.data.files=('nowhere.jsonl',)"],
        ["nowhere.jsonl"],
    ),
    "no such verifier": (
        [harness.FILES, "--config.data.files=('{rows}',)", "--config.data.verifier=tests.e2e.verifiers:coyn"],
        ["coyn", "module:compute_score"],
    ),
    "malformed row": ([harness.FILES, "--config.data.files=('{torn}',)"], ["torn.jsonl:3", "data.on_bad_row"]),
    "resume of nothing": ([CLIPCOV, "--resume"], ["holds no run"]),
}


# One mistake of a kind is always made; these are others of the same kind, or have a unit test.
MORE = (
    *("unknown variant", "unknown section", "far from any key", "fraction for a count", "microbatch does not divide"),
    *("checkpoints off the chunk", "unknown mode", "unknown task", "no such file", "another slot's arguments"),
)


@pytest.fixture(scope="module")
def answers(request, tmp_path_factory) -> dict[str, harness.Done]:
    """The mistakes that are asked for, two at a time."""
    selected = {item.callspec.params.get("name") for item in request.session.items if hasattr(item, "callspec")}
    where = tmp_path_factory.mktemp("mistakes")
    rows, torn = where / "rows.jsonl", where / "torn.jsonl"
    harness.write_rows(rows, ["1"] * 8)
    torn.write_text("".join(rows.read_text().splitlines(keepends=True)[:2]) + '{"prompt": \n')

    def ask(case: tuple[str, tuple]) -> tuple[str, harness.Done]:
        name, (flags, _) = case
        flags = [flag.format(rows=rows, torn=torn) if "data.files" in flag else flag for flag in flags]
        return name, harness.run(*flags, f"--run={where / name.replace(' ', '-')}")

    with concurrent.futures.ThreadPoolExecutor(2) as two:
        return dict(two.map(ask, ((name, case) for name, case in MISTAKES.items() if name in selected)))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in MORE else name for name in MISTAKES]
)
def test_a_mistake_is_one_line_that_names_the_cure(name, answers):
    code, output = answers[name]
    last = output.strip().splitlines()[-1]
    assert code == 1, output
    assert last.startswith("error: ") and output.count("error:") == 1, output
    assert "Traceback" not in output
    for words in MISTAKES[name][1]:
        assert words in last, output


def test_a_hyperparameter_that_the_config_leaves_out(tmp_path):
    config = tmp_path / "mine.py"
    config.write_text(
        "from configs import clipcov\n\n\ndef get_config(arg=''):\n    config = clipcov.get_config('smoke')\n"
        "    del config.objective.clip_cov_low\n    return config\n"
    )
    done = harness.run(f"--config={config}", f"--run={tmp_path / 'run'}")
    assert done.code == 1 and "Traceback" not in done.output
    for words in ("error: config.objective", "clip_cov.objective", "missing ['clip_cov_low']", "no defaults in code"):
        assert words in done.output, done.output


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> pathlib.Path:
    """A run of two steps."""
    run = tmp_path_factory.mktemp("finished") / "run"
    harness.succeed(harness.TINY, "--config.num_steps=2", "--config.checkpoint.every=0", f"--run={run}")
    return run


def test_a_directory_that_holds_a_run_is_refused(finished):
    done = harness.run(harness.TINY, f"--run={finished}")
    assert done.code == 1 and "Traceback" not in done.output
    assert f"error: {finished} already holds a run." in done.output and "--resume" in done.output


def test_another_config_is_shown_as_a_diff(finished):
    before = (finished / "config.json").read_bytes()
    asked = ["--config.num_steps=2", "--config.checkpoint.every=0", "--config.optimizer.b1=0.5"]
    done = harness.run(harness.TINY, *asked, f"--run={finished}", "--resume")
    assert done.code == 1 and "Traceback" not in done.output
    assert "error: " in done.output and "optimizer.b1  0.9 -> 0.5" in done.output
    assert "--config.optimizer.b1=0.9" in done.output
    assert (finished / "config.json").read_bytes() == before


def test_a_damaged_checkpoint_is_said_to_be_one(finished, tmp_path):
    """Resuming a finished run changes no metrics; without its arrays there is nothing to resume."""
    rows = harness.metrics(finished)
    flags = ["--config.num_steps=2", "--config.checkpoint.every=0", f"--run={finished}", "--resume"]
    assert "resumed at step 2 of 2" in harness.succeed(harness.TINY, *flags)
    assert harness.metrics(finished) == rows
    for file in (finished / "checkpoints" / "step_2" / "state").rglob("manifest.ocdbt"):
        file.unlink()
    done = harness.run(harness.TINY, *flags)
    assert done.code == 1 and "error: Checkpoint 2 of" in done.output, done.output


@pytest.mark.parametrize("mode", ["split", pytest.param("callback", marks=pytest.mark.slow)])
def test_broken_verifiers_cost_their_rows_and_nothing_else(tmp_path, mode):
    """Verifiers that raise, hang, die or answer NaN: the run goes on, the rows are counted and teach nothing."""
    run = tmp_path / "run"
    data = harness.write_rows(tmp_path / "rows.jsonl", ["1", "raise", "hang", "1", "nan", "die"] * 4)
    output = harness.succeed(
        harness.FILES,
        data,
        f"--run={run}",
        "--config.data.verifier=tests.e2e.verifiers:broken",
        f"--config.verify={mode}",
        "--config.verifier.deadline_s=0.5",
        "--config.num_steps=4",
        "--config.checkpoint.every=0",
    )
    assert "warning: a verifier failed:" in output and "Traceback" not in output
    rows = harness.metrics(run)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    gts = {
        (record["gts"], record["score"] is None) for records in harness.rollouts(run).values() for record in records
    }
    assert gts == {("1", False), ("raise", True), ("hang", True), ("nan", True), ("die", True)}
    for row in rows:
        failed = [record["score"] is None for record in harness.rollouts(run)[row["step"]]]
        assert row["reward/error_fraction"] == pytest.approx(sum(failed) / len(failed))
        assert row["actor/skipped_updates"] == 0 and row["actor/grad_norm"] is not None
    assert any(row["reward/error_fraction"] > 0 for row in rows)
    assert json.loads((run / "summary.json").read_text())["wall_seconds"] > 0

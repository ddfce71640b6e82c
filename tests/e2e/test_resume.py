"""A run that was stopped, by whatever and whenever, ends as the run that was not: bit for bit, row for row."""

import functools
import itertools
import json
import pathlib
import random
import shutil
import signal
import time

import jax
import pytest

from rl_reason.data.sentencepiece_tokenizer import EMBEDDED, SentencePieceTokenizer
from rl_reason.models import hf_export
from tests.e2e import harness
from tests.unit.test_hf_weights import params_of, tiny

STEPS = 40
MODES = ("graph", "split", "overlapped")


def flags_of(mode: str, data: str) -> list[str]:
    """A tiny run whose verdicts come from the program, or from worker processes."""
    return [harness.TINY] if mode == "graph" else [harness.FILES, data, f"--config.verify={mode}"]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, data):
    """The directory of a mode's whole run; each is made once."""

    @functools.cache
    def make(mode: str) -> pathlib.Path:
        run = tmp_path_factory.mktemp("whole") / mode
        harness.succeed(*flags_of(mode, data), f"--run={run}")
        return run

    return make


def assert_same_run(run: pathlib.Path, whole: pathlib.Path) -> None:
    """Parameters, optimizer, statistics, iterator, metrics, rollouts and events of two finished runs."""
    assert harness.metrics(run) == harness.metrics(whole)
    assert [row["step"] for row in harness.metrics(run)] == list(range(1, STEPS + 1))
    assert harness.tensorboard_steps(run, "actor/entropy") == list(range(1, STEPS + 1))
    assert harness.rollouts(run) == harness.rollouts(whole)
    assert sorted(harness.rollouts(run)) == list(range(1, STEPS + 1))
    assert harness.extra(run, STEPS)["stream"] == harness.extra(whole, STEPS)["stream"]
    harness.assert_bitwise(harness.checkpoint(run, STEPS), harness.checkpoint(whole, STEPS))


def assert_learning(run: pathlib.Path) -> None:
    """Equal runs say little when nothing moves."""
    assert all(row["actor/grad_norm"] > 0 for row in harness.metrics(run))


def test_n_and_n_steps_are_2n(tmp_path, uninterrupted, data):
    """Half the steps, then --resume with twice as many asked for."""
    run = tmp_path / "run"
    whole = uninterrupted("graph")
    assert_learning(whole)
    harness.succeed(harness.TINY, f"--run={run}", f"--config.num_steps={STEPS // 2}")
    assert harness.checkpoint_steps(run)[-1] == STEPS // 2
    output = harness.succeed(harness.TINY, f"--run={run}", "--resume")
    assert f"resumed at step {STEPS // 2} of {STEPS}" in output
    assert_same_run(run, whole)


@pytest.mark.parametrize(
    "mode, number", [pytest.param("split", signal.SIGTERM, marks=pytest.mark.slow), ("overlapped", signal.SIGINT)]
)
def test_a_signal_saves_at_the_next_chunk_and_resumes(tmp_path, uninterrupted, data, mode, number):
    run = tmp_path / "run"
    whole = uninterrupted(mode)
    assert_learning(whole)
    with harness.running(*flags_of(mode, data), f"--run={run}", "--config.checkpoint.every=0") as process:
        assert harness.wait_for(lambda: harness.num_lines(run / "metrics.jsonl"), process)
        process.send_signal(number)
        done = harness.finish(process)
    assert done.code == 0, done.output
    assert f"{number.name}: saving at the next chunk boundary" in done.output
    (step,) = harness.checkpoint_steps(run)
    assert 0 < step < STEPS and step % 2 == 0
    assert f"stopped at step {step} of {STEPS}, saved; go on with --run={run} --resume" in done.output
    assert "Traceback" not in done.output
    harness.succeed(*flags_of(mode, data), f"--run={run}", "--resume")
    assert_same_run(run, whole)


def test_overlapped_shows_that_it_is_off_policy(uninterrupted):
    """Its first batch is on policy, the others were drawn with the weights of a step before."""
    drift = [row["rollout_corr/abs_diff_mean"] for row in harness.metrics(uninterrupted("overlapped"))]
    live = [row["rollout_corr/abs_diff_mean"] for row in harness.metrics(uninterrupted("split"))]
    assert drift[0] < 1e-5 and min(drift[5:]) > 10 * max(live)


def before_the_first_checkpoint(run: pathlib.Path) -> bool:
    return harness.num_lines(run / "metrics.jsonl") >= 2


def mid_save(run: pathlib.Path) -> bool:
    """A checkpoint is being written."""
    return any("tmp" in path.name for path in (run / "checkpoints").glob("*"))


def after_a_checkpoint(run: pathlib.Path) -> bool:
    return bool(harness.checkpoint_steps(run)) and harness.num_lines(run / "metrics.jsonl") % 10 > 2


def test_kill_9_leaves_no_trace(tmp_path, uninterrupted):
    """Killed before its first checkpoint, in the middle of a save, and after one; each time resumed."""
    run, killed = tmp_path / "run", []
    for moment in (before_the_first_checkpoint, mid_save, after_a_checkpoint):
        resume = ["--resume"] if killed else []
        with harness.running(harness.TINY, f"--run={run}", *resume) as process:
            if harness.wait_for(lambda moment=moment: moment(run), process):
                harness.kill(process)
                killed.append(moment.__name__)
    assert len(killed) >= 2, killed
    harness.succeed(harness.TINY, f"--run={run}", "--resume")
    assert_same_run(run, uninterrupted("graph"))


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_kill_9_at_random_moments(tmp_path, uninterrupted, data, mode):
    """A dozen kills, most of them while steps run and save."""
    rng, run = random.Random(mode), tmp_path / "run"
    flags = [*flags_of(mode, data), f"--run={run}", "--config.checkpoint.every=2"]
    for attempt in range(12):
        resume = ["--resume"] if (run / "config.json").exists() else []
        with harness.running(*flags, *resume) as process:
            before = harness.num_lines(run / "metrics.jsonl")
            begun = lambda before=before: harness.num_lines(run / "metrics.jsonl") != before
            if attempt % 4 and not harness.wait_for(begun, process):
                break
            time.sleep(rng.uniform(0, 0.3 if attempt % 4 else 6))
            harness.kill(process)
    harness.succeed(*flags, "--resume")
    assert_same_run(run, uninterrupted(mode))


@pytest.mark.slow
def test_an_interrupted_warm_up(tmp_path):
    """SIGTERM and kill -9 while it runs: it begins again; a damaged entry of its cache is made again."""
    cache = tmp_path / "cache"
    shared = pathlib.Path(harness.environment().get("RL_REASON_CACHE", "~/.cache/rl_reason")).expanduser() / "compiled"
    shared.mkdir(parents=True, exist_ok=True)
    cache.mkdir()
    (cache / "compiled").symlink_to(shared.absolute())
    env = harness.environment(RL_REASON_CACHE=str(cache))
    flags = [harness.TINY, "--config.num_steps=2", "--config.checkpoint.every=0", "--config.warmup.num_steps=400"]
    first, second = tmp_path / "first", tmp_path / "second"

    with harness.running(*flags, f"--run={first}", env=env) as process:
        assert harness.wait_for(lambda: harness.num_lines(first / "warmup.jsonl"), process)
        process.send_signal(signal.SIGTERM)
        done = harness.finish(process)
    assert done.code == 0 and "stopped at warm-up step" in done.output, done.output
    assert f"begin again with --run={first} --resume" in done.output

    with harness.running(*flags, f"--run={first}", "--resume", env=env) as process:
        assert harness.wait_for(lambda: harness.num_lines(first / "warmup.jsonl") > 4, process)
        harness.kill(process)
    assert not list((cache / "warmup").glob("*")) or "tmp" in next((cache / "warmup").glob("*")).name

    output = harness.succeed(*flags, f"--run={first}", "--resume", env=env)
    assert "read from the cache" not in output
    steps = [row["step"] for row in harness.lines(first / "warmup.jsonl")]
    assert steps == list(range(2, 401, 2))

    (entry,) = [path for path in (cache / "warmup").iterdir() if "tmp" not in path.name]
    for file in itertools.islice((path for path in (entry / "d").iterdir() if path.is_file()), 1):
        file.write_bytes(file.read_bytes()[:-100])
    output = harness.succeed(*flags, f"--run={second}", env=env)
    assert "read from the cache" not in output
    harness.assert_bitwise(harness.checkpoint(first, 2), harness.checkpoint(second, 2))
    summary = json.loads((second / "summary.json").read_text())
    assert summary["warmup_seconds"] > 0


def test_too_many_gradients_that_are_not_finite_stop_the_run(tmp_path, data):
    """Rewards that are no numbers: updates are skipped, the run stops and says what to do, its good weights are saved."""
    run = tmp_path / "run"
    limits = [
        "--config.reward.right=inf",
        "--config.reward.wrong=inf",
        "--config.optimizer.max_skipped_in_a_row=6",
        "--config.verify=callback",
    ]
    done = harness.run(harness.FILES, data, f"--run={run}", *limits)
    assert done.code == 1, done.output
    assert "had a non-finite loss or gradient; stopped at step" in done.output and "Traceback" not in done.output
    (step,) = harness.checkpoint_steps(run)
    assert step == 4  # the first chunk boundary with 6 skipped updates, 2 a step
    saved = harness.checkpoint(run, step)
    assert all(map(lambda x: abs(x).max() < 1e6, (x for x in saved.values() if x.dtype.kind == "f")))
    assert sum(row["actor/skipped_updates"] for row in harness.metrics(run)) == 8
    assert "Lower config.optimizer.learning_rate" in done.output
    rate = "--config.optimizer.learning_rate=1e-5"  # which that advice may change
    done = harness.run(harness.FILES, data, f"--run={run}", *limits, rate, "--resume")
    assert done.code == 1 and "stopped at step 6" in done.output, done.output


@pytest.mark.slow
@pytest.mark.parametrize("precompute", [False, True])
def test_a_preference_run(tmp_path, precompute):
    """Half the steps, then --resume: with a reference in the state, or its log-probabilities in the checkpoint."""
    flags = [
        "--config=air.py:smoke",
        f"--config.preference.precompute_reference={precompute}",
        "--config.preference.judge.noise_std=3.0",
        "--config.optimizer.lr_warmup_updates=0",  # a rate that does not hang on the number of steps
        "--config.optimizer.lr_decay=constant",
        "--config.evaluation.num_prompts=0",
        "--config.log.report=False",
    ]
    whole, run = tmp_path / "whole", tmp_path / "run"
    harness.succeed(*flags, f"--run={whole}")
    assert_learning(whole)
    harness.succeed(*flags, f"--run={run}", "--config.num_steps=2")
    output = harness.succeed(*flags, f"--run={run}", "--resume")
    assert "resumed at step 2 of 4" in output and "prompts read from the cache" in output
    assert harness.metrics(run) == harness.metrics(whole)
    assert (run / "pairs.jsonl").read_text() == (whole / "pairs.jsonl").read_text() != ""
    assert harness.extra(run, 4)["stream"] == harness.extra(whole, 4)["stream"]
    harness.assert_bitwise(harness.checkpoint(run, 4), harness.checkpoint(whole, 4))


def test_adapters_go_on_beside_the_checkpoint_that_they_were_put_beside(tmp_path):
    """Of which the run keeps no copy."""
    model = tiny("qwen3", vocab_size=SentencePieceTokenizer.load().vocab_size)
    weights, run, whole = tmp_path / "weights", tmp_path / "run", tmp_path / "whole"
    hf_export.write(weights, params_of(model), model, dtype="float32", files={"tokenizer.model": EMBEDDED})
    flags = [
        harness.TINY,
        f"--config.weights={weights}",
        "--config.lora.rank=2",
        "--config.optimizer.lr_warmup_updates=0",
    ]
    harness.succeed(*flags, "--config.num_steps=4", f"--run={whole}")
    harness.succeed(*flags, "--config.num_steps=2", f"--run={run}")
    assert not (run / "checkpoints/base").exists()
    harness.succeed(*flags, "--config.num_steps=4", f"--run={run}", "--resume")
    assert_learning(whole)
    assert harness.metrics(run) == harness.metrics(whole)
    harness.assert_bitwise(harness.checkpoint(run, 4), harness.checkpoint(whole, 4))
    shutil.rmtree(weights)
    other = jax.tree.map(lambda x: -x, params_of(model))
    hf_export.write(weights, other, model, dtype="float32", files={"tokenizer.model": EMBEDDED})
    ended = harness.run(*flags, "--config.num_steps=6", f"--run={run}", "--resume")
    assert ended.code == 1 and f"error: {weights} has other tensors than when this run began" in ended.output

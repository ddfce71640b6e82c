"""Two processes joined over the loopback interface are one run: same tokens, same weights, written once."""

import functools
import signal

import numpy as np
import pytest

from tests.e2e import harness

STEPS = 24
SIZES = [f"--config.num_steps={STEPS}", "--config.checkpoint.every=0"]
DOUBLE = ["--config.model.dtype=float64", "--config.model.param_dtype=float64"]


def flags_of(mode: str, data: str) -> list[str]:
    mine = [harness.TINY] if mode == "graph" else [harness.FILES, data, f"--config.verify={mode}"]
    return [*mine, *SIZES, *DOUBLE]


@pytest.fixture(scope="module")
def alone(tmp_path_factory, data):
    """One process's run, by mode."""

    @functools.cache
    def make(mode: str):
        run = tmp_path_factory.mktemp("alone") / mode
        harness.succeed(*flags_of(mode, data), f"--run={run}")
        return run

    return make


def assert_same_run(run, alone) -> None:
    """Identical tokens and verdicts, parameters and moments to rounding, each row written once."""
    tokens = lambda path: {
        step: [(row["group_id"], row["sample_id"], row["token_ids"], row["score"]) for row in rows]
        for step, rows in harness.rollouts(path).items()
    }
    assert tokens(run) == tokens(alone)
    assert [row["step"] for row in harness.metrics(run)] == list(range(1, STEPS + 1))
    assert all(row["actor/grad_norm"] > 0 for row in harness.metrics(alone))
    ours, expected = harness.checkpoint(run, STEPS), harness.checkpoint(alone, STEPS)
    assert ours.keys() == expected.keys()
    for name in expected:
        if ".params" in name or ".opt_state" in name:
            assert expected[name].dtype in (np.float64, np.int32), name
            np.testing.assert_allclose(ours[name], expected[name], rtol=0, atol=1e-10, err_msg=name)


@pytest.mark.parametrize("mode", ["callback", pytest.param("graph", marks=pytest.mark.slow)])
def test_two_processes_train_as_one_does(tmp_path, alone, data, mode):
    run = tmp_path / "run"
    with harness.together(2, *flags_of(mode, data), f"--run={run}") as both:
        first, second = (harness.finish(process) for process in both)
    assert first.code == 0 and second.code == 0, first.output + second.output
    assert f"[rl] done {STEPS}/{STEPS}" in first.output
    assert "[rl]" not in second.output  # one speaks
    assert_same_run(run, alone(mode))


@pytest.mark.slow
def test_a_signal_to_one_stops_both_at_the_same_step(tmp_path, alone, data):
    """The second process alone hears SIGTERM; resumed, the run ends as if nothing had been."""
    run = tmp_path / "run"
    flags = [*flags_of("split", data), f"--run={run}"]
    with harness.together(2, *flags) as both:
        assert harness.wait_for(lambda: harness.num_lines(run / "metrics.jsonl"), both[0])
        both[1].send_signal(signal.SIGTERM)
        first, second = (harness.finish(process) for process in both)
    assert first.code == 0 and second.code == 0, first.output + second.output
    (step,) = harness.checkpoint_steps(run)
    assert 0 < step < STEPS
    assert f"stopped at step {step} of {STEPS}, saved" in first.output
    with harness.together(2, *flags, "--resume") as both:
        first, second = (harness.finish(process) for process in both)
    assert first.code == 0 and second.code == 0, first.output + second.output
    assert_same_run(run, alone("split"))


@pytest.mark.slow
def test_two_processes_evaluate_as_one_does(alone):
    """The same samples and verdicts, of which each process asks for its share; the environment says how to join."""
    run = alone("callback")
    flags = [f"--run={run}", "--num_prompts=3", "--num_samples=3"]
    harness.succeed(*flags, "--name=one", module="experiments.evaluate")
    by = dict(JAX_COORDINATOR_ADDRESS=f"127.0.0.1:{harness.free_port()}", JAX_NUM_PROCESSES="2")
    start = lambda number: harness.running(
        *flags,
        "--name=two",
        "--distributed",
        module="experiments.evaluate",
        env=harness.environment(**by, JAX_PROCESS_ID=str(number)),
    )
    with start(0) as first, start(1) as second:
        done = harness.finish(first), harness.finish(second)
    assert [x.code for x in done] == [0, 0], done
    assert "pass@1" in done[0].output and "pass@1" not in done[1].output
    completions = harness.lines(run / f"completions-{STEPS}-one.jsonl")
    assert completions == harness.lines(run / f"completions-{STEPS}-two.jsonl")
    assert len(completions) == 9 and {row["score"] for row in completions} == {0.0, 1.0}


def test_distributed_without_a_cluster_says_what_to_set(tmp_path):
    done = harness.run(harness.TINY, f"--run={tmp_path / 'run'}", "--distributed")
    last = done.output.strip().splitlines()[-1]
    assert done.code == 1 and last.startswith("error: --distributed"), done.output
    assert "JAX_COORDINATOR_ADDRESS=HOST:PORT" in last and "Traceback" not in done.output
    assert not (tmp_path / "run").exists()


def test_whoever_is_not_there_in_time_is_named(tmp_path):
    """Process 0; jax itself would abort, after minutes."""
    address = f"127.0.0.1:{harness.free_port()}"
    by = [f"--coordinator={address}", "--num_processes=2", "--process_id=1", "--join_timeout_s=1"]
    done = harness.run(harness.TINY, f"--run={tmp_path / 'run'}", *by)
    assert done.code == 1, done.output
    assert f"error: process 1 of 2 cannot reach process 0 at {address}" in done.output
    assert "Traceback" not in done.output and "Check failure" not in done.output
    assert not (tmp_path / "run").exists()

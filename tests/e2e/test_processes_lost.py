"""A process that is gone stops the others within a minute, with words; the run goes on, on any number of processes."""

import pathlib
import re
import signal
import subprocess
import time

import pytest

from tests.e2e import harness
from tests.e2e.test_processes import assert_same_run, flags_of

pytestmark = pytest.mark.slow

MINUTE = 60.0
FOR_FOUR = ["--config.batch.prompts_per_step=8", "--config.batch.generated_prompts=8"]  # to cut a minibatch in four


def first_rows(run: pathlib.Path) -> bool:
    return harness.num_lines(run / "metrics.jsonl") >= 2


def compiling(run: pathlib.Path) -> bool:
    """The run has its directory, and no step is done: programs are being compiled."""
    return (run / "checkpoints").exists()


def warming_up(run: pathlib.Path) -> bool:
    return harness.num_lines(run / "warmup.jsonl") >= 1


def saving(run: pathlib.Path) -> bool:
    return any("tmp" in path.name for path in (run / "checkpoints").glob("*"))


def saved(run: pathlib.Path) -> bool:
    return bool(harness.checkpoint_steps(run)) and not saving(run)


def assert_stopped(run: pathlib.Path, dead: int, processes: list[subprocess.Popen]) -> float:
    """All others ended by an error that names the dead one, what was saved, and how to go on; the seconds it took."""
    began = time.monotonic()
    outputs = {number: harness.finish(process) for number, process in enumerate(processes) if number != dead}
    seconds = time.monotonic() - began
    assert seconds < MINUTE
    steps = harness.checkpoint_steps(run)
    kept = f"step {steps[-1]} was saved last" if steps else "nothing was saved yet"
    for number, done in outputs.items():
        said = done.output[done.output.index("error: ") :]
        assert done.code == 1, done.output
        assert re.match(rf"error: process {dead} \(.*, pid {processes[dead].pid}\) is gone without a word", said)
        assert f"In {run} {kept}" in said
        assert f"--process_id={number} --run={run} --resume" in said
        assert "Traceback" not in said and "Check failure" not in said
    return seconds


@pytest.mark.parametrize(
    "count, dead, moment, flags",
    [
        (2, 0, compiling, []),
        (2, 1, warming_up, ["--config.warmup.num_steps=400"]),
        (2, 0, first_rows, []),
        (4, 2, first_rows, FOR_FOUR),
        (2, 1, saving, ["--config.checkpoint.every=2"]),
        (2, 0, saving, ["--config.checkpoint.every=2"]),
    ],
)
def test_a_killed_process_stops_the_others(tmp_path, count, dead, moment, flags):
    run = tmp_path / "run"
    with harness.together(count, harness.TINY, *flags, f"--run={run}") as processes:
        assert harness.wait_for(lambda: moment(run), processes[dead])
        harness.kill(processes[dead])
        print(f"{count} processes, {moment.__name__}: {assert_stopped(run, dead, processes):.1f} s")


def test_a_process_killed_while_verifiers_work(tmp_path):
    """The other one waits on the host, for verdicts that do not come."""
    run = tmp_path / "run"
    rows = harness.write_rows(tmp_path / "rows.jsonl", ["hang"] * 16)
    slow = ["--config.data.verifier=tests.e2e.verifiers:broken", "--config.verifier.deadline_s=1000"]
    with harness.together(2, harness.FILES, rows, *slow, f"--run={run}") as processes:
        assert harness.wait_for(lambda: any_child(processes[0]) and any_child(processes[1]), processes[1])
        harness.kill(processes[1])
        assert_stopped(run, 1, processes)


def any_child(process: subprocess.Popen) -> bool:
    """Verifier workers are started when first needed."""
    tasks = pathlib.Path(f"/proc/{process.pid}/task").glob("*/children")
    return any(path.read_text().strip() for path in tasks)


def test_an_error_in_one_process_stops_the_others_with_its_words(tmp_path):
    """The second is started with another seed."""
    address = f"--coordinator=127.0.0.1:{harness.free_port()}"
    flags = [harness.TINY, f"--run={tmp_path / 'run'}", address, "--num_processes=2"]
    with (
        harness.running(*flags, "--process_id=0") as first,
        harness.running(*flags, "--process_id=1", "--config.seed=7") as second,
    ):
        one, other = harness.finish(first), harness.finish(second)
    assert one.code == other.code == 1
    assert "error: config.seed is 7 here, 0 in process 0" in other.output
    assert "stopped: config.seed is 7 here, 0 in process 0" in one.output
    assert "Traceback" not in one.output + other.output and not (tmp_path / "run").exists()


@pytest.mark.parametrize("mode", ["graph", "overlapped"])
def test_a_run_goes_on_with_other_numbers_of_processes(tmp_path, data, mode):
    """Four processes, one of which is killed; two, one of which hears SIGTERM; then one."""
    flags = [*flags_of(mode, data), *FOR_FOUR]
    alone, run = tmp_path / "alone", tmp_path / "run"
    harness.succeed(*flags, f"--run={alone}")
    flags = [*flags, f"--run={run}", "--config.checkpoint.every=4"]
    with harness.together(4, *flags) as processes:
        assert harness.wait_for(lambda: saved(run), processes[3])
        harness.kill(processes[3])
        assert_stopped(run, 3, processes)
    (*_, four) = harness.checkpoint_steps(run)
    with harness.together(2, *flags, "--resume") as processes:
        assert harness.wait_for(lambda: harness.num_lines(run / "metrics.jsonl") > four, processes[0])
        processes[1].send_signal(signal.SIGTERM)
        first, second = (harness.finish(process) for process in processes)
    assert first.code == second.code == 0, first.output + second.output
    assert f"resumed at step {four}" in first.output
    (*_, two) = harness.checkpoint_steps(run)
    assert two > four and f"stopped at step {two}" in first.output
    assert f"resumed at step {two}" in harness.succeed(*flags, "--resume")
    assert_same_run(run, alone)
    for ours, expected in zip(harness.metrics(run), harness.metrics(alone), strict=True):
        assert ours == pytest.approx(expected, rel=1e-9, abs=1e-9)

"""Runs started as a user starts them, and what they leave behind."""

import contextlib
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
import typing
from collections.abc import Callable, Iterator

import numpy as np
import orbax.checkpoint as ocp

from tests import quick

ROOT = pathlib.Path(__file__).parents[2]
TINY = "--config=tests/e2e/tiny.py"
FILES = "--config=tests/e2e/tiny.py:files"
TIMEOUT_S = 300


class Done(typing.NamedTuple):
    """How a command ended, and all it said."""

    code: int
    output: str


def environment(**changes: str) -> dict[str, str]:
    """Ours, less what the tests' conftest sets: one CPU device, and the user's caches."""
    ours = ("XLA_FLAGS", "NPROC", "JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")
    kept = {name: value for name, value in os.environ.items() if name not in ours}
    return kept | {"JAX_PLATFORMS": "cpu", "COLUMNS": "400", "XLA_FLAGS": quick.XLA_FLAGS} | changes


def start(*flags: str, module: str = "experiments.run", env: dict[str, str] | None = None) -> subprocess.Popen:
    """python -m experiments.run with these flags, not waited for."""
    return subprocess.Popen(
        [sys.executable, "-m", module, *flags],
        cwd=ROOT,
        env=environment() if env is None else env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen) -> Done:
    """Waits; a command that takes minutes is killed and fails the test."""
    try:
        output, _ = process.communicate(timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        output, _ = process.communicate()
        raise AssertionError(f"{process.args} hung:\n{output}") from None
    return Done(process.returncode, output)


def run(*flags: str, **options) -> Done:
    """Starts and waits."""
    return finish(start(*flags, **options))


def succeed(*flags: str, **options) -> str:
    """Starts, waits, and insists on exit code 0; the output."""
    done = run(*flags, **options)
    assert done.code == 0, done.output
    return done.output


@contextlib.contextmanager
def running(*flags: str, **options) -> Iterator[subprocess.Popen]:
    """A command that does not outlive the block."""
    process = start(*flags, **options)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        if process.stdout and not process.stdout.closed:
            process.stdout.close()
        process.wait()


@contextlib.contextmanager
def together(count: int, *flags: str) -> Iterator[list[subprocess.Popen]]:
    """The processes of one run on the loopback interface."""
    address = f"127.0.0.1:{free_port()}"
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(
                running(*flags, f"--coordinator={address}", f"--num_processes={count}", f"--process_id={number}")
            )
            for number in range(count)
        ]


def wait_for(what: Callable[[], typing.Any], process: subprocess.Popen) -> bool:
    """Polls until ``what`` holds; False when the process ends first."""
    end = time.monotonic() + TIMEOUT_S
    while not what():
        if process.poll() is not None:
            return False
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.002)
    return True


def kill(process: subprocess.Popen) -> None:
    """What no process can prepare for."""
    process.send_signal(signal.SIGKILL)
    process.wait()


def lines(path: pathlib.Path) -> list[dict]:
    """A jsonl file; every line must be whole. None is an empty list."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def num_lines(path: pathlib.Path) -> int:
    """Whole lines of a file that is being written."""
    return path.read_bytes().count(b"\n") if path.exists() else 0


def metrics(run: pathlib.Path) -> list[dict]:
    """Rows of metrics.jsonl, less what the clock says."""
    timed = lambda name: name.startswith("timing_s/") or name == "perf/throughput"
    return [{name: x for name, x in row.items() if not timed(name)} for row in lines(run / "metrics.jsonl")]


def rollouts(run: pathlib.Path) -> dict[int, list[dict]]:
    """Everything in rollouts/, by step; leftovers of a kill are an error."""
    return {int(path.stem): lines(path) for path in sorted((run / "rollouts").iterdir())}


def tensorboard_steps(run: pathlib.Path, tag: str) -> list[int]:
    """The steps at which the run's events have a value of ``tag``, in order of writing."""
    from rl_reason.report.events import (
        Event,
        EventsWriter,  # noqa: F401  its protos register themselves
    )

    steps = []
    for path in sorted((run / "tensorboard" / "metrics").glob("events.out.tfevents.*")):
        data, at = path.read_bytes(), 0
        while at + 12 <= len(data):  # length, its checksum, the record, its checksum
            size = int.from_bytes(data[at : at + 8], "little")
            event = Event.FromString(data[at + 12 : at + 12 + size])
            at += 16 + size
            steps += [event.step for value in event.summary.value if value.tag == tag]
    return steps


def checkpoint_steps(run: pathlib.Path) -> list[int]:
    """Complete checkpoints."""
    found = (run / "checkpoints").glob("step_*")
    return sorted(int(path.name.removeprefix("step_")) for path in found if path.name.removeprefix("step_").isdigit())


def checkpoint(run: pathlib.Path, step: int) -> dict[str, np.ndarray]:
    """All arrays of a checkpoint by path, whatever devices and processes they were on."""
    where = (run / "checkpoints" / f"step_{step}" / "state").absolute()
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        names = checkpointer.metadata(where).item_metadata.tree
        arguments = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in names}
        return checkpointer.restore(where, args=ocp.args.PyTreeRestore(restore_args=arguments))


def extra(run: pathlib.Path, step: int) -> dict:
    """The JSON of a checkpoint: iterator state, rows and the like."""
    return json.loads((run / "checkpoints" / f"step_{step}" / "extra" / "metadata").read_text())


def assert_bitwise(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    """The same names and the same bits."""
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name, strict=True)


def free_port() -> int:
    """A port of the loopback interface that nobody listens on right now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def write_rows(path: pathlib.Path, answers: list[str]) -> str:
    """A jsonl file in verl's schema with a row an answer; the flag that trains on it."""
    rows = [
        {
            "data_source": "made",
            "prompt": [{"role": "user", "content": f"add {number}+{number}="}],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": answer},
            "extra_info": {"index": number, "split": "train" if number % 4 else "test"},
        }
        for number, answer in enumerate(answers)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"--config.data.files=('{path}',)"

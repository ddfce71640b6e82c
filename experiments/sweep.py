"""Several configs, each with several seeds, and one table of what came out.

    python -m experiments.sweep --out=runs/nft --seeds=0,1,2 --parallel=2 nft.py nft.py:rft grpo.py dapo.py \
        --config.num_steps=160

Every run is ``experiments.run`` in a process and a directory of its own. Words that begin with --config. go to all of them.
What has finished is not done again, and what was interrupted goes on from its last checkpoint: give the same command again.
"""

import argparse
import concurrent.futures
import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
import typing
from collections.abc import Iterable, Sequence

from experiments import config_files
from rl_reason.report.files import to_json, write_atomic


@dataclasses.dataclass(frozen=True)
class Job:
    """One run: a config, a seed, and where it goes."""

    config: str
    seed: int
    directory: pathlib.Path

    def command(self, overrides: Sequence[str]) -> list[str]:
        """What to run; a directory that is there already is gone on with."""
        run = [sys.executable, "-m", "experiments.run", f"--config={self.config}", f"--run={self.directory}"]
        resume = ["--resume"] if (self.directory / "config.json").exists() else []
        return [*run, *overrides, f"--config.seed={self.seed}", *resume]

    @property
    def log(self) -> pathlib.Path:
        return self.directory.with_suffix(".log")

    def summary(self) -> dict[str, typing.Any] | None:
        """What it achieved; None when it has not finished."""
        path = self.directory / "summary.json"
        return json.loads(path.read_text()) if path.exists() else None


def jobs_of(configs: Sequence[str], seeds: Sequence[int], out: pathlib.Path) -> list[Job]:
    """Every config with every seed, seed by seed, so that a sweep cut short has whole rows.

    Raises:
        ValueError: two configs whose runs would lie in one directory.
    """
    names = [config_files.name_of([f"--config={config}"]) for config in configs]
    if len(set(names)) < len(names):
        raise ValueError(f"these configs have names in common: {', '.join(names)}; give each once.")
    pairs = zip(configs, names, strict=True)
    named = [(config_files.resolved([f"--config={config}"])[0].partition("=")[2], name) for config, name in pairs]
    return [Job(config, seed, out / f"{name}-{seed}") for seed in seeds for config, name in named]


class Runner:
    """Runs jobs as processes; stopping it stops those, with their states saved."""

    def __init__(self, overrides: Sequence[str]):
        self._overrides = overrides
        self._running: set[subprocess.Popen] = set()
        self._lock = threading.Lock()
        self._stopped = False

    def __call__(self, job: Job) -> int:
        """The exit status of a job; 0 without running it when it had finished before."""
        if job.summary() is not None:
            return 0
        job.directory.parent.mkdir(parents=True, exist_ok=True)
        with open(job.log, "ab") as log, self._lock:
            if self._stopped:
                return -signal.SIGTERM
            process = subprocess.Popen(job.command(self._overrides), stdout=log, stderr=subprocess.STDOUT)
            self._running.add(process)
        status = process.wait()
        with self._lock:
            self._running.discard(process)
        return status

    def stop(self) -> None:
        """Asks what runs to save and end, and starts nothing more."""
        with self._lock:
            self._stopped = True
            for process in self._running:
                process.terminate()


def table(jobs: Iterable[Job]) -> list[dict[str, typing.Any]]:
    """A row a config: accuracies of each seed in percent, before and after, and their means; None for a run not finished."""
    rows: dict[str, dict[str, typing.Any]] = {}
    for job in jobs:
        name = job.directory.name.rpartition("-")[0]
        row = rows.setdefault(name, {"config": name, "seeds": [], "before": [], "after": [], "wall_seconds": []})
        summary = job.summary() or {}
        row["seeds"].append(job.seed)
        for key, field in (("before", "heldout_before"), ("after", "heldout_after"), ("wall_seconds", "wall_seconds")):
            row[key].append(summary.get(field))
    for row in rows.values():
        for key in ("before", "after"):
            done = [value for value in row[key] if value is not None]
            row[f"mean_{key}"] = sum(done) / len(done) if done else None
    return list(rows.values())


def as_text(rows: Sequence[dict[str, typing.Any]]) -> str:
    """The table for a terminal."""
    percent = lambda x: "     -" if x is None else f"{100 * x:6.1f}"
    width = max((len(row["config"]) for row in rows), default=6)
    lines = [f"{'config':<{width}}  before -> after, % (a seed each)"]
    for row in rows:
        seeds = "   ".join(f"{percent(b)} ->{percent(a)}" for b, a in zip(row["before"], row["after"], strict=True))
        means = f"{percent(row['mean_before'])} ->{percent(row['mean_after'])}"
        lines.append(f"{row['config']:<{width}}  {seeds}   mean {means}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the sweep; returns the exit status: 1 when a run failed or was stopped."""
    parser = argparse.ArgumentParser(prog="python -m experiments.sweep", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("configs", nargs="+", metavar="CONFIG", help="NAME.py[:arg]")
    parser.add_argument("--out", required=True, metavar="DIR", help="where runs, logs and the table go")
    parser.add_argument("--seeds", default="0,1,2", help="numbers with commas between")
    parser.add_argument("--parallel", type=int, default=1, help="runs at a time")
    words = sys.argv[1:] if argv is None else list(argv)
    overrides = [word for word in words if word.startswith("--config.")]
    args = parser.parse_args([word for word in words if not word.startswith("--config.")])
    try:
        seeds = [int(seed) for seed in args.seeds.split(",")]
        jobs = jobs_of(args.configs, seeds, pathlib.Path(args.out))
    except ValueError as error:
        parser.error(str(error))
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # several runs may share a GPU
    failed = run_all(jobs, Runner(overrides), max(args.parallel, 1))
    rows = table(jobs)
    write_atomic(pathlib.Path(args.out) / "sweep.json", to_json(rows, indent=2) + "\n")
    print(as_text(rows))
    done = [str(job.directory) for job in jobs if job.summary() is not None]
    if len(done) > 1:
        runs = " ".join(f"--run={run}" for run in done)
        print(f"curves side by side: python -m experiments.report {runs}")
    return int(failed)


def run_all(jobs: Sequence[Job], runner: Runner, parallel: int) -> bool:
    """Whether any job failed; says of each how it went, as it ends."""
    began, failed = time.perf_counter(), False
    signal.signal(signal.SIGTERM, lambda *_: runner.stop())
    with concurrent.futures.ThreadPoolExecutor(parallel) as pool:
        waiting = {pool.submit(runner, job): job for job in jobs}
        try:
            for number, done in enumerate(concurrent.futures.as_completed(waiting), start=1):
                job, status = waiting[done], done.result()
                failed |= status != 0
                word = "done" if status == 0 else f"failed with {status}, see {job.log}"
                elapsed = time.perf_counter() - began
                print(f"[{number}/{len(jobs)}, {elapsed:.0f} s] {job.directory.name}: {word}", flush=True)
        except KeyboardInterrupt:
            runner.stop()
            failed = True
    return failed


if __name__ == "__main__":
    sys.exit(main())

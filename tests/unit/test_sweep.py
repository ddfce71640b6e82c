"""Sweeps: which runs there are, what they are called with, what is not done again, and the table."""

import json
import pathlib
import sys

import pytest

from experiments import sweep


@pytest.fixture
def quick(monkeypatch):
    """Runs that take no time: a summary as the seed says, or a failure for seed 7."""
    code = (
        "import json, pathlib, sys; run, seed = sys.argv[1:3]; pathlib.Path(run).mkdir(exist_ok=True)\n"
        "print('ran', run)\n"
        "if seed == '7': sys.exit(3)\n"
        "done = dict(heldout_before=0.25, heldout_after=int(seed) / 4, wall_seconds=1.0)\n"
        "(pathlib.Path(run) / 'summary.json').write_text(json.dumps(done))"
    )
    command = lambda job, overrides: [sys.executable, "-c", code, str(job.directory), str(job.seed)]
    monkeypatch.setattr(sweep.Job, "command", command)


def test_a_job_is_a_command_in_a_directory_of_its_own(tmp_path):
    jobs = sweep.jobs_of(["nft.py:rft", "grpo"], [0, 1], tmp_path)
    assert [job.directory.name for job in jobs] == ["nft-rft-0", "grpo-0", "nft-rft-1", "grpo-1"]
    command = jobs[0].command(["--config.num_steps=4"])
    assert command[1:3] == ["-m", "experiments.run"] and command[3].endswith("configs/nft.py:rft")
    assert command[4:] == [f"--run={tmp_path / 'nft-rft-0'}", "--config.num_steps=4", "--config.seed=0"]
    jobs[0].directory.mkdir()
    (jobs[0].directory / "config.json").touch()
    assert jobs[0].command([])[-1] == "--resume"


def test_a_sweep(tmp_path, quick, capsys):
    words = ["--out", str(tmp_path), "--seeds=1,3", "--parallel=2", "grpo.py", "nft.py"]
    assert sweep.main(words) == 0
    out = capsys.readouterr().out
    assert "grpo    25.0 ->  25.0     25.0 ->  75.0   mean   25.0 ->  50.0" in out
    rows = json.loads((tmp_path / "sweep.json").read_text())
    assert [row["config"] for row in rows] == ["grpo", "nft"] and rows[0]["after"] == [0.25, 0.75]
    logs = {path: path.read_text() for path in pathlib.Path(tmp_path).glob("*.log")}
    assert len(logs) == 4
    assert sweep.main(words) == 0  # nothing is done again
    assert logs == {path: path.read_text() for path in logs}


def test_a_run_that_fails_is_said_and_leaves_the_others_alone(tmp_path, quick, capsys):
    assert sweep.main(["--out", str(tmp_path), "--seeds=7,2", "grpo.py"]) == 1
    out = capsys.readouterr().out
    assert "grpo-7: failed with 3, see" in out and "grpo-2: done" in out and "-      -" not in out
    assert json.loads((tmp_path / "sweep.json").read_text())[0]["after"] == [None, 0.5]


@pytest.mark.parametrize(
    "words, says",
    [(["--seeds=a", "grpo.py"], "invalid literal"), (["grpo.py", "grpo.py"], "names in common"), ([], "CONFIG")],
)
def test_refusals(words, says, tmp_path, capsys):
    with pytest.raises(SystemExit):
        sweep.main(["--out", str(tmp_path), *words])
    assert says in capsys.readouterr().err
    with pytest.raises(SystemExit, match="no such file"):
        sweep.jobs_of(["gropo.py"], [0], tmp_path)

"""A whole step through the TPU compiler, where libtpu is installed; no chip."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

pytest.importorskip("libtpu", reason='pip install "jax[tpu]"')
ROOT = pathlib.Path(__file__).parents[2]


def compiled(*words):
    """The command in a process of its own: what it needs of the environment it sets itself."""
    command = [sys.executable, "-m", "experiments.compile", *words]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_", "TPU_"))}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)


@pytest.mark.slow
@pytest.mark.tpu
def test_a_smoke_step_compiles_for_four_chips(tmp_path):
    out = tmp_path / "found.jsonl"
    done = compiled("--config=base.py:smoke", "--topology=v5e:2x2", f"--out={out}")
    assert done.returncode == 0, done.stderr
    assert "base-smoke on v5e:2x2: 4 chips of 15.8 GiB on 1 host" in done.stdout
    assert re.search(r"fits: chunk needs 0\.\d+ of 15\.75 GiB", done.stdout)
    table = compiled(f"--table={out}").stdout.splitlines()
    assert len(table) == 3 and table[2].startswith("| `base-smoke` | embedded: ")


@pytest.mark.slow
@pytest.mark.tpu
def test_what_does_not_fit_exits_with_one_and_says_what_would_help():
    """More cached positions than a device has memory for."""
    done = compiled(
        "--config=base.py:smoke",
        "--topology=v5e:2x2",
        "--config.rollout.num_slots=480000",
        "--config.rollout.completion_len=200",
    )
    assert done.returncode == 1, done.stderr
    assert "does not fit: chunk needs" in done.stdout and "rollout.num_slots=240000 saves" in done.stdout

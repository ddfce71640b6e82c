"""1.5 billion parameters and adapters on a CPU: a checkpoint is read, trained on for a step, and written again."""

import re

import pytest

from tests.e2e import harness

LIMIT_GIB, TIMEOUT_S = 20, 3600


@pytest.mark.slow
def test_a_step_of_adapters_on_a_large_base(tmp_path, monkeypatch):
    """The process itself checks what it wrote."""
    monkeypatch.setattr(harness, "TIMEOUT_S", TIMEOUT_S)
    for what in ("make", "step"):
        output = harness.succeed(what, str(tmp_path), module="tests.e2e.large_lora")
        print(output)
    peaks = [float(x) for x in re.findall(r"peak ([0-9.]+) GiB", output)]
    assert len(peaks) == 4 and peaks[-1] < LIMIT_GIB

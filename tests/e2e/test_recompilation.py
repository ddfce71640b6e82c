"""A program that compiles again after the first step is said to, once."""

import pytest

from tests.e2e import harness


def test_another_shape_is_reported(tmp_path):
    """Also where the second program is read from the cache."""
    flags = [harness.TINY, "--config.num_steps=6", "--config.checkpoint.every=0"]
    env = harness.environment(RL_REASON_CACHE=str(tmp_path / "cache"))
    for run in ("first", "second"):
        output = harness.succeed(*flags, f"--run={tmp_path / run}", module="tests.e2e.shorter_second_chunk", env=env)
        assert output.count("warning: A program was compiled again after the first step") == 1, output
        assert "JAX_LOG_COMPILES=1" in output


@pytest.mark.slow
def test_ordinary_runs_report_none(tmp_path):
    """With checkpoints, and evaluations on the way."""
    flags = [harness.TINY, "--config.num_steps=6", "--config.checkpoint.every=2", f"--run={tmp_path / 'run'}"]
    evaluation = ["--config.evaluation.num_prompts=8", "--config.evaluation.every=2"]
    env = harness.environment(RL_REASON_CACHE=str(tmp_path / "cache"))
    output = harness.succeed(*flags, *evaluation, env=env)
    assert "compiled again" not in output
    assert sum("val-core/overall/acc/mean@2" in row for row in harness.metrics(tmp_path / "run")) == 3

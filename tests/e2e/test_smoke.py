"""Every config that there is runs from end to end and leaves what the documentation promises."""

import json
import math

import pytest

from tests import support
from tests.e2e import harness

RL = ("critic/score/mean", "actor/entropy", "actor/grad_norm", "response_length/mean", "actor/pg_loss")
MEASURED = {
    "rl": RL,
    "supervised": ("sft/loss", "sft/packing_efficiency", "actor/grad_norm"),
    "preference": ("actor/preference_loss", "rewards/margins", "actor/entropy", "actor/grad_norm", "training/epoch"),
    "cohort": (*RL, "cohort/label_accuracy", "cohort/consistency", "sums/self_consistency", "automata/actor/kl_loss"),
}
SAMPLES = ("rl", "cohort")
REPORTED = ("base", "sft", "air", "rlccf")  # drawing takes a third of a run of seconds: one of each loop


# A run of each loop, and the one with models in the loop; what other methods put into the slots is tested in test_loop.py.
ALWAYS = (*REPORTED, "intern_s1")


@pytest.mark.parametrize(
    "name", [n if n in ALWAYS else pytest.param(n, marks=pytest.mark.slow) for n in support.config_names()]
)
def test_smoke(name, tmp_path):
    run, report = tmp_path / "run", name in REPORTED
    output = harness.succeed(f"--config={name}.py:smoke", f"--run={run}", f"--config.log.report={report}")
    assert "Traceback" not in output and "compiled again" not in output

    summary = json.loads((run / "summary.json").read_text())
    for when in ("heldout_before", "heldout_after"):
        assert 0 <= summary[when] <= 1
    assert 0 < summary["warmup_seconds"] < summary["wall_seconds"]

    config = json.loads((run / "config.json").read_text())
    rows = harness.metrics(run)
    assert [row["step"] for row in rows] == list(range(1, config["num_steps"] + 1))
    for name in MEASURED[config["loop"]]:
        assert all(row[name] is not None and math.isfinite(row[name]) for row in rows), name
    assert harness.tensorboard_steps(run, "actor/grad_norm") == [row["step"] for row in rows]
    assert harness.checkpoint_steps(run)[-1] == config["num_steps"]
    records = harness.rollouts(run)
    assert sorted(records) == ([row["step"] for row in rows] if config["loop"] in SAMPLES else [])
    wanted = {"input", "output", "gts", "score", "step", "group_id", "sample_id", "finish_reason"}
    for step, drawn in records.items():
        policies = len(config["cohort"]) or 1
        assert len(drawn) == config["log"]["rollout_groups"] * config["batch"]["group_size"] * policies
        assert all(wanted <= record.keys() and record["step"] == step for record in drawn)
    if report:
        assert str(run / "report.html") in output
        assert (run / "report.html").stat().st_size > 1000
        assert list((run / "plots").glob("*.png"))

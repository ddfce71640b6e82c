"""What is compared before a run of several processes begins, and what is said when it ends before its time."""

import json

import pytest

from experiments import hosts
from rl_reason import processes
from rl_reason.report.rundir import RunDir


def differences(monkeypatch, first: dict, own: dict) -> str:
    """What a process is told whose facts are not the first one's."""
    monkeypatch.setattr(processes, "broadcast_text", lambda _: json.dumps(hosts.facts_of(first)))
    with pytest.raises(SystemExit) as told:
        hosts.refuse_differences(hosts.facts_of(own))
    return str(told.value)


def test_another_config_is_refused_by_its_keys(monkeypatch):
    first = {"config": {"seed": 0, "clip": float("inf"), "data": {"tasks": ("add", "sub"), "old": 1}}}
    own = {"config": {"seed": 7, "clip": float("inf"), "data": {"tasks": ("add", "sub"), "new": None}}}
    said = differences(monkeypatch, first, own)
    assert "error: config.seed is 7 here, 0 in process 0; " in said
    assert "config.data.old is absent here, 1 in process 0" in said
    assert "config.data.new is None here, absent in process 0" in said
    assert "tasks" not in said and "clip" not in said


def test_other_packages_are_refused(monkeypatch):
    facts = hosts.facts_of({})
    monkeypatch.setattr(processes, "broadcast_text", lambda _: json.dumps(facts | {"jax": "'0.1'"}))
    with pytest.raises(SystemExit, match=rf"jax is {facts['jax']} here, '0.1' in process 0"):
        hosts.refuse_differences(facts)


def test_the_same_is_not_refused():
    hosts.refuse_differences(hosts.facts_of({"config": {"seed": 0, "clip": float("nan")}}))


def test_how_to_go_on(monkeypatch, tmp_path):
    flags = ["--config=clipcov.py", "--process_id=3", "--config.a=b c"]
    monkeypatch.setattr("sys.argv", ["run.py", *flags])
    aftermath = hosts.Aftermath()
    assert "start all processes again" in str(aftermath)
    aftermath.run = RunDir(tmp_path)
    assert f"In {tmp_path} nothing was saved yet" in str(aftermath)
    command = (
        f"python -m experiments.run --config=clipcov.py --process_id=3 '--config.a=b c' --run={tmp_path} --resume"
    )
    assert str(aftermath).endswith(command)
    monkeypatch.setattr("sys.argv", ["run.py", *flags, f"--run={tmp_path}", "--resume"])
    assert str(aftermath).endswith(command)
    for name in ("step_4", "step_20", "step_24.orbax-checkpoint-tmp"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert "step 20 was saved last" in str(aftermath)

import json
import math

import numpy as np
import pytest

from rl_reason.report import files, rundir
from rl_reason.report.rundir import RunError, open_run

CONFIG = {"num_steps": 10, "optimizer": {"lr": 3e-4, "b2": 0.95}, "tasks": ("add", "sub"), "note": None}


def test_new_run_is_named_after_config_and_time_and_never_shared(tmp_path):
    runs = [open_run(CONFIG, config_name="configs/clipcov.py:smoke", root=tmp_path) for _ in range(3)]
    assert len({run.path for run in runs}) == 3
    assert all(run.name.startswith("clipcov-smoke-20") and not run.resumed for run in runs)
    assert json.loads(runs[0].config.read_text())["tasks"] == ["add", "sub"]
    assert [entry.name for entry in runs[0].path.iterdir()] == ["config.json"]  # no temporary file stays


def test_a_directory_that_holds_a_run_is_refused_with_the_ways_out(tmp_path):
    open_run(CONFIG, config_name="c", run="mine", root=tmp_path)
    with pytest.raises(RunError, match=r"already holds a run.*--resume.*--run="):
        open_run(CONFIG, config_name="c", run="mine", root=tmp_path)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").touch()
    with pytest.raises(RunError, match="not empty and holds no run"):
        open_run(CONFIG, config_name="c", run="photos", root=tmp_path)


def test_a_kill_before_the_config_was_written_leaves_a_usable_directory(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / ".config.json.123.tmp").write_text('{"num_')
    assert open_run(CONFIG, config_name="c", run="mine", root=tmp_path).config.exists()


def test_resume_takes_the_same_config_and_a_path_with_a_slash(tmp_path):
    first = open_run(CONFIG, config_name="c", run="mine", root=tmp_path)
    again = open_run(CONFIG, config_name="c", run=str(first.path), root="elsewhere", resume=True)
    assert again.resumed and again.path == first.path
    assert not (first.path / "resumes.jsonl").exists()


def test_resume_with_another_config_shows_the_difference_and_the_cure(tmp_path):
    open_run(CONFIG, config_name="c", run="mine", root=tmp_path)
    other = {**CONFIG, "optimizer": {"lr": 1e-3, "b2": 0.95}, "tasks": ["add"], "extra": 1, "num_steps": 20}
    with pytest.raises(RunError) as error:
        open_run(other, config_name="c", run="mine", root=tmp_path, resume=True)
    message = str(error.value)
    assert "optimizer.lr  0.0003 -> 0.001" in message
    assert 'tasks         ["add", "sub"] -> ["add"]' in message
    assert "extra         (absent) -> 1" in message
    assert "--config.optimizer.lr=0.0003" in message and "drop --resume" in message
    assert "num_steps  " not in message  # it grew, which is allowed
    assert "num_steps (upwards)" in message


def test_what_may_change_changes_and_is_noted(tmp_path):
    run = open_run(CONFIG, config_name="c", run="mine", root=tmp_path)
    longer = {**CONFIG, "num_steps": 20, "note": "x"}
    open_run(longer, config_name="c", run="mine", root=tmp_path, resume=True, may_change=["no*"])
    assert rundir.load_config(run.path)["num_steps"] == 20
    note = json.loads((run.path / "resumes.jsonl").read_text())
    assert note["changed"] == {"num_steps": [10, 20], "note": [None, "x"]}
    with pytest.raises(RunError, match="num_steps  20 -> 10"):
        open_run({**longer, "num_steps": 10}, config_name="c", run="mine", root=tmp_path, resume=True)


def test_resume_of_nothing_names_the_runs_there_are(tmp_path):
    open_run(CONFIG, config_name="c", run="mine", root=tmp_path)
    with pytest.raises(RunError, match=r"holds no run.*latest first: mine"):
        open_run(CONFIG, config_name="c", run="yours", root=tmp_path, resume=True)
    with pytest.raises(RunError, match=r"--resume needs --run=NAME.*mine"):
        open_run(CONFIG, config_name="c", root=tmp_path, resume=True)


def test_other_processes_touch_nothing(tmp_path):
    assert open_run(CONFIG, config_name="c", run="mine", root=tmp_path, write=False).path == tmp_path / "mine"
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(RunError, match="broadcast"):
        open_run(CONFIG, config_name="c", root=tmp_path, write=False)


def test_numpy_and_infinite_values_of_a_config_survive_a_resume(tmp_path):
    config = {"clip": math.inf, "seed": np.int64(3), "scale": np.float32(0.5), "empty": {}}
    open_run(config, config_name="c", run="mine", root=tmp_path)
    open_run(config, config_name="c", run="mine", root=tmp_path, resume=True)
    assert rundir.diff_configs(config, {**config, "clip": None}) == {"clip": ("inf", None)}


def test_an_interrupted_write_leaves_the_old_content_and_no_litter(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    files.write_atomic(path, "old")
    monkeypatch.setattr(files.os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        files.write_atomic(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_json_is_strict_and_takes_what_models_write():
    text = files.to_json({"x": float("nan"), "y": [np.float32(1.5), np.inf], "z": "\ud800 \u2028 é"})
    assert json.loads(text, parse_constant=pytest.fail) == {"x": None, "y": [1.5, None], "z": "\ud800 \u2028 é"}
    text.encode()


def test_written_lists_what_is_there(tmp_path):
    run = open_run(CONFIG, config_name="c", run="mine", root=tmp_path)
    (run.path / "export").mkdir()
    assert list(run.written()) == ["config", "export"]

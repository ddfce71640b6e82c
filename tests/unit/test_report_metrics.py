import json
import math
import os
import signal
import struct
import subprocess
import sys

import numpy as np
import pytest

from rl_reason.report.events import Event
from rl_reason.report.metrics import WALL_TIME, MetricsWriter, read_metrics


def rows_of(steps, seed=0):
    rng = np.random.default_rng(seed)
    return [
        {
            "step": int(step),
            "actor/entropy": rng.uniform(),
            "critic/score/mean": np.float32(rng.uniform()),
            WALL_TIME: step,
        }
        for step in steps
    ]


def events_of(directory):
    """(step, tag, value) of all event files, read as TFRecords: length, crc, data, crc."""
    points = []
    for file in sorted(directory.glob("events.out.tfevents.*")):
        data, at = file.read_bytes(), 0
        while at < len(data):
            (size,) = struct.unpack("<Q", data[at : at + 8])
            event = Event.FromString(data[at + 12 : at + 12 + size])
            points += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
            at += 16 + size
    return points


def test_rows_come_back_with_their_values(tmp_path):
    rows = rows_of(range(1, 6))
    with MetricsWriter(tmp_path) as writer:
        writer.append(rows[:3])
        writer.append(rows[3:])
        assert writer.sync() == 5
    columns = read_metrics(tmp_path)
    np.testing.assert_array_equal(columns["step"], range(1, 6))
    for name in ("actor/entropy", "critic/score/mean"):
        np.testing.assert_array_equal(columns[name], [float(row[name]) for row in rows])
    events = events_of(tmp_path / "tensorboard" / "metrics")
    assert len(events) == 10 and (3, "actor/entropy", np.float32(rows[2]["actor/entropy"])) in events


def test_what_is_not_finite_is_null_and_reads_as_nan(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.append([{"step": 1, "a": math.nan, "b": 2.0}, {"step": 2, "a": math.inf, "c": 1}])
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        assert json.loads(line, parse_constant=pytest.fail)["a"] is None
    columns = read_metrics(tmp_path / "metrics.jsonl")
    np.testing.assert_array_equal(columns["a"], [np.nan, np.nan])
    np.testing.assert_array_equal(columns["b"], [2, np.nan])
    assert [tag for _, tag, _ in events_of(tmp_path / "tensorboard" / "metrics")] == ["b", "c"]


def test_rows_of_a_step_are_merged_but_may_not_repeat(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.append([{"step": 1, "a": 1.0}, {"step": 1, "b": 2.0}])
        with pytest.raises(ValueError, match=r"Step 1 already has \['a'\]"):
            writer.append([{"step": 1, "a": 1.0}])
        with pytest.raises(ValueError, match=r"Step 0 after step 2.*truncate"):
            writer.append([{"step": 2, "a": 1.0}, {"step": 0, "a": 1.0}])
        for bad, message in (({"a": 1.0}, "integer 'step'"), ({"step": 2, "a": "x"}, "one number"),
                             ({"step": 2, "a": np.ones(2)}, "one number")):  # fmt: skip
            with pytest.raises(ValueError, match=message):
                writer.append([bad])
        assert writer.sync() == 2  # the refused wrote nothing
    columns = read_metrics(tmp_path)
    assert columns["a"].tolist() == [1.0] and columns["b"].tolist() == [2.0]


def test_an_old_file_must_be_truncated_first(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.append(rows_of([1]))
    with MetricsWriter(tmp_path) as writer, pytest.raises(RuntimeError, match="truncate"):
        writer.append(rows_of([2]))


@pytest.mark.parametrize("by", ["rows", "step"])
def test_killed_at_any_byte_no_row_is_missing_or_doubled(tmp_path, by):
    """The file cut after every byte of its last two rows; the checkpoint was taken before them, after 4 rows."""
    rows = rows_of(range(1, 7))
    with MetricsWriter(tmp_path / "whole") as writer:
        writer.append(rows[:4])
        synced = writer.sync()
        size = writer.path.stat().st_size
        writer.append(rows[4:])
    whole = (tmp_path / "whole" / "metrics.jsonl").read_bytes()
    assert synced == 4
    for cut in range(size, len(whole) + 1):
        directory = tmp_path / f"{cut}"
        directory.mkdir()
        (directory / "metrics.jsonl").write_bytes(whole[:cut])
        assert len(read_metrics(directory)["step"]) in (4, 5, 6)  # readable while torn
        with MetricsWriter(directory) as writer:
            assert writer.truncate(**({"rows": synced} if by == "rows" else {"step": 4})) == 4
            writer.append(rows[4:])
        assert (directory / "metrics.jsonl").read_bytes() == whole
    assert events_of(directory / "tensorboard" / "metrics") == events_of(
        tmp_path / "whole" / "tensorboard" / "metrics"
    )


def test_events_are_rebuilt_whatever_the_kill_left_of_them(tmp_path):
    events = tmp_path / "tensorboard" / "metrics"
    with MetricsWriter(tmp_path) as writer:
        writer.append(rows_of(range(1, 9)))
    (file,) = events.iterdir()
    file.write_bytes(file.read_bytes()[:-7])
    with MetricsWriter(tmp_path) as writer:
        writer.truncate(step=5)
        writer.append(rows_of([6, 7], seed=1))
    assert [step for step, tag, _ in events_of(events) if tag == "actor/entropy"] == [1, 2, 3, 4, 5, 6, 7]


def test_lost_rows_are_an_error_and_damage_is_located(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(tmp_path) as writer:
        writer.append(rows_of([1, 2, 3]))
    with MetricsWriter(tmp_path) as writer, pytest.raises(ValueError, match=r"has 3 whole rows.*after 5"):
        writer.truncate(rows=5)
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([lines[0], b"\x00\x00", lines[2], b""]))
    with pytest.raises(ValueError, match=r"metrics.jsonl:2 is no row"):
        read_metrics(path)
    with MetricsWriter(tmp_path) as writer:  # zeros of a power cut lie past the checkpoint, so they go
        assert writer.truncate(rows=1) == 1


def test_loops_that_count_apart_have_files_apart(tmp_path):
    with MetricsWriter(tmp_path, "warmup") as warmup, MetricsWriter(tmp_path) as main:
        warmup.append([{"step": 9, "loss": 0.5}])
        main.append([{"step": 1, "loss": 0.25}])
    assert read_metrics(tmp_path / "warmup.jsonl")["step"].tolist() == [9]
    assert {path.name for path in (tmp_path / "tensorboard").iterdir()} == {"warmup", "metrics"}


def test_kill_minus_nine_loses_nothing_that_was_appended(tmp_path):
    code = f"""
import os, signal
from rl_reason.report.metrics import MetricsWriter
writer = MetricsWriter({str(tmp_path)!r})
writer.append([{{"step": step, "a": step / 8}} for step in range(1, 5)])
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=os.getcwd(), env={**os.environ, "PYTHONPATH": "."})
    assert done.returncode == -signal.SIGKILL
    with MetricsWriter(tmp_path) as writer:
        assert writer.truncate(step=3) == 3
        writer.append([{"step": 4, "a": 0.5}])
    assert read_metrics(tmp_path)["a"].tolist() == [1 / 8, 2 / 8, 3 / 8, 4 / 8]
    points = events_of(tmp_path / "tensorboard" / "metrics")
    assert points == [(step, "a", step / 8) for step in range(1, 5)]

"""metrics.jsonl, one JSON object a row, and its mirror as TensorBoard events.

The file is the truth; the events are rebuilt from it on resume. A row is in the file once ``append`` returns, and
survives a power cut once ``sync`` returns. So: ``rows = writer.sync()``, commit a checkpoint that stores ``rows``,
and on resume ``writer.truncate(rows=rows)``; whatever the process died of, no row is then missing or doubled.

NaN and infinities are written as null, the one strict JSON has; ``read_metrics`` gives NaN, TensorBoard a gap.
"""

import json
import os
import pathlib
import time
import typing
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from rl_reason.report.events import Event, EventsWriter, Summary
from rl_reason.report.files import jsonable, sync_directory, to_json

WALL_TIME = "timing_s/unix_time"  # when the row was appended; TensorBoard's wall time

Row = dict[str, typing.Any]


class MetricsWriter:
    """Appends rows to ``<directory>/<name>.jsonl`` and ``<directory>/tensorboard/<name>/``.

    Loops that count their steps apart (a supervised warm-up before RL) write under different names. Steps never
    decrease, and rows of one step never repeat a metric: readers merge them.
    """

    def __init__(self, directory: str | pathlib.Path, name: str = "metrics") -> None:
        directory = pathlib.Path(directory)
        self.path = directory / f"{name}.jsonl"
        self._events_directory = directory / "tensorboard" / name
        directory.mkdir(parents=True, exist_ok=True)
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115  a row must outlive a kill -9
        sync_directory(directory)
        self._rows = 0
        self._last_step: int | None = None
        self._last_metrics: set[str] = set()
        self._events: EventsWriter | None = None
        self._entered = self._file.tell() == 0

    def append(self, rows: Iterable[Mapping[str, typing.Any]]) -> None:
        """Adds rows, each with an integer "step" and numbers; numpy and jax scalars are taken.

        Raises:
            ValueError: for a row without step, a step that goes back, a metric given twice, or a value that is no
                number. Nothing of ``rows`` is written then.
            RuntimeError: when the file holds another process's rows and ``truncate`` was not called.
        """
        if not self._entered:
            raise RuntimeError(f"{self.path} holds an earlier process's rows; call truncate(rows=...) first.")
        now = time.time()
        checked, last_step, last_metrics = [], self._last_step, self._last_metrics
        for row in rows:
            checked.append({**_plain(row), WALL_TIME: row.get(WALL_TIME, now)})
            step, metrics = checked[-1]["step"], set(row) - {"step", WALL_TIME}
            if last_step is not None and step < last_step:
                raise ValueError(
                    f"Step {step} after step {last_step}: call truncate(step={step - 1}) before repeating."
                )
            if step == last_step and metrics & last_metrics:
                raise ValueError(f"Step {step} already has {sorted(metrics & last_metrics)}; merge or rename them.")
            last_metrics = metrics | last_metrics if step == last_step else metrics
            last_step = step
        data = memoryview("".join(to_json(row) + "\n" for row in checked).encode())
        while data:  # an unbuffered write may be short
            data = data[self._file.write(data) :]
        self._rows += len(checked)
        self._last_step, self._last_metrics = last_step, last_metrics
        self._write_events(checked)

    def sync(self) -> int:
        """Makes the rows durable and returns how many there are; a checkpoint stores that number."""
        os.fsync(self._file.fileno())
        if self._events is not None:
            self._events.flush()
        return self._rows

    def truncate(self, *, rows: int | None = None, step: int | None = None) -> int:
        """Keeps the first ``rows`` rows, or those up to ``step``, drops a torn line, and rebuilds the events.

        Returns the number of rows kept.

        Raises:
            ValueError: when the file has fewer than ``rows`` whole rows: it is not the one that was synced.
        """
        if (rows is None) == (step is None):
            raise ValueError("Pass rows (what sync returned) or step, not both.")
        kept, size = [], 0
        for row, end in _whole_rows(self.path.read_bytes()):
            if len(kept) == rows or (step is not None and row["step"] > step):
                break
            kept.append(row)
            size = end
        if rows is not None and len(kept) < rows:
            raise ValueError(
                f"{self.path} has {len(kept)} whole rows, the checkpoint was taken after {rows}: the file was "
                "replaced or cut. Restore it, or resume from an earlier checkpoint."
            )
        os.ftruncate(self._file.fileno(), size)
        os.fsync(self._file.fileno())
        self._rows, self._entered = len(kept), True
        self._last_step = kept[-1]["step"] if kept else None
        self._last_metrics = {key for row in kept if row["step"] == self._last_step for key in row}
        self._last_metrics -= {"step", WALL_TIME}
        self._close_events()
        for old in self._events_directory.glob("events.out.tfevents.*"):
            old.unlink()
        self._write_events(kept)
        if self._events is not None:
            self._events.flush()
        return self._rows

    def close(self) -> None:
        """Syncs and closes both files; harmless when repeated."""
        if not self._file.closed:
            self.sync()
            self._file.close()
        self._close_events()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _write_events(self, rows: Sequence[Row]) -> None:
        if rows and self._events is None:
            self._events_directory.mkdir(parents=True, exist_ok=True)
            # Not tensorboardX.SummaryWriter: its queue and thread would make sync() a guess.
            self._events = EventsWriter(str(self._events_directory / "events"))
        for row in rows:
            values = [
                Summary.Value(tag=key, simple_value=value)
                for key, value in row.items()
                if key not in ("step", WALL_TIME) and value is not None
            ]
            event = Event(wall_time=row[WALL_TIME], step=row["step"], summary=Summary(value=values))
            assert self._events is not None
            self._events.write_event(event)

    def _close_events(self) -> None:
        if self._events is not None:
            self._events.close()
            self._events = None


def read_metrics(path: str | pathlib.Path) -> dict[str, np.ndarray]:
    """The columns of a metrics file or of a run's directory: "step" as integers, the rest as floats.

    Rows of one step are merged; what a row lacks, and what was not finite, is NaN. A torn last line, of a run still
    being written, is left out.

    Raises:
        FileNotFoundError: when there is none.
        ValueError: when a line before the last is no row.
    """
    path = pathlib.Path(path)
    path = path / "metrics.jsonl" if path.is_dir() else path
    data = path.read_bytes()
    steps: dict[int, Row] = {}
    size = 0
    for row, end in _whole_rows(data):
        steps.setdefault(row["step"], {}).update(row)
        size = end
    if b"\n" in data[size:].rstrip(b"\n"):
        number = data[:size].count(b"\n") + 1
        raise ValueError(f"{path}:{number} is no row of metrics; cut the file there, or restore it.")
    names = dict.fromkeys(key for row in steps.values() for key in row)
    columns = {
        name: np.array([_number(row.get(name)) for row in steps.values()], np.float64)
        for name in names
        if name != "step"
    }
    return {"step": np.array(list(steps), np.int64), **columns}


def _whole_rows(data: bytes) -> Iterable[tuple[Row, int]]:
    """Rows and the offsets of their ends, up to the first line that is cut or is no row."""
    end = 0
    while (newline := data.find(b"\n", end)) >= 0:
        try:
            row = json.loads(data[end:newline])
        except ValueError:
            return
        if not (isinstance(row, dict) and isinstance(row.get("step"), int)):
            return
        row.setdefault(WALL_TIME, 0.0)
        end = newline + 1
        yield row, end


def _plain(row: Mapping[str, typing.Any]) -> Row:
    """A row as JSON takes it, its step first."""
    plain = jsonable(row)
    step = plain.get("step")
    if not isinstance(step, int) or isinstance(step, bool):
        raise ValueError(f"A row of metrics needs an integer 'step', got {step!r} in {sorted(row)}.")
    for key, value in plain.items():
        if value is not None and not isinstance(value, int | float):
            raise ValueError(f"Metric {key!r} of step {step} is {value!r}; a metric is one number.")
    return {"step": step, **{key: None if v is None else float(v) for key, v in plain.items() if key != "step"}}


def _number(value: typing.Any) -> float:
    return float("nan") if value is None else float(value)

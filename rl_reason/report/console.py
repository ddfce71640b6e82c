"""The terminal: one phase after another, each with its progress, and warnings once.

On a terminal a live bar over a line of metrics; elsewhere (pipes, CI) a plain line every few seconds, free of control
characters. Processes but the first pass ``enabled=False`` and print nothing.
"""

import contextlib
import io
import math
import sys
import threading
import time
import typing
from collections.abc import Callable, Iterator, Mapping

import rich.console
import rich.live
import rich.progress_bar
import rich.spinner
import rich.table
import rich.text

from rl_reason.report.files import visible

# metric, its label, its unit, how to write it. Names without a slash are shown as they are.
SHOWN: tuple[tuple[str, str, str, Callable[[float], str]], ...] = (
    ("critic/score/mean", "reward", "", "{:.3f}".format),
    ("rewards/accuracies", "pairs right", "", "{:.3f}".format),
    ("actor/entropy", "entropy", "nats", "{:.3f}".format),
    ("response_length/mean", "length", "tokens", "{:.0f}".format),
    ("perf/throughput", "", "tok/s", lambda value: human(value)),
)
PLAIN_WIDTH = 100  # of what is not a terminal


def human(value: float | int) -> str:
    """Three digits and a suffix.

    >>> human(12345.0), human(950.0), human(2.5e6), human(7.12e14)
    ('12.3k', '950', '2.5M', '712T')
    """
    for suffix, scale in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= scale * 0.9995:
            return f"{value / scale:.3g}{suffix}"
    return f"{value:.3g}"


def duration(seconds: float | int) -> str:
    """Minutes and seconds, hours and days where needed.

    >>> duration(7.2), duration(252), duration(3 * 3600 + 60), duration(100_000)
    ('0:07', '4:12', '3:01:00', '1d 3:46:40')
    """
    if not math.isfinite(seconds):
        return "?"
    minutes, rest = divmod(round(max(0.0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d {hours}:{minutes:02}:{rest:02}"
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Phase:
    """Progress of one phase. ``update`` may be called from any thread, such as a host callback's."""

    def __init__(self, name: str, total: int | None, unit: str, start: int, clock: Callable[[], float]) -> None:
        self.name, self.total, self.unit, self.start, self.done = name, total, unit, start, start
        self._clock = clock
        self._began = clock()
        self._first: tuple[float, int] | None = None
        self._ended: float | None = None
        self._shown: dict[str, float] = {}
        self._on_update: Callable[[], None] = lambda: None

    def update(self, done: int, metrics: Mapping[str, typing.SupportsFloat] | None = None) -> None:
        """``done`` of ``total`` are done; metrics not given keep their last value."""
        if self._first is None and done > self.start:
            self._first = (self._clock(), done)
        self.done = done
        known = {key for key, *_ in SHOWN}
        self._shown |= {key: float(v) for key, v in (metrics or {}).items() if key in known or "/" not in key}
        self._on_update()

    def count(self, done: int, total: int) -> None:
        """``done`` of a total that only the work itself knows."""
        self.total = total
        self.update(done)

    @property
    def elapsed(self) -> float:
        """Seconds since the phase began, until it ended."""
        return (self._clock() if self._ended is None else self._ended) - self._began

    @property
    def left(self) -> float:
        """Seconds to go at the pace since the first update, which held the compilation; NaN when unknown."""
        if self.total is None or self._first is None or self.done <= self._first[1]:
            return math.nan
        now = self._clock()
        return (now - self._first[0]) / (self.done - self._first[1]) * (self.total - self.done)

    def metrics(self) -> list[tuple[str, str, str]]:
        """(label, value, unit) of what is shown, known ones first."""
        rows = [(label, form(self._shown[key]), unit) for key, label, unit, form in SHOWN if key in self._shown]
        known = {key for key, *_ in SHOWN}
        return rows + [(key, f"{value:.3g}", "") for key, value in self._shown.items() if key not in known]

    def end(self) -> None:
        """Stops the clock."""
        self._ended = self._clock()


class Display:
    """What a run prints; see the module.

    Args:
        enabled: False prints nothing at all.
        file: where to, standard output by default.
        interval_s: seconds between plain lines.
        terminal: whether to draw a live display; found out by default.
        width: columns; found out by default.
    """

    def __init__(
        self,
        *,
        enabled: bool = True,
        file: io.TextIOBase | None = None,
        interval_s: float | int = 10.0,
        terminal: bool | None = None,
        width: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        stream = typing.cast(typing.TextIO, sys.stdout if file is None else file)
        # Asked here and not of rich, which colours pipes when FORCE_COLOR is set.
        self.terminal = stream.isatty() if terminal is None else terminal
        self.enabled = enabled
        self.unicode = (getattr(stream, "encoding", None) or "utf-8").lower().startswith("utf")
        self.console = rich.console.Console(
            file=stream,
            quiet=not enabled,
            force_terminal=self.terminal,
            color_system="auto" if self.terminal else None,
            width=width or (None if self.terminal else PLAIN_WIDTH),
            highlight=False,
            markup=False,
            emoji=False,
        )
        self._interval_s, self._clock = interval_s, clock
        self._warned: set[str] = set()
        self._lock = threading.Lock()

    def glyph(self, pretty: str, plain: str) -> str:
        """``pretty`` where the stream can show it."""
        return pretty if self.unicode else plain

    def info(self, message: str) -> None:
        """Prints a line."""
        self.console.print(rich.text.Text(visible(message)), soft_wrap=not self.terminal)

    def warn(self, message: str) -> None:
        """Prints a warning, visibly, unless the same was printed before."""
        with self._lock:
            if message in self._warned:
                return
            self._warned.add(message)
        text = rich.text.Text.assemble(("warning: ", "bold yellow"), (visible(message), "yellow"))
        self.console.print(text, soft_wrap=not self.terminal)

    @contextlib.contextmanager
    def phase(self, name: str, total: int | None = None, *, unit: str = "step", start: int = 0) -> Iterator[Phase]:
        """Shows progress while its block runs, and leaves one line behind: done, or stopped by an exception.

        Args:
            name: a word or two, such as "rl".
            total: how many units there are; None when unknown.
            unit: singular.
            start: units done by an earlier process, on resume.
        """
        phase = Phase(name, total, unit, start, self._clock)
        ok = False
        try:
            with self._live(phase) if self.terminal and self.enabled else self._lines(phase):
                yield phase
            ok = True
        finally:
            phase.end()
            if self.terminal:
                self.console.print(self._closing_line(phase, ok), no_wrap=True, overflow="ellipsis")
            else:
                self.info(plain_line(phase, "done" if ok else "stopped"))

    @contextlib.contextmanager
    def _live(self, phase: Phase) -> Iterator[None]:
        spinner = rich.spinner.Spinner("dots" if self.unicode else "line", style="cyan")
        live = rich.live.Live(
            get_renderable=lambda: self._frame(phase, spinner),
            console=self.console,
            refresh_per_second=8,
            transient=True,
        )
        with live:
            yield

    @contextlib.contextmanager
    def _lines(self, phase: Phase) -> Iterator[None]:
        self.info(f"[{phase.name}] started" + (f", {_count(phase.total, phase.unit)}" if phase.total else ""))
        last = self._clock()

        def on_update() -> None:
            nonlocal last
            with self._lock:
                now = self._clock()
                due = now - last >= self._interval_s
                last = now if due else last
            if due:
                self.info(plain_line(phase))

        phase._on_update = on_update
        yield

    def _frame(self, phase: Phase, spinner: rich.spinner.Spinner) -> rich.console.RenderableType:
        """Two lines: the bar with its times, and the metrics under it."""
        times = duration(phase.elapsed)
        if not math.isnan(phase.left):
            times += f" {self.glyph('·', '-')} {duration(phase.left)} left"
        count = f"{phase.done}/{phase.total}" if phase.total else _count(phase.done, phase.unit) if phase.done else ""
        bar = rich.progress_bar.ProgressBar(
            total=phase.total or None,
            completed=phase.done,
            pulse=not phase.total,
            complete_style="cyan",
            finished_style="cyan",
        )
        head = rich.table.Table.grid(padding=(0, 1), expand=True)
        head.add_column(width=1)
        head.add_column(min_width=9, no_wrap=True)
        head.add_column(ratio=1)
        head.add_column(no_wrap=True)
        head.add_column(no_wrap=True, style="dim")
        head.add_row(spinner, rich.text.Text(phase.name, "bold"), bar, rich.text.Text(count), times)
        indent = 2 + max(10, len(phase.name) + 1)
        metrics = _metrics_text(phase, self.console.width - indent)
        return rich.console.Group(head, rich.text.Text(" " * indent) + metrics) if metrics else head

    def _closing_line(self, phase: Phase, ok: bool) -> rich.text.Text:
        mark = (self.glyph("✓", "ok"), "green") if ok else (self.glyph("✗", "stopped"), "red")
        whole = phase.total is None or phase.done == phase.total
        count = _count(phase.done, phase.unit) if whole else f"{phase.done}/{_count(phase.total or 0, phase.unit)}"
        count = count if phase.done or phase.total else ""
        text = rich.text.Text.assemble(mark, " ", (f"{phase.name:<10}", "bold"), f"{count:<12} ")
        text.append(f"{duration(phase.elapsed):>7}  ", "dim")
        return text.append_text(_metrics_text(phase, self.console.width - len(text), units=False))


def plain_line(phase: Phase, state: str = "") -> str:
    """A phase in one line of text."""
    if phase.total:
        count = f"{phase.done}/{phase.total} ({100 * phase.done / phase.total:.0f}%)"
    else:
        count = _count(phase.done, phase.unit) if phase.done else ""
    words = [" ".join(part for part in (f"[{phase.name}]", state, count) if part)]
    words += [" ".join(part for part in row if part) for row in phase.metrics()]
    words.append(f"{duration(phase.elapsed)} elapsed")
    if not state and not math.isnan(phase.left):
        words.append(f"{duration(phase.left)} left")
    return ", ".join(words)


def _metrics_text(phase: Phase, width: int, *, units: bool = True) -> rich.text.Text:
    """The metrics of which each fits wholly; a number cut short would be another number."""
    text = rich.text.Text()
    for label, value, unit in phase.metrics():
        item = rich.text.Text("  " if text else "").append(f"{label} " if label else "", "dim").append(value, "bold")
        if unit and (units or not label):
            item.append(f" {unit}", "dim")
        if len(text) + len(item) > width:
            break
        text.append_text(item)
    return text


def _count(number: int, unit: str) -> str:
    return f"{number} {unit}" if number == 1 else f"{number} {unit}s"

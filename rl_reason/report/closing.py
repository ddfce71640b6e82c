"""The last thing a run prints: the gain, the time it took, what the model writes now, and where everything is."""

import os
import pathlib
from collections.abc import Mapping

import rich.box
import rich.console
import rich.panel
import rich.rule
import rich.table
import rich.text

from rl_reason.report.console import Display, duration
from rl_reason.report.files import visible
from rl_reason.report.summary import OVERALL, Answer, Comparison, Summary, Transcript

MAX_TRANSCRIPTS = 3
MAX_LINES = 8  # of a transcript's prompt or completion
MAX_CHARACTERS = 320


def print_summary(display: Display, name: str, summary: Summary, paths: Mapping[str, pathlib.Path]) -> None:
    """Prints the summary of the run ``name``; ``paths`` is ``RunDir.written()``."""
    display.console.print()
    parts: list[rich.console.RenderableType] = []
    if summary.tasks:
        parts.append(_accuracies(display, summary.tasks))
    if summary.majority:
        parts.append(rich.text.Text(majority_line(summary.majority)))
    times = "   ".join(f"{label} {duration(value)}" for label, value in summary.seconds.items())
    if times:
        parts.append(rich.text.Text(f"\n{times}" if parts else times, "dim"))
    title = rich.text.Text(name, "bold")
    if display.terminal:
        display.console.print(
            rich.panel.Panel(rich.console.Group(*parts), title=title, border_style="cyan", expand=False)
        )
    else:
        display.console.print(_rule(display, title), *parts, sep="\n")
    for transcript in summary.transcripts[:MAX_TRANSCRIPTS]:
        _print_transcript(display, transcript)
    if paths:
        display.console.print()
        display.console.print(_rule(display, rich.text.Text("files", "bold")))
        width = max(map(len, paths))
        for label, path in paths.items():
            line = rich.text.Text.assemble((f"{label:<{width}}  ", "dim"), _short(path))
            display.console.print(line, soft_wrap=True)  # a wrapped path can be neither clicked nor copied


def _accuracies(display: Display, tasks: Mapping[str, Comparison]) -> rich.table.Table:
    box = rich.box.SIMPLE_HEAD if display.unicode else rich.box.ASCII2
    table = rich.table.Table(box=box, padding=(0, 0, 0, 1), pad_edge=False, show_edge=False)
    table.add_column("held-out %", overflow="fold")  # the one that gives way: numbers are never cut
    for heading in ("n", "before [95%]", "after [95%]", "gain, points [95%]"):
        table.add_column(heading, justify="right", no_wrap=True)
    for task, row in tasks.items():
        last = task == OVERALL or len(tasks) == 1
        gain = row.gain
        colour = "green" if gain.low > 0 else "red" if gain.high < 0 else ""
        cells = [row.before.percent(), row.after.percent()]
        gain_text = rich.text.Text(gain.percent(signed=True), colour)
        style = "bold" if last else ""
        table.add_row(rich.text.Text(visible(task)), str(row.after.count), *cells, gain_text, style=style)
    return table


def majority_line(majority: Mapping[str, float]) -> str:
    """How votes over a question's samples changed.

    >>> majority_line(dict(before=0.5, after=0.75, right_to_wrong=1, wrong_to_right=3, num_samples=4))
    'majority of 4: 50.0 -> 75.0 %; 3 questions from wrong to right, 1 from right to wrong'
    """
    return (
        f"majority of {majority['num_samples']}: {100 * majority['before']:.1f} -> {100 * majority['after']:.1f} %; "
        f"{majority['wrong_to_right']} questions from wrong to right, {majority['right_to_wrong']} from right to wrong"
    )


def _print_transcript(display: Display, transcript: Transcript) -> None:
    display.console.print()
    display.console.print(_rule(display, rich.text.Text(visible(transcript.task) or "held-out", "bold")))
    right = transcript.gts and rich.text.Text(visible(transcript.gts))
    rows = [
        ("prompt", "", rich.text.Text(shorten(transcript.prompt))),
        *([("expected", "", right)] if right else []),
        ("before", _mark(display, transcript.before), rich.text.Text(shorten(transcript.before.completion), "dim")),
        ("after", _mark(display, transcript.after), rich.text.Text(shorten(transcript.after.completion))),
    ]
    grid = rich.table.Table.grid(padding=(0, 1))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for row in rows:
        grid.add_row(*row)
    display.console.print(grid)


def _mark(display: Display, answer: Answer) -> rich.text.Text:
    if answer.correct is None:
        return rich.text.Text("?", "yellow")  # the verifier failed
    if answer.correct:
        return rich.text.Text(display.glyph("✓", "right"), "green")
    return rich.text.Text(display.glyph("✗", "wrong"), "red")


def _rule(display: Display, title: rich.text.Text) -> rich.console.RenderableType:
    return rich.rule.Rule(title, align="left", style="dim", characters=display.glyph("─", "-"))


def shorten(text: str, max_lines: int = MAX_LINES, max_characters: int = MAX_CHARACTERS) -> str:
    """``text`` made visible and cut, saying by how much; never empty.

    >>> shorten("abcdef", max_characters=2)
    'ab ... (4 more characters)'
    """
    text = text.strip("\n")
    cut = "\n".join(text[:max_characters].split("\n")[:max_lines])
    left = len(text) - len(cut)
    return (visible(cut) + (f" ... ({left} more characters)" if left else "")) or "(empty)"


def _short(path: pathlib.Path) -> str:
    """Relative to the working directory where it lies below it; a trailing slash marks a directory."""
    shown = os.path.relpath(path)
    shown = str(path) if shown.startswith("..") else shown
    return shown + ("/" if path.is_dir() else "")

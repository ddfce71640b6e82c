import io
import pathlib
import re

import pytest

from rl_reason.report.closing import print_summary
from rl_reason.report.console import Display
from rl_reason.report.summary import Answer, Transcript, summarise

METRICS = {
    "critic/score/mean": 0.5125,
    "actor/entropy": 0.4321,
    "response_length/mean": 187.4,
    "perf/throughput": 12345.0,
    "actor/lr": 1e-4,
}
SUMMARY = summarise(
    {"addition": [1.0] * 60 + [0.0] * 140, "base_conversion_with_a_long_name": [0.0] * 200},
    {"addition": [1.0] * 200, "base_conversion_with_a_long_name": [1.0] * 90 + [0.0] * 110},
    seconds={"wall": 252.3, "warm-up": 31.0, "compile": 44.4},
    transcripts=[
        Transcript("7+5*3=", Answer("36\x1b[31m\r\a", False), Answer("7+15=22\n####22", True), "addition", "22"),
        Transcript("10 in base 2", Answer("", None), Answer("[bold]3[/bold] " * 200, False), "base"),
    ],
)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def run_phases(display, clock):
    with display.phase("tokenizer"):
        clock.now += 2
    with display.phase("rl", 100) as phase:
        for step in range(100):
            clock.now += 40 if step == 0 else 1  # the first compiles
            phase.update(step + 1, METRICS)


def test_pipes_get_a_plain_line_every_few_seconds():
    clock, out = Clock(), io.StringIO()
    run_phases(Display(file=out, interval_s=30, clock=clock), clock)
    lines = out.getvalue().splitlines()
    assert lines[0] == "[tokenizer] started" and lines[1] == "[tokenizer] done, 0:02 elapsed"
    # Due at 40 s (step 1), 70 s (step 31), 100 s (step 61), 130 s (step 91).
    assert [re.search(r"\] (\S+)", line)[1] for line in lines[3:]] == ["1/100", "31/100", "61/100", "91/100", "done"]
    assert lines[4] == (
        "[rl] 31/100 (31%), reward 0.512, entropy 0.432 nats, length 187 tokens, 12.3k tok/s, 1:10 elapsed, 1:09 left"
    )
    assert not re.search(r"[^\n -~]", out.getvalue())


@pytest.mark.parametrize("width", [80, 120])
def test_terminals_get_lines_that_fit(width):
    clock, out = Clock(), io.StringIO()
    display = Display(file=out, terminal=True, width=width, clock=clock)
    run_phases(display, clock)
    print_summary(display, "clipcov-20250301-142233", SUMMARY, {})
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue())
    assert "100 steps" in text and "reward 0.512" in text
    assert all(len(line.rstrip()) <= width for line in re.split(r"[\r\n]", text))
    assert "+70.0 [63.1, 75.9]" in text and "30.0 [24.1, 36.7]" in text  # numbers are never cut


def test_resumed_phases_guess_the_time_left_from_their_own_pace():
    clock = Clock()
    with Display(enabled=False, clock=clock).phase("rl", 100, start=80) as phase:
        for step in range(80, 90):
            clock.now += 3
            phase.update(step + 1)
        assert phase.left == pytest.approx(30)


def test_warnings_are_printed_once_and_other_processes_are_silent():
    out = io.StringIO()
    display = Display(file=out)
    for _ in range(3):
        display.warn("recompilation after the first step")
    assert out.getvalue() == "warning: recompilation after the first step\n"
    silent = Display(enabled=False, file=out)
    silent.warn("no")
    run_phases(silent, Clock())
    print_summary(silent, "name", SUMMARY, {"report": pathlib.Path("x")})
    assert out.getvalue().count("\n") == 1


def test_a_phase_that_fails_says_so():
    out = io.StringIO()
    with pytest.raises(KeyboardInterrupt), Display(file=out).phase("rl", 10) as phase:
        phase.update(3)
        raise KeyboardInterrupt
    assert "[rl] stopped 3/10 (30%)" in out.getvalue()


def test_the_summary_in_a_pipe_is_plain_and_complete(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    out = io.StringIO()
    paths = {"report": pathlib.Path("runs/" + "long-" * 30 + "name/report.html")}
    print_summary(Display(file=out), "clipcov", SUMMARY, paths)
    text = out.getvalue()
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", text)
    assert r"36\x1b[31m\r\x07" in text and "[bold]3[/bold]" in text and "more characters)" in text
    assert "(empty)" in text and "wall 4:12   warm-up 0:31   compile 0:44" in text
    assert str(paths["report"]) in text  # paths are not wrapped
    assert re.search(r"overall +400 .* \[", text)


def test_ascii_streams_get_ascii():
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    display = Display(file=out)
    print_summary(display, "clipcov", SUMMARY, {})
    with display.phase("rl", 1) as phase:
        phase.update(1, METRICS)
    out.flush()

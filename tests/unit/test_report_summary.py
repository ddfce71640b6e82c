import math

import numpy as np
import pytest

from rl_reason.report.summary import Answer, Transcript, accuracy, load_summary, summarise


def test_wilson_interval_of_a_known_case():
    # Wilson, 81 of 263 (Newcombe 1998, table I): 0.2553 to 0.3662.
    interval = accuracy([1.0] * 81 + [0.0] * 182)
    assert interval.low == pytest.approx(0.2553, abs=5e-5)
    assert interval.high == pytest.approx(0.3662, abs=5e-5)


def test_gain_interval_of_a_known_case():
    # Newcombe 1998 (differences), method 10, 56/70 - 48/80: 0.2 with 0.0524 to 0.3339.
    summary = summarise({"t": [1.0] * 48 + [0.0] * 32}, {"t": [1.0] * 56 + [0.0] * 14}, seconds={})
    gain = summary.tasks["t"].gain
    assert (gain.value, gain.low, gain.high) == pytest.approx((0.2, 0.0524, 0.3339), abs=5e-5)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_certainty_needs_more_than_a_few_problems(value):
    interval = accuracy([value] * 10)
    assert interval.low <= value <= interval.high
    assert interval.high - interval.low > 0.25


def test_broken_verdicts_do_not_count_and_shaped_rewards_are_refused():
    assert accuracy([1.0, math.nan, 0.0]).count == 2
    assert accuracy([math.nan]).percent() == "none valid"
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        accuracy([1.0, -0.5])


def test_overall_pools_problems_not_tasks(tmp_path):
    before = {"a": np.zeros(90), "b": np.ones(10)}
    summary = summarise(
        before,
        {"a": np.ones(90), "b": np.full(10, np.nan)},
        seconds={"wall": 3},
        transcripts=[Transcript("1+1=", Answer("3", False), Answer("", None), "a", "2")],
    )
    assert list(summary.tasks) == ["a", "b", "overall"]
    assert summary.headline is not None and summary.headline.before.value == pytest.approx(0.1)
    assert summary.headline.after.count == 90
    summary.save(tmp_path / "summary.json")
    loaded = load_summary(tmp_path / "summary.json")
    assert loaded is not None and loaded.transcripts == summary.transcripts and loaded.seconds == {"wall": 3.0}
    assert loaded.tasks["a"] == summary.tasks["a"] and math.isnan(loaded.tasks["b"].after.value)
    assert load_summary(tmp_path / "none.json") is None
    with pytest.raises(ValueError, match="same tasks"):
        summarise(before, {"a": [1.0]}, seconds={})

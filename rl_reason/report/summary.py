"""summary.json: what a run achieved on held-out problems, with honest intervals.

Intervals are 95%: Wilson's for a share of problems solved, Newcombe's (1998, method 10) for the gain, which treats
before and after as independent and so is, on the same problems, rather too wide than too narrow.
"""

import dataclasses
import json
import math
import pathlib
import typing
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from rl_reason.report.files import to_json, write_atomic

Z = 1.959963984540054  # normal quantile of 97.5%
OVERALL = "overall"
Outcomes = Sequence[typing.SupportsFloat] | np.ndarray


@dataclasses.dataclass(frozen=True)
class Interval:
    """A mean in [0, 1] (a gain: [-1, 1]) with its 95% interval; NaN when ``count`` problems are none."""

    value: float
    low: float
    high: float
    count: int

    def percent(self, *, signed: bool = False) -> str:
        """As text, in percent.

        >>> Interval(0.5, 0.25, 0.75, 8).percent()
        '50.0 [25.0, 75.0]'
        """
        if self.count == 0:
            return "none valid"
        return f"{100 * self.value:{'+' if signed else ''}.1f} [{100 * self.low:.1f}, {100 * self.high:.1f}]"


def accuracy(outcomes: Outcomes) -> Interval:
    """Mean of one outcome in [0, 1] a problem; NaN outcomes, where the verifier failed, are left out.

    Wilson's interval; for means over several samples of a problem it is too wide, never too narrow, as their
    variance is at most p (1 - p).

    >>> accuracy([1.0, 1.0, 0.0, 1.0]).percent()
    '75.0 [30.1, 95.4]'
    """
    values = np.asarray(outcomes, np.float64)
    values = values[~np.isnan(values)]
    n = values.size
    if n == 0:
        return Interval(math.nan, math.nan, math.nan, 0)
    if values.min() < 0 or values.max() > 1:
        raise ValueError(f"Outcomes lie in [0, 1], got {values.min()} to {values.max()}; pass the unshaped verdicts.")
    p = float(values.mean())
    centre = (p + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z * math.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2)) / (1 + Z**2 / n)
    # Rounding must not push the interval past the mean at 0 and 1.
    return Interval(p, max(0.0, min(p, centre - half)), min(1.0, max(p, centre + half)), n)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A task before and after training."""

    before: Interval
    after: Interval

    @property
    def gain(self) -> Interval:
        """After minus before."""
        a, b = self.before, self.after
        d = b.value - a.value
        low = d - math.sqrt((b.value - b.low) ** 2 + (a.high - a.value) ** 2)
        high = d + math.sqrt((b.high - b.value) ** 2 + (a.value - a.low) ** 2)
        return Interval(d, max(-1.0, low), min(1.0, high), min(a.count, b.count))


@dataclasses.dataclass(frozen=True)
class Answer:
    """A completion and the verdict on it; ``correct`` None: the verifier failed."""

    completion: str
    correct: bool | None


@dataclasses.dataclass(frozen=True)
class Transcript:
    """One held-out prompt, answered before and after training."""

    prompt: str
    before: Answer
    after: Answer
    task: str = ""
    gts: str = ""  # the right answer, where there is one


@dataclasses.dataclass(frozen=True)
class Summary:
    """What summary.json holds. ``tasks`` ends with "overall", over all problems, when there are several."""

    tasks: dict[str, Comparison]
    seconds: dict[str, float]  # "wall", "warm-up", "compile" and the like
    transcripts: list[Transcript] = dataclasses.field(default_factory=list)
    majority: dict[str, float] = dataclasses.field(default_factory=dict)  # before, after, right_to_wrong, ...

    @property
    def headline(self) -> Comparison | None:
        """Overall, or the only task; None without evaluation."""
        return next(reversed(self.tasks.values()), None) if self.tasks else None

    def save(self, path: pathlib.Path) -> None:
        """Writes it as JSON, NaN as null, the numbers that scripts look for first."""
        headline = self.headline
        first = {
            "heldout_before": headline.before.value if headline else None,
            "heldout_after": headline.after.value if headline else None,
            "warmup_seconds": self.seconds.get("warm-up"),
            "wall_seconds": self.seconds.get("wall"),
        }
        write_atomic(path, to_json(first | dataclasses.asdict(self), indent=2) + "\n")


def summarise(
    before: Mapping[str, Outcomes],
    after: Mapping[str, Outcomes],
    *,
    seconds: Mapping[str, typing.SupportsFloat],
    transcripts: Iterable[Transcript] = (),
    majority: Mapping[str, float] | None = None,
) -> Summary:
    """A summary of outcomes by task, one a problem, in [0, 1].

    Raises:
        ValueError: when the two do not have the same tasks.
    """
    if set(before) != set(after):
        raise ValueError(f"Evaluated before: {sorted(before)}, after: {sorted(after)}; evaluate the same tasks.")
    tasks = {task: Comparison(accuracy(before[task]), accuracy(after[task])) for task in before}
    if len(tasks) > 1:
        pooled = [np.concatenate([np.asarray(side[task], np.float64) for task in before]) for side in (before, after)]
        tasks[OVERALL] = Comparison(accuracy(pooled[0]), accuracy(pooled[1]))
    times = {name: float(value) for name, value in seconds.items()}
    return Summary(tasks, times, list(transcripts), dict(majority or {}))


def load_summary(path: pathlib.Path) -> Summary | None:
    """The summary of a run; None when it has not finished."""
    if not path.exists():
        return None
    data = json.loads(path.read_text(encoding="utf-8"))

    def interval(side: Mapping[str, typing.Any]) -> Interval:
        values = [math.nan if side[name] is None else float(side[name]) for name in ("value", "low", "high")]
        return Interval(*values, count=side["count"])

    return Summary(
        {task: Comparison(interval(c["before"]), interval(c["after"])) for task, c in data["tasks"].items()},
        {name: math.nan if value is None else float(value) for name, value in data["seconds"].items()},
        [
            Transcript(**{**record, "before": Answer(**record["before"]), "after": Answer(**record["after"])})
            for record in data["transcripts"]
        ],
        data.get("majority", {}),
    )

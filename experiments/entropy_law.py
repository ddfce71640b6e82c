"""python -m experiments.entropy_law --run=DIR [--run=DIR ...]: does reward follow entropy, and covariance move it?

Fits the law of arXiv:2505.22617, R = -a exp(H) + b, to each run, beside a straight line; foretells the run from its first
15% of steps; and holds the covariance of log-probabilities and advantages, where the objective logs it, against the measured
fall of entropy. Prints a table, and writes entropy_law.json and entropy_law.png into --out.
"""

import argparse
import dataclasses
import pathlib
import sys
from collections.abc import Sequence

import numpy as np

from rl_reason.report.entropy_law import EARLY, Law, entropy_law
from rl_reason.report.files import to_json, write_atomic
from rl_reason.report.metrics import read_metrics
from rl_reason.report.plots import plot_law
from rl_reason.report.rundir import RunDir, RunError, load_config


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.entropy_law",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--run", action="append", required=True, metavar="DIR", help="a run's directory; repeatable")
    parser.add_argument("--out", metavar="DIR", help="where the files go (default: the first run's directory)")
    args = parser.parse_args(argv)
    out = pathlib.Path(args.out or args.run[0])
    laws, points = {}, {}
    try:
        for place in dict.fromkeys(args.run):
            paths = RunDir(pathlib.Path(place))
            load_config(paths.path)
            columns = read_metrics(paths.metrics)
            law = entropy_law(columns)
            if law is None:
                raise RunError(f"{place} has too few steps, or an entropy that does not move; nothing can be fitted.")
            laws[paths.name], points[paths.name] = law, (columns["actor/entropy"], columns["critic/score/mean"])
    except (RunError, OSError, KeyError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    out.mkdir(parents=True, exist_ok=True)
    print(table(laws))
    write_atomic(out / "entropy_law.json", to_json({name: dataclasses.asdict(law) for name, law in laws.items()}))
    write_atomic(out / "entropy_law.png", plot_law(laws, points))
    print(f"{out / 'entropy_law.json'}\n{out / 'entropy_law.png'}")
    return 0


def table(laws: dict[str, Law]) -> str:
    """A line a run."""
    headings = ("run", "a", "b", "R^2", "R^2 of a line", f"error after {EARLY:.0%}", "flat", "Cov > 0", "r(Cov, -dH)")
    rows: list[tuple[str, ...]] = [headings]
    for name, law in laws.items():
        drift = ("-", "-") if law.drift is None else (f"{law.drift.positive:.0%}", f"{law.drift.correlation:.2f}")
        fits = (
            f"{law.exponential.a:.3f}",
            f"{law.exponential.b:.3f}",
            f"{law.exponential.r2:.2f}",
            f"{law.linear.r2:.2f}",
        )
        errors = ["-" if np.isnan(x) else f"{x:.3f}" for x in (law.foretold_error, law.flat_error)]
        rows.append((name, *fits, *errors, *drift))
    widths = [max(len(row[i]) for row in rows) for i in range(len(headings))]
    return "\n".join("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows)


if __name__ == "__main__":
    sys.exit(main())

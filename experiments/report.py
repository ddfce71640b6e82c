"""python -m experiments.report --run=DIR [--run=DIR ...]: rebuilds a run's report, or compares several runs."""

import argparse
import pathlib
import sys
from collections.abc import Sequence

from rl_reason.report.html import write_comparison, write_report
from rl_reason.report.rundir import RunError


def main(argv: Sequence[str] | None = None) -> int:
    """Writes report.html and plots/ of one run in its directory, of several in --out; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m experiments.report", description=__doc__, allow_abbrev=False)
    parser.add_argument("--run", action="append", required=True, metavar="DIR", help="a run's directory; repeatable")
    parser.add_argument("--out", metavar="DIR", help="where a comparison goes (default: comparison/ beside the first)")
    args = parser.parse_args(argv)
    runs = [pathlib.Path(run) for run in dict.fromkeys(args.run)]
    if args.out and len(runs) == 1:
        parser.error("--out is for comparisons; the report of one run lies in its directory.")
    try:
        if len(runs) == 1:
            report = write_report(runs[0])
        else:
            report = write_comparison(runs, args.out or runs[0].parent / "comparison")
    except (RunError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(report)
    print(report.parent / "plots")
    return 0


if __name__ == "__main__":
    sys.exit(main())

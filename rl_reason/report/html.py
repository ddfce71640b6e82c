"""report.html: a run, or several compared, on one page that needs no other file (the plots are inlined)."""

import base64
import datetime
import html
import math
import os
import pathlib
import typing
from collections.abc import Iterable, Mapping, Sequence
from urllib.parse import quote

import numpy as np

from rl_reason.report.closing import majority_line, shorten
from rl_reason.report.console import duration, human
from rl_reason.report.files import to_json, visible, write_atomic
from rl_reason.report.metrics import read_metrics
from rl_reason.report.panels import has_values
from rl_reason.report.plots import RunData, draw_plots
from rl_reason.report.rollouts import read_rollouts, rollout_steps
from rl_reason.report.rundir import ABSENT, RunDir, RunError, flatten, load_config
from rl_reason.report.summary import OVERALL, Answer, Comparison, Summary, Transcript, load_summary

TAIL = 0.1  # "last" in the tables is the mean over this share of the steps
SAMPLES = 4  # completions shown of a step
TABLE = (  # rows of the metrics table
    "critic/score/mean",
    "critic/rewards/mean",
    "actor/entropy",
    "actor/ppo_kl",
    "actor/pg_clipfrac",
    "actor/grad_norm",
    "cohort/label_accuracy",
    "cohort/group_vote_accuracy",
    "cohort/calibration",
    "clip_cov/fraction",
    "kl_cov/fraction",
    "response_length/mean",
    "response_length/clip_ratio",
    "rollout_corr/abs_diff_mean",
    "rollout_corr/abs_diff_max",
    "frac_reward_zero_std",
    "reward/error_fraction",
    "perf/throughput",
    "timing_s/step",
)

_CSS = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, "Segoe UI", Helvetica, Arial, sans-serif; color: #222; background: #fff;
       max-width: 1180px; margin: 0 auto; padding: 28px 24px 60px; }
h1 { font-size: 25px; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 40px 0 12px; padding-bottom: 5px; border-bottom: 1px solid #ddd; }
.dim { color: #6b6b6b; } .right { color: #1c7a45; } .wrong { color: #b3261e; } .broken { color: #8a6500; }
.headline { font-size: 19px; margin: 14px 0 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 14px; }
th, td { padding: 4px 18px 4px 0; text-align: left; vertical-align: top; }
th { font-weight: 600; border-bottom: 1px solid #bbb; }
td { border-bottom: 1px solid #eee; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
tr.total td { font-weight: 600; }
code, pre, td.mono { font: 13px/1.45 ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; }
td.mono { overflow-wrap: anywhere; } td.mono:first-child { white-space: nowrap; }
td.mono:first-child:has(pre) { white-space: normal; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 3px 0 0; padding: 9px 11px; background: #f6f7f8;
      border-radius: 5px; }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 360px), 1fr)); gap: 18px 12px; }
.plots a { display: block; } .plots img { width: 100%; display: block; }
.transcript { margin: 0 0 26px; } .pair { display: grid; grid-template-columns: 1fr 1fr; gap: 14px; margin-top: 8px; }
@media (max-width: 720px) { .pair { grid-template-columns: 1fr; } }
.label { font-size: 13px; font-weight: 600; }
details summary { cursor: pointer; margin: 6px 0; }
ul.files { list-style: none; padding: 0; columns: 2; } ul.files li { margin: 2px 0; }
"""


def write_report(run: str | pathlib.Path) -> pathlib.Path:
    """Draws the plots of a run and writes its report.html; works on unfinished runs too.

    Raises:
        RunError: when the directory holds no run.
    """
    paths = RunDir(pathlib.Path(run))
    config = load_config(paths.path)
    data = _load(paths)
    images = draw_plots([data], paths.plots)
    body = [
        _header(data, config),
        _section("Held-out accuracy", _accuracy_table(data.summary)),
        _section("Plots", _plots(images, paths.plots, paths.path)),
        _section("Before and after", _transcripts(data.summary)),
        _section("Completions during training", _samples(paths.rollouts)),
        _section("Metrics", _metrics_table([data])),
        _section("Config", _config_table(config)),
        _section("Files", _files(paths)),
    ]
    write_atomic(paths.report, _page(data.name, body))
    return paths.report


def write_comparison(runs: Sequence[str | pathlib.Path], out: str | pathlib.Path) -> pathlib.Path:
    """Overlays the plots of several runs in ``out``/plots, and writes ``out``/report.html with what differs.

    Raises:
        RunError: when a directory holds no run, or ``out`` holds one, whose report would be lost.
    """
    out = pathlib.Path(out)
    if (out / "config.json").exists():
        raise RunError(f"{out} holds a run, whose report the comparison would replace; choose another --out=DIR.")
    directories = [RunDir(pathlib.Path(run)) for run in runs]
    configs = [load_config(directory.path) for directory in directories]
    loaded = [_load(directory) for directory in directories]
    names = _distinct([run.name for run in loaded], [str(directory.path) for directory in directories])
    loaded = [RunData(name, run.columns, run.summary) for name, run in zip(names, loaded, strict=True)]
    images = draw_plots(loaded, out / "plots")
    links = "".join(
        f"<li><a href='{_href(paths.report, out)}'>{_text(name)}</a></li>"
        for name, paths in zip(names, directories, strict=True)
    )
    title = f"{len(loaded)} runs compared"
    body = [
        f"<h1>{title}</h1><p class=dim>{_now()}</p><ul>{links}</ul>",
        _section("Held-out accuracy", _accuracy_by_run(loaded)),
        _section("Plots", _plots(images, out / "plots", out)),
        _section("Metrics", _metrics_table(loaded)),
        _section("Config, where it differs", _config_differences(names, configs)),
    ]
    write_atomic(out / "report.html", _page(title, body))
    return out / "report.html"


def _load(paths: RunDir) -> RunData:
    columns = read_metrics(paths.metrics) if paths.metrics.exists() else {"step": np.zeros(0, np.int64)}
    return RunData(paths.name, columns, load_summary(paths.summary))


def _distinct(names: Sequence[str], paths: Sequence[str]) -> list[str]:
    """The names, or the paths of those that share one."""
    return [path if names.count(name) > 1 else name for name, path in zip(names, paths, strict=True)]


def _page(title: str, body: Iterable[str]) -> str:
    return (
        "<!doctype html>\n<html lang=en><head><meta charset=utf-8>"
        "<meta name=viewport content='width=device-width, initial-scale=1'>"
        f"<title>{_text(title)}</title><style>{_CSS}</style></head>\n<body>\n" + "\n".join(body) + "\n</body></html>\n"
    )


def _header(data: RunData, config: Mapping[str, typing.Any]) -> str:
    facts = []
    if len(steps := data.columns["step"]):
        facts.append(f"{steps[-1]} steps")
    if data.summary:
        facts += [f"{name} {duration(value)}" for name, value in data.summary.seconds.items()]
    else:
        facts.append("not finished")
    parts = [f"<h1>{_text(data.name)}</h1>"]
    if data.summary and (best := data.summary.headline):
        parts.append(
            f"<p class=headline>Held-out accuracy <b>{_share(best.before.value)} → {_share(best.after.value)}</b>"
            f", {_gain(best)} points</p>"
        )
        if data.summary.majority:
            parts.append(f"<p class=dim>{_text(majority_line(data.summary.majority))}</p>")
    parts.append(f"<p class=dim>{_text(' · '.join(facts))}<br>written {_now()}</p>")
    return "".join(parts)


def _section(title: str, content: str) -> str:
    """A section; nothing when it would be empty."""
    return f"<h2>{_text(title)}</h2>\n{content}" if content else ""


def _table(headings: Sequence[str], rows: Iterable[tuple[str, Sequence[str]]], *, numbers: int = 1) -> str:
    """Cells are HTML; columns from ``numbers`` on are right-aligned; each row comes with its class."""
    head = "".join(f"<th{' class=n' if i >= numbers else ''}>{_text(text)}</th>" for i, text in enumerate(headings))
    body = "".join(
        f"<tr{f' class={kind}' if kind else ''}>"
        + "".join(f"<td{' class=n' if i >= numbers else ' class=mono'}>{cell}</td>" for i, cell in enumerate(cells))
        + "</tr>\n"
        for kind, cells in rows
    )
    return f"<div class=scroll><table><tr>{head}</tr>\n{body}</table></div>"


def _accuracy_table(summary: Summary | None) -> str:
    if summary is None or not summary.tasks:
        return ""
    rows = [("total" if task == OVERALL else "", [_text(task), *_cells(row)]) for task, row in summary.tasks.items()]
    return _table(("task", "problems", "before, %", "after, %", "gain, points"), rows) + (
        "<p class=dim>In brackets: 95% intervals. Problems whose verifier failed are left out.</p>"
    )


def _accuracy_by_run(runs: Sequence[RunData]) -> str:
    rows = [("", [_text(run.name), *_cells(c)]) for run in runs if run.summary and (c := run.summary.headline)]
    return _table(("run", "problems", "before, %", "after, %", "gain, points"), rows) if rows else ""


def _cells(row: Comparison) -> list[str]:
    return [str(row.after.count), row.before.percent(), row.after.percent(), _gain(row)]


def _gain(row: Comparison) -> str:
    gain = row.gain
    kind = "right" if gain.low > 0 else "wrong" if gain.high < 0 else "dim"
    return f"<span class={kind}>{gain.percent(signed=True)}</span>"


def _plots(images: Mapping[str, bytes], directory: pathlib.Path, base: pathlib.Path) -> str:
    """Inlined, each a link to its file; the grid is only linked, since it repeats the others."""
    figures = "".join(
        f"<a href='{_href(directory / f'{name}.png', base)}'>"
        f"<img alt='{_text(name.replace('_', ' '))}'"
        f" src='data:image/png;base64,{base64.b64encode(png).decode()}'></a>\n"
        for name, png in images.items()
        if name != "overview"
    )
    return f"<div class=plots>{figures}</div>" if figures else "<p class=dim>No metrics yet.</p>"


def _transcripts(summary: Summary | None) -> str:
    return "".join(_transcript(transcript) for transcript in summary.transcripts) if summary else ""


def _transcript(transcript: Transcript) -> str:
    expected = f" · expected <code>{_text(transcript.gts)}</code>" if transcript.gts else ""
    return (
        f"<div class=transcript><div class=label>{_text(transcript.task) or 'prompt'}"
        f"<span class=dim>{expected}</span></div>{_pre(transcript.prompt)}<div class=pair>"
        f"<div>{_answer('before', transcript.before)}</div><div>{_answer('after', transcript.after)}</div>"
        "</div></div>\n"
    )


def _answer(label: str, answer: Answer) -> str:
    kind, verdict = {
        True: ("right", "✓ correct"),
        False: ("wrong", "✗ wrong"),
        None: ("broken", "? the verifier failed"),
    }[answer.correct]
    return f"<div class=label>{label} <span class={kind}>{verdict}</span></div>{_pre(answer.completion)}"


def _samples(directory: pathlib.Path) -> str:
    """The first completions of the first and of the last dumped step."""
    steps = rollout_steps(directory)
    parts = []
    for step in dict.fromkeys([*steps[:1], *steps[-1:]]):
        rows = []
        records = read_rollouts(directory, step)
        policies = dict.fromkeys(record.get("policy", "") for record in records)
        shown = [r for name in policies for r in [r for r in records if r.get("policy", "") == name][:SAMPLES]]
        for record in shown:
            score = record.get("score")
            cells = [_pre(str(record.get("input", ""))), _pre(str(record.get("output", "")))]
            ending = "failed" if score is None else f"{score:.3g}", str(record.get("finish_reason"))
            by = [_text(record["policy"])] if "policy" in record else []
            rows.append(("", [*by, *cells, *ending]))
        first = ["policy"] if any(policies) else []
        table = _table((*first, "prompt", "completion", "reward", "ended by"), rows, numbers=2 + len(first))
        parts.append(f"<details><summary>step {step}</summary>{table}</details>")
    return "".join(parts)


def _metrics_table(runs: Sequence[RunData]) -> str:
    """First and last of a run, last of several; means over a tenth of the steps, since single steps are noise."""
    several = len(runs) > 1
    rows = []
    for name in TABLE:
        cells = [cell for run in runs for cell in _first_last(run, name)[several:]]
        if any(cell != "–" for cell in cells):
            rows.append(("", [_text(name), *cells]))
    if not rows:
        return ""
    headings = [run.name for run in runs] if several else ["first 10%", "last 10%"]
    corner = "mean over the last 10% of steps" if several else "mean over the"
    return _table((corner, *headings), rows)


def _first_last(run: RunData, name: str) -> tuple[str, str]:
    if not has_values(run.columns, name):
        return "–", "–"
    values = run.columns[name][np.isfinite(run.columns[name])]
    size = max(1, round(TAIL * len(values)))
    form = human if name == "perf/throughput" else "{:.4g}".format
    return form(float(values[:size].mean())), form(float(values[-size:].mean()))


def _config_table(config: Mapping[str, typing.Any]) -> str:
    rows = [("", [_text(key), _text(to_json(value))]) for key, value in flatten(config).items()]
    table = _table(("key", "value"), rows, numbers=2)
    return f"<details{' open' if len(rows) <= 60 else ''}><summary>{len(rows)} values</summary>{table}</details>"


def _config_differences(names: Sequence[str], configs: Sequence[Mapping[str, typing.Any]]) -> str:
    flat = [flatten(config) for config in configs]
    keys = dict.fromkeys(key for config in flat for key in config)
    rows = []
    for key in keys:
        values = [to_json(config[key]) if key in config else ABSENT for config in flat]
        if len(set(values)) > 1:
            rows.append(("", [_text(key), *map(_text, values)]))
    return _table(("key", *names), rows, numbers=1 + len(names)) if rows else "<p class=dim>Nothing.</p>"


def _files(paths: RunDir) -> str:
    written = {name: path for name, path in paths.written().items() if path != paths.report}
    if (paths.plots / "overview.png").exists():
        written["all plots in one"] = paths.plots / "overview.png"
    items = "".join(
        f"<li><a href='{_href(path, paths.path)}'>{_text(name)}</a> <span class=dim>{_text(path.name)}</span></li>"
        for name, path in written.items()
    )
    return f"<ul class=files>{items}</ul>"


def _pre(text: str) -> str:
    return f"<pre>{_text(shorten(text, max_lines=60, max_characters=4000))}</pre>"


def _text(text: str) -> str:
    return html.escape(visible(text))


def _href(path: pathlib.Path, base: pathlib.Path) -> str:
    return quote(os.path.relpath(path, base) + ("/" if path.is_dir() else ""))


def _share(value: float) -> str:
    return "unknown" if math.isnan(value) else f"{100 * value:.1f}%"


def _now() -> str:
    return f"{datetime.datetime.now():%Y-%m-%d %H:%M}"

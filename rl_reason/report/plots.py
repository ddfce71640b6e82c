"""PNG plots of a run, or of several overlaid, one file a panel and a grid of the main ones.

Built on Figure and FigureCanvasAgg, without pyplot and without rcParams: both are global, and a run has threads.
"""

import dataclasses
import io
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter, ScalarFormatter

from rl_reason.report.entropy_law import EARLY, MIN_POINTS, Law, fit_entropy
from rl_reason.report.files import write_atomic
from rl_reason.report.panels import Columns, Panel, agreements, has_values, labels_for, panels_for, step_times
from rl_reason.report.summary import OVERALL, Interval, Summary

COLOURS = ("#2f6db3", "#d1632a", "#3a9272", "#a0568f", "#c9a227", "#5aa9c9", "#7a7a7a")  # apart for colour-blind eyes
DASHES = ("-", (0, (4, 1.5)), (0, (1, 1.2)), (0, (5, 1, 1, 1)))
INK, FAINT, GRID = "#222222", "#8a8a8a", "#e4e4e4"
SIZE = (5.2, 3.1)  # inches
DPI = 150
MIN_SMOOTHED = 20  # points


@dataclasses.dataclass(frozen=True)
class RunData:
    """What is drawn of a run."""

    name: str
    columns: Columns
    summary: Summary | None = None


def smooth(values: np.ndarray) -> np.ndarray:
    """Gaussian average over about a twentieth of the points, renormalised where points are not finite or run out."""
    sigma = max(1.5, len(values) / 60)
    reach = math.ceil(3 * sigma)
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    finite = np.isfinite(values)

    def spread(x: np.ndarray) -> np.ndarray:
        return np.convolve(x, kernel)[reach : reach + len(values)]

    weight = spread(finite.astype(np.float64))
    return np.where(weight > 1e-9, spread(np.where(finite, values, 0.0)) / np.maximum(weight, 1e-9), np.nan)


def draw_plots(runs: Sequence[RunData], directory: pathlib.Path) -> dict[str, bytes]:
    """Writes the plots below ``directory``, removes those of before, and returns the PNGs by name; "overview" first.

    Metrics that no run has are left out, so this gives nothing for a run without metrics.
    """
    drawers: dict[str, Callable[[Axes], None]] = {}
    main: list[str] = []
    if any(run.summary and run.summary.tasks for run in runs):
        drawers["heldout"] = lambda ax: _draw_heldout(ax, runs)
        main.append("heldout")
    names = dict.fromkeys(name for run in runs for name in run.columns if has_values(run.columns, name))
    for panel in panels_for(names):
        drawers[panel.name] = lambda ax, panel=panel: _draw_panel(ax, panel, runs)
        main += [panel.name] if panel.overview else []
        if panel.name == "entropy" and any(_entropy_reward(run.columns) for run in runs):
            drawers["entropy_reward"] = lambda ax: _draw_entropy_reward(ax, runs)
            main.append("entropy_reward")
    if len(runs) == 1 and agreements(runs[0].columns)[1]:
        drawers["agreement"] = lambda ax: _draw_agreement(ax, runs[0])
        main.append("agreement")
    timed = [run for run in runs if has_values(run.columns, "timing_s/step")]
    if timed or (len(runs) == 1 and step_times(runs[0].columns)):
        drawers["time"] = lambda ax: _draw_times(ax, runs)
        main.append("time")
    # Panels of metrics that nothing claims come last, whatever was appended after them.
    order = sorted(drawers, key=lambda name: name.startswith("other_"))
    images = {}
    if main:
        images["overview"] = _render([drawers[name] for name in main], columns=min(3, len(main)), dpi=110)
    images |= {name: _render([drawers[name]], columns=1, dpi=DPI) for name in order}
    for old in directory.glob("*.png"):
        if old.stem not in images:
            old.unlink()
    for name, png in images.items():
        write_atomic(directory / f"{name}.png", png)
    return images


def _render(drawers: Sequence[Callable[[Axes], None]], *, columns: int, dpi: int) -> bytes:
    rows = math.ceil(len(drawers) / columns)
    figure = Figure(figsize=(SIZE[0] * columns, SIZE[1] * rows), dpi=dpi, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)  # type: ignore[union-attr]
    for index, draw in enumerate(drawers):
        draw(figure.add_subplot(rows, columns, index + 1))
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _style(ax: Axes, title: str, ylabel: str, xlabel: str = "step", *, integers: bool = True) -> None:
    ax.set_title(title, loc="left", fontsize=10, fontweight="bold", color=INK, pad=8)
    ax.set_xlabel(xlabel, fontsize=8.5, color=INK)
    ax.set_ylabel(ylabel, fontsize=8.5, color=INK)
    ax.tick_params(labelsize=8, colors=INK, length=0)
    ax.grid(axis="y", color=GRID, linewidth=0.8)
    ax.set_axisbelow(True)
    for side in ("top", "right", "left"):
        ax.spines[side].set_visible(False)
    ax.spines["bottom"].set_color(FAINT)
    numbers = ScalarFormatter(useMathText=True)
    numbers.set_powerlimits((-3, 5))
    ax.yaxis.set_major_formatter(numbers)
    ax.yaxis.get_offset_text().set(fontsize=7.5, color=INK)
    if integers:
        ax.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))


def _legend(ax: Axes, **place: object) -> None:
    handles, labels = ax.get_legend_handles_labels()
    if handles:
        ax.legend(handles, labels, fontsize=7.5, frameon=False, labelcolor=INK, **{"loc": "best", **place})


def _draw_panel(ax: Axes, panel: Panel, runs: Sequence[RunData]) -> None:
    """Lines of one panel: colours tell metrics apart, or, with several runs, runs, and dashes metrics."""
    names = dict.fromkeys(name for run in runs for name in run.columns if has_values(run.columns, name))
    metrics = panel.metrics(names)
    if len(metrics) > 1 and all(_same(run.columns, metrics[0], other) for run in runs for other in metrics[1:]):
        metrics = metrics[:1]  # unshaped rewards are the scores: one line, not one over another
    labels = labels_for(metrics)
    seen: list[np.ndarray] = []
    for r, run in enumerate(runs):
        for m, name in enumerate(metrics):
            if not has_values(run.columns, name):
                continue
            finite = np.isfinite(run.columns[name])
            steps, values = run.columns["step"][finite], run.columns[name][finite]
            seen.append(values)
            several = len(runs) > 1
            label = labels[name] if len(metrics) > 1 else ""
            if several:
                label = f"{run.name}, {label}" if label else run.name
            colour = COLOURS[(r if several else m) % len(COLOURS)]
            dash = DASHES[m % len(DASHES)] if several else "-"
            _line(ax, panel, steps, values, colour, dash, label)
    _style(ax, panel.title, panel.unit)
    _limits(ax, panel, np.concatenate(seen))
    _legend(ax)


def _line(
    ax: Axes, panel: Panel, steps: np.ndarray, values: np.ndarray, colour: str, dash: object, label: str
) -> None:
    """A smoothed line over the raw one, faint; few points are drawn as they are, with marks."""
    style = {"color": colour, "linewidth": 1.7, "linestyle": dash, "label": label}
    if panel.exact or len(values) < MIN_SMOOTHED:
        ax.plot(steps, values, marker="o" if len(values) < MIN_SMOOTHED else None, markersize=3, **style)
        return
    ax.plot(steps, values, color=colour, linewidth=0.7, alpha=0.25)
    # Where one reads logarithms, one expects their mean.
    smoothed = np.exp(smooth(np.log(values))) if panel.log and values.min() > 0 else smooth(values)
    ax.plot(steps, smoothed, **style)


def _limits(ax: Axes, panel: Panel, values: np.ndarray) -> None:
    """The panel's bounds; outliers, such as one exploded gradient, are cut off rather than flatten the rest."""
    low, high = float(values.min()), float(values.max())
    if panel.log and low > 0 and high > 30 * low:
        ax.set_yscale("log")
        return
    top = float(np.percentile(values, 99)) if len(values) >= 50 else high
    if panel.bounds[1] is None and high > 3 * top > 0:
        high = top
        ax.annotate("outliers above not shown", (0.99, 1.0), xycoords="axes fraction", ha="right", va="bottom",
                    fontsize=7, color=FAINT)  # fmt: skip
    low = low if panel.bounds[0] is None else min(low, panel.bounds[0])
    high = high if panel.bounds[1] is None else max(high, panel.bounds[1])
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 0.5
    ax.set_ylim(low if low == panel.bounds[0] else low - margin, high + margin)


def _same(columns: Columns, one: str, other: str) -> bool:
    if one not in columns or other not in columns:
        return one not in columns and other not in columns
    return np.array_equal(columns[one], columns[other], equal_nan=True)


def _entropy_reward(columns: Columns) -> tuple[np.ndarray, np.ndarray] | None:
    """The two columns, when there are enough points to look at together."""
    if not (has_values(columns, "actor/entropy") and has_values(columns, "critic/score/mean")):
        return None
    entropy, reward = columns["actor/entropy"], columns["critic/score/mean"]
    return (entropy, reward) if (np.isfinite(entropy) & np.isfinite(reward)).sum() >= MIN_POINTS else None


def _draw_entropy_reward(ax: Axes, runs: Sequence[RunData]) -> None:
    """Reward against entropy, a point a step, with the fitted law of arXiv:2505.22617."""
    for r, run in enumerate(runs):
        pair = _entropy_reward(run.columns)
        if pair is None:
            continue
        entropy, reward = pair
        colour = COLOURS[r % len(COLOURS)]
        if len(runs) == 1:
            _by_step(ax, entropy, reward, run.columns["step"])
        else:
            ax.scatter(entropy, reward, color=colour, s=7, linewidths=0, alpha=0.3)
        fit = fit_entropy(entropy, reward)
        if fit is not None:
            h = np.linspace(np.nanmin(entropy), np.nanmax(entropy), 100)
            text = f"R = {-fit.a:.3g} exp(H) {'+' if fit.b >= 0 else '−'} {abs(fit.b):.3g}   R² = {fit.r2:.2f}"
            line = {"color": INK if len(runs) == 1 else colour, "linewidth": 1.4}
            ax.plot(h, fit.b - fit.a * np.exp(h), label=text if len(runs) == 1 else f"{run.name}: {text}", **line)
    _style(ax, "Reward against entropy", "mean score", "policy entropy H, nats per token", integers=False)
    _legend(ax)


def _by_step(ax: Axes, x: np.ndarray, y: np.ndarray, step: np.ndarray) -> None:
    """A point a step, coloured by it, with a scale of colours beside."""
    dots = ax.scatter(x, y, c=step, cmap="viridis", s=9, linewidths=0, alpha=0.8)
    bar = ax.figure.colorbar(dots, ax=ax, pad=0.02, aspect=30)
    bar.set_label("step", fontsize=8, color=INK)
    bar.ax.tick_params(labelsize=7.5, colors=INK, length=0)
    bar.outline.set_visible(False)  # type: ignore[operator]


def _draw_agreement(ax: Axes, run: RunData) -> None:
    """How often two policies of a cohort gave one answer to a prompt, at first and in the end, as a matrix."""
    policies, pairs = agreements(run.columns)
    size = len(policies)
    shares = np.full((size, size), np.nan)
    for (a, b), (first, last) in pairs.items():
        for i, j in ((policies.index(a), policies.index(b)), (policies.index(b), policies.index(a))):
            shares[i, j] = last
            ax.text(j, i, f"{first:.2f} → {last:.2f}", ha="center", va="center", fontsize=8,
                    color="white" if last > 0.55 else INK)  # fmt: skip
    _style(
        ax, "Agreement of two policies", "", "share of pairs of samples with one answer, first → last", integers=False
    )
    ax.imshow(shares, cmap="Blues", vmin=0.0, vmax=1.0, aspect="auto")
    ax.grid(visible=False)
    ax.set_xticks(range(size), policies)
    ax.set_yticks(range(size), policies)


def _draw_times(ax: Axes, runs: Sequence[RunData]) -> None:
    """Where a step's seconds go, stacked; of several runs, or of a fused loop, the whole step only.

    Slow steps, which compiled or evaluated, are left out: they would flatten all others.
    """
    parts = step_times(runs[0].columns)
    if len(runs) > 1 or not parts:
        totals = []
        for run in runs:
            if has_values(run.columns, "timing_s/step"):
                seconds = run.columns["timing_s/step"]
                usual = {"step": run.columns["step"], "timing_s/step": np.where(_slow(seconds), np.nan, seconds)}
                totals.append(RunData(run.name, usual))
            else:
                totals.append(RunData(run.name, {}))  # keeps the colours of the others
        _draw_panel(ax, Panel("time", "Time per step", "seconds", ("timing_s/step",), (0.0, None)), totals)
        return
    total = sum(parts.values(), np.zeros(len(runs[0].columns["step"])))
    slow = _slow(total)
    steps = runs[0].columns["step"]
    usual = {name: part[~slow] for name, part in parts.items() if part[~slow].any()}
    layers = np.array([smooth(part) if len(part) >= MIN_SMOOTHED else part for part in usual.values()])
    colours = [FAINT if name == "other" else COLOURS[i % len(COLOURS)] for i, name in enumerate(usual)]
    ax.stackplot(steps[~slow], layers, labels=list(usual), colors=colours, alpha=0.85, linewidth=0)
    _style(ax, "Time per step", "seconds")
    ax.set_ylim(0, 1.35 * float(layers.sum(axis=0).max()))
    if slow.any():
        at = int(total.argmax())
        ax.annotate(f"slowest: step {steps[at]}, {total[at]:.1f} s", (1.0, 1.0), xycoords="axes fraction",
                    ha="right", va="bottom", fontsize=7.5, color=FAINT)  # fmt: skip
    _legend(ax, loc="upper left", ncols=min(4, len(usual)))


def _slow(seconds: np.ndarray) -> np.ndarray:
    return seconds > 1.6 * np.nanmedian(seconds)


def _draw_heldout(ax: Axes, runs: Sequence[RunData]) -> None:
    """Held-out accuracy before and after with 95% intervals: by task, or, of several runs, overall."""
    rows: dict[str, Mapping[str, Interval]] = {}
    for run in runs:
        if run.summary is None or run.summary.headline is None:
            continue
        chosen = run.summary.tasks if len(runs) == 1 else {run.name: run.summary.headline}
        rows |= {name: {"before": c.before, "after": c.after} for name, c in chosen.items()}
    for offset, side, colour in ((-0.19, "before", "#b9bfc7"), (0.19, "after", COLOURS[0])):
        shown = [(i + offset, row[side]) for i, row in enumerate(rows.values()) if row[side].count]
        at, means = [y for y, _ in shown], [interval.value for _, interval in shown]
        ax.barh(at, means, height=0.36, color=colour, label=side)
        errors = [[v.value - v.low for _, v in shown], [v.high - v.value for _, v in shown]]
        ax.errorbar(means, at, xerr=errors, fmt="none", ecolor=INK, elinewidth=0.9, capsize=2)
        for y, interval in shown:
            ax.text(min(interval.high + 0.015, 1.12), y, f"{100 * interval.value:.1f}", va="center", fontsize=7.5)
    _style(ax, "Held-out accuracy", "", "problems solved, with 95% intervals", integers=False)
    ax.grid(axis="y", visible=False)
    ax.grid(axis="x", color=GRID, linewidth=0.8)
    ax.set_yticks(range(len(rows)), list(rows))
    for label in ax.get_yticklabels():
        label.set_fontweight("bold" if label.get_text() == OVERALL and len(rows) > 1 else "normal")
    ax.set_ylim(max(len(rows), 3) - 0.5, -0.5)  # downwards; a lone bar stays a bar
    ax.set_xlim(0, 1.12)
    ax.set_xticks([0, 0.25, 0.5, 0.75, 1])
    ax.xaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
    _legend(ax, loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2, borderaxespad=0.2)


def plot_law(laws: Mapping[str, Law], points: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> bytes:
    """A PNG: each run's reward against its entropy, the law of all steps, and that of the first ones, dashed, as it foretold
    the rest."""

    def draw(name: str) -> Callable[[Axes], None]:
        def on(ax: Axes) -> None:
            law, (entropy, reward) = laws[name], points[name]
            _by_step(ax, entropy, reward, np.arange(1, len(reward) + 1))
            h = np.linspace(np.nanmin(entropy), np.nanmax(entropy), 100)
            for fit, dash, label in (
                (law.exponential, "-", "all steps"),
                (law.early, (0, (4, 1.5)), f"first {EARLY:.0%}"),
            ):
                if fit is not None:
                    text = f"{label}: {fit.b:.2f} − {fit.a:.2g} exp(H)   R² = {fit.r2:.2f}"
                    ax.plot(h, fit.b - fit.a * np.exp(h), color=INK, linewidth=1.4, linestyle=dash, label=text)
            ax.set_ylim(0, 1)
            _style(ax, name, "mean score", "policy entropy H, nats per token", integers=False)
            _legend(ax)

        return on

    return _render([draw(name) for name in laws], columns=min(3, len(laws)), dpi=DPI)

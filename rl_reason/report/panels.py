"""Which metrics share a plot, as data. A metric that no panel claims gets a small plot of its own in "other"."""

import dataclasses
import fnmatch
import itertools
import re
from collections.abc import Iterable, Mapping

import numpy as np

from rl_reason.report.metrics import WALL_TIME

Columns = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Panel:
    """One pair of axes: the metrics that match ``patterns``, against the step."""

    name: str  # of its file
    title: str
    unit: str  # of the vertical axis
    patterns: tuple[str, ...]
    bounds: tuple[float | None, float | None] = (None, None)  # the axis covers at least these, where given
    log: bool = False  # logarithmic, where all values are positive and span more than a factor of 30
    exact: bool = False  # a schedule, not a measurement: drawn without smoothing
    overview: bool = True  # part of the grid

    def metrics(self, names: Iterable[str]) -> list[str]:
        """Those of ``names`` that it draws, in the order of its patterns."""
        names = list(names)
        return list(dict.fromkeys(n for pattern in self.patterns for n in names if fnmatch.fnmatchcase(n, pattern)))


PANELS: tuple[Panel, ...] = (
    Panel("reward", "Reward", "mean per completion", ("critic/score/mean", "critic/rewards/mean"), (0.0, None)),
    Panel("auc", "Right samples above wrong ones", "area under the curve", ("reward/*_auc",), (0.5, 1.0)),
    Panel("train_accuracy", "Training accuracy by task", "fraction correct", ("train/accuracy/*",), (0.0, 1.0)),
    Panel(
        "cohort",
        "Votes of the cohort",
        "fraction",
        (
            "cohort/label_accuracy",
            "cohort/group_vote_accuracy",
            "cohort/reward_accuracy",
            "cohort/consistency",
            "cohort/labelled_fraction",
        ),
        (0.0, 1.0),
    ),
    Panel("policy_score", "Accuracy by policy", "mean per completion", ("*/critic/score/mean",), (0.0, 1.0)),
    Panel("policy_majority", "Majority of each policy", "fraction right", ("*/majority_accuracy",), (0.0, 1.0)),
    Panel("self_consistency", "Self-consistency by policy", "fraction", ("*/self_consistency",), (0.0, 1.0)),
    Panel(
        "calibration", "Self-consistency against a right majority", "correlation", ("cohort/calibration",), (0.0, None)
    ),
    Panel("answered", "Samples with an answer", "fraction", ("*/answered_fraction",), (0.0, 1.0), overview=False),
    Panel("policy_entropy", "Entropy by policy", "nats per token", ("*/actor/entropy",), (0.0, None), overview=False),
    Panel("heldout_over_time", "Held-out accuracy", "fraction correct", ("val-core/*",), (0.0, 1.0)),
    Panel("entropy", "Policy entropy", "nats per token", ("actor/entropy",), (0.0, None)),
    Panel("preference_loss", "Preference loss", "nats per pair", ("actor/preference_loss",), (0.0, None)),
    Panel("implicit_rewards", "Implicit rewards", "nats", ("rewards/chosen", "rewards/rejected", "rewards/margins")),
    Panel(
        "pair_accuracy",
        "Pairs in the right order",
        "fraction of pairs",
        ("rewards/accuracies", "heldout_pairs/*"),
        (0.0, 1.0),
    ),
    Panel("pair_logprobs", "Log-probability of completions", "nats", ("logps/chosen", "logps/rejected")),
    Panel(
        "response_length",
        "Response length",
        "tokens",
        ("response_length/mean", "response_length/max", "response_length/chosen", "response_length/rejected"),
        (0.0, None),
    ),
    Panel(
        "truncated", "Cut at the token limit", "fraction of responses", ("response_length/clip_ratio",), (0.0, None)
    ),
    Panel(
        "selected_tokens",
        "Tokens selected by covariance",
        "fraction of tokens",
        ("clip_cov/fraction", "kl_cov/fraction"),
        (0.0, None),
    ),
    Panel("pg_clipfrac", "Tokens clipped by the ratio", "fraction of tokens", ("actor/pg_clipfrac*",), (0.0, None)),
    Panel("ppo_kl", "KL from the rollout policy", "nats per token", ("actor/ppo_kl",)),
    Panel(
        "kl_reference", "KL from the reference policy", "nats per token", ("actor/kl_loss", "actor/kl*"), (0.0, None)
    ),
    Panel("grad_norm", "Gradient norm", "before clipping", ("actor/grad_norm",), (0.0, None), log=True),
    Panel("pg_loss", "Policy loss", "loss", ("actor/pg_loss",), overview=False),
    Panel("lr", "Learning rate", "per step", ("actor/lr",), (0.0, None), exact=True, overview=False),
    Panel(
        "rollout_corr",
        "Sampler against trainer",
        "|Δ log-probability|, nats",
        ("rollout_corr/abs_diff_mean", "rollout_corr/abs_diff_max"),
        log=True,
    ),
    Panel("rollout_kl", "Sampler against trainer, KL (k3)", "nats per token", ("rollout_corr/k3_kl",), overview=False),
    Panel(
        "groups",
        "Groups that teach nothing",
        "fraction",
        ("frac_reward_zero_std", "reward/error_fraction"),
        (0.0, None),
    ),
    Panel("throughput", "Throughput", "tokens/s", ("perf/throughput",), (0.0, None)),
)

TIMES = "timing_s/*"  # drawn stacked
NOT_PARTS = ("timing_s/step", WALL_TIME)  # of a step's time
# Bookkeeping, or an envelope that would only add ink.
UNPLOTTED = (
    "step", "training/*", "critic/*/max", "critic/*/min", "response_length/min", TIMES, "perf/time_per_step",
    "*/training/*", "self_consistency", "majority_accuracy", "answered_fraction",
)  # fmt: skip
AGREEMENT = "cohort/agreement/"  # <policy>_<policy>; drawn as a matrix

LABELS = {
    "reward/mean_probability_auc": "mean probability",
    "reward/likelihood_auc": "likelihood",
    "critic/score/mean": "score",
    "critic/rewards/mean": "with shaping",
    "clip_cov/fraction": "Clip-Cov",
    "kl_cov/fraction": "KL-Cov",
    "rewards/accuracies": "trained on",
    "heldout_pairs/accuracy": "held out, reward",
    "heldout_pairs/likelihood_accuracy": "held out, likelihood",
    "heldout_pairs/likelihood_accuracy_before": "held out, likelihood before",
    "cohort/label_accuracy": "label right",
    "cohort/group_vote_accuracy": "plain vote right",
    "cohort/reward_accuracy": "reward = verdict",
    "cohort/consistency": "rewarded",
    "cohort/labelled_fraction": "labelled",
    "frac_reward_zero_std": "equal rewards in the group",
    "reward/error_fraction": "verifier failed",
}


def panels_for(names: Iterable[str]) -> list[Panel]:
    """The panels that have something to draw, and one more for each metric that none claims.

    A policy's own part of a metric that is there for all policies together gets none.
    """
    known = set(names := list(names))
    names = [name for name in names if not any(fnmatch.fnmatchcase(name, pattern) for pattern in UNPLOTTED)]
    chosen = [panel for panel in PANELS if panel.metrics(names)]
    claimed = {name for panel in chosen for name in panel.metrics(names)}
    rest = sorted(x for x in set(names) - claimed if x.partition("/")[2] not in known and not x.startswith(AGREEMENT))
    return chosen + [Panel(f"other_{slug(name)}", name, "", (_literal(name),), overview=False) for name in rest]


def labels_for(metrics: list[str]) -> dict[str, str]:
    """Legend labels: the known ones, else what tells the names apart.

    >>> labels_for(["response_length/mean", "response_length/max"])
    {'response_length/mean': 'mean', 'response_length/max': 'max'}
    """
    if len(metrics) == 1 or all(name in LABELS for name in metrics):
        return {name: LABELS.get(name, name.rpartition("/")[2]) for name in metrics}
    words = [re.split(r"(?<=[/_])", name) for name in metrics]
    front = _shared(words)
    back = _shared([[*reversed(parts)] for parts in words])
    return {
        name: "".join(parts[front : max(front, len(parts) - back)]).rstrip("/_") or name
        for name, parts in zip(metrics, words, strict=True)
    }


def _shared(words: list[list[str]]) -> int:
    """How many leading items all lists have in common."""
    same = [len(set(column)) == 1 for column in zip(*words, strict=False)]
    return [*same, False].index(False)


def slug(text: str) -> str:
    """``text`` as a file name."""
    return re.sub(r"[^A-Za-z0-9_-]+", "_", text).strip("_") or "unnamed"


def has_values(columns: Columns, name: str) -> bool:
    """Whether a column holds a finite value."""
    return name in columns and bool(np.isfinite(columns[name]).any())


def agreements(columns: Columns) -> tuple[list[str], dict[tuple[str, str], tuple[float, float]]]:
    """The policies of a cohort, and of each two how often they agreed: the mean over the first and the last tenth of the
    steps."""
    pairs = [name.removeprefix(AGREEMENT) for name in columns if name.startswith(AGREEMENT)]
    ending = "/self_consistency"
    policies = [name.removesuffix(ending) for name in columns if name.endswith(ending)]
    found = {}
    for a, b in itertools.permutations(policies, 2):
        if f"{a}_{b}" in pairs and has_values(columns, f"{AGREEMENT}{a}_{b}"):
            values = columns[f"{AGREEMENT}{a}_{b}"]
            values = values[np.isfinite(values)]
            size = max(1, round(0.1 * len(values)))
            found[a, b] = float(values[:size].mean()), float(values[-size:].mean())
    return policies, found


def step_times(columns: Columns, max_parts: int = 6) -> dict[str, np.ndarray]:
    """Seconds of each part of a step, the largest first, small ones and the unmeasured rest as "other"."""
    parts = {
        name.removeprefix("timing_s/"): np.nan_to_num(column)
        for name, column in columns.items()
        if fnmatch.fnmatchcase(name, TIMES) and name not in NOT_PARTS and has_values(columns, name)
    }
    # By the median: one long compilation or evaluation does not make a part large.
    ranked = sorted(parts, key=lambda name: (np.median(parts[name]), parts[name].sum()), reverse=True)
    shown = {name: parts[name] for name in ranked[:max_parts]}
    total = sum(parts.values(), np.zeros(len(columns["step"])))
    if has_values(columns, "timing_s/step"):
        total = np.fmax(total, np.nan_to_num(columns["timing_s/step"]))
    rest = total - sum(shown.values(), np.zeros(len(total)))
    if shown and np.median(rest) > 0.01 * np.median(total):
        shown["other"] = rest
    return shown


def _literal(name: str) -> str:
    return re.sub(r"([*?\[])", r"[\1]", name)

"""How reward follows entropy, and what moves entropy (arXiv:2505.22617): fits of a run's metrics. Pure numpy.

R = -a exp(H) + b             eq. 1: reward is bought with entropy, and b - a is all there is to buy
H_{k+1} - H_k ~ -eta Cov      section 3: entropy falls as log-probabilities and advantages covary
"""

import dataclasses
from collections.abc import Mapping

import numpy as np

MIN_POINTS = 10
EARLY = 0.15  # share of the steps from which the rest is foretold, as in the paper's section 2.4
COVARIANCES = ("clip_cov/covariance_mean", "kl_cov/covariance_mean")  # whichever the objective logs


@dataclasses.dataclass(frozen=True)
class Fit:
    """R = -a x + b with x = exp(H), or H itself; ``r2`` is the share of R's variance that it explains."""

    a: float
    b: float
    r2: float

    @property
    def ceiling(self) -> float:
        """R at H = 0 of the exponential law."""
        return self.b - self.a


@dataclasses.dataclass(frozen=True)
class Drift:
    """Whether covariance moves entropy: its mean sign, and how well it goes with the fall of entropy (Pearson's r)."""

    positive: float  # share of steps
    correlation: float


@dataclasses.dataclass(frozen=True)
class Law:
    """What a run shows of both."""

    exponential: Fit
    linear: Fit
    early: Fit | None  # the exponential law of the first steps
    foretold_error: float  # root mean square of reward beyond those steps, by ``early``; NaN without it
    flat_error: float  # the same by the reward that those steps ended with: what foretelling has to beat
    drift: Drift | None


def fit_entropy(entropy: np.ndarray, reward: np.ndarray) -> Fit | None:
    """Least squares of reward on exp(entropy), nats; None with too few points or a constant entropy."""
    return _fit(np.exp(entropy), reward)


def _fit(x: np.ndarray, y: np.ndarray) -> Fit | None:
    finite = np.isfinite(x) & np.isfinite(y)
    x, y = x[finite], y[finite]
    if x.size < MIN_POINTS or np.ptp(x) < 1e-6:
        return None
    dx, dy = x - x.mean(), y - y.mean()
    a = -float(dx @ dy / (dx @ dx))
    b = float(y.mean() + a * x.mean())
    spread = float(dy @ dy)
    residual = y - (b - a * x)
    return Fit(a, b, 1.0 - float(residual @ residual) / spread if spread > 0 else 0.0)


def entropy_law(columns: Mapping[str, np.ndarray]) -> Law | None:
    """Both fits, the extrapolation and the drift of a run's metrics; None with too few steps."""
    entropy, reward = (np.asarray(columns[name], float) for name in ("actor/entropy", "critic/score/mean"))
    exponential, linear = fit_entropy(entropy, reward), _fit(entropy, reward)
    if exponential is None or linear is None:
        return None
    cut = round(EARLY * len(reward))
    early = fit_entropy(entropy[:cut], reward[:cut])
    rest = reward[cut:]
    rms = lambda error: float(np.sqrt(np.nanmean(error**2)))
    foretold = rms(early.b - early.a * np.exp(entropy[cut:]) - rest) if early else float("nan")
    flat = rms(np.nanmean(reward[max(cut - MIN_POINTS, 0) : cut]) - rest) if cut else float("nan")
    return Law(exponential, linear, early, foretold, flat, _drift(columns, entropy))


def _drift(columns: Mapping[str, np.ndarray], entropy: np.ndarray) -> Drift | None:
    found = next((np.asarray(columns[name], float) for name in COVARIANCES if name in columns), None)
    if found is None:
        return None
    # Entropy is measured on rows that an update has not seen yet: what step k does shows in step k + 1.
    change, cause = np.diff(entropy), found[:-1]
    finite = np.isfinite(change) & np.isfinite(cause)
    if finite.sum() < MIN_POINTS:
        return None
    both = np.corrcoef(cause[finite], -change[finite])
    return Drift(float((cause[finite] > 0).mean()), float(both[0, 1]))

"""Fits of reward and entropy find what they were given, and the command says what it found."""

import json

import numpy as np
import pytest

from experiments import entropy_law as cli
from rl_reason.report.entropy_law import entropy_law, fit_entropy


def test_the_fit_finds_the_law_it_was_given():
    entropy = np.linspace(0.1, 1.4, 40)
    fit = fit_entropy(np.append(entropy, np.nan), np.append(1.2 - 0.3 * np.exp(entropy), 1.0))
    assert fit is not None
    assert (fit.a, fit.b, fit.r2, fit.ceiling) == pytest.approx((0.3, 1.2, 1.0, 0.9))
    assert fit_entropy(entropy[:5], entropy[:5]) is None
    assert fit_entropy(np.ones(40), entropy) is None


def columns(steps=100):
    """Entropy falls by a tenth of the covariance, which halves it every 20 steps; reward obeys the law."""
    entropy = 0.8 * 0.5 ** (np.arange(steps) / 20)
    covariance = -10 * np.diff(entropy, append=entropy[-1] * 0.5 ** (1 / 20))
    reward = 1.1 - 0.35 * np.exp(entropy)
    return {"actor/entropy": entropy, "critic/score/mean": reward, "clip_cov/covariance_mean": covariance}


def test_a_run_that_obeys_is_foretold():
    law = entropy_law(columns())
    assert law is not None and law.early is not None and law.drift is not None
    assert (law.exponential.a, law.exponential.b, law.exponential.r2) == pytest.approx((0.35, 1.1, 1.0))
    assert (law.early.a, law.early.b) == pytest.approx((0.35, 1.1))
    assert law.foretold_error == pytest.approx(0, abs=1e-9) and law.flat_error > 0.1
    assert 0.9 < law.linear.r2 < 1.0
    assert (law.drift.positive, law.drift.correlation) == pytest.approx((1.0, 1.0))


def test_covariance_against_the_measured_change():
    # Of steps with changes -1 and +1 in turn and covariances 1 and -1, all agree; shifted by one step, none does.
    entropy = np.where(np.arange(41) % 2 == 0, 1.0, 0.0)
    cause = np.where(np.arange(41) % 2 == 0, 1.0, -1.0)
    rows = {"actor/entropy": entropy, "critic/score/mean": entropy}
    agree = entropy_law(rows | {"kl_cov/covariance_mean": cause}).drift
    against = entropy_law(rows | {"kl_cov/covariance_mean": -cause}).drift
    assert (agree.positive, agree.correlation) == pytest.approx((0.5, 1.0))
    assert against.correlation == pytest.approx(-1.0)
    assert entropy_law(rows).drift is None
    few = entropy_law({name: x[:40] for name, x in rows.items()})  # the first 15% are six steps
    assert few.early is None and np.isnan(few.foretold_error)


def test_the_command(tmp_path, capsys):
    run = tmp_path / "one"
    run.mkdir()
    (run / "config.json").write_text("{}")
    rows = [dict(zip(columns(), map(float, x), strict=True)) for x in zip(*columns().values(), strict=True)]
    (run / "metrics.jsonl").write_text(
        "".join(json.dumps(dict(step=k + 1) | row) + "\n" for k, row in enumerate(rows))
    )
    assert cli.main([f"--run={run}", f"--out={tmp_path / 'out'}"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[1].split() == ["one", "0.350", "1.100", "1.00", "0.99", "0.000", said[1].split()[6], "100%", "1.00"]
    found = json.loads((tmp_path / "out" / "entropy_law.json").read_text())
    assert found["one"]["exponential"]["a"] == pytest.approx(0.35)
    assert (tmp_path / "out" / "entropy_law.png").read_bytes().startswith(b"\x89PNG")
    assert cli.main([f"--run={tmp_path}"]) == 1
    assert "error:" in capsys.readouterr().err
    (run / "metrics.jsonl").write_text(json.dumps(dict(step=1) | rows[0]) + "\n")
    assert cli.main([f"--run={run}"]) == 1 and "too few steps" in capsys.readouterr().err

import base64
import re

import numpy as np
import pytest

from experiments import report
from rl_reason.report.html import write_report
from rl_reason.report.metrics import MetricsWriter
from rl_reason.report.panels import panels_for, step_times
from rl_reason.report.plots import smooth
from rl_reason.report.rollouts import RolloutWriter
from rl_reason.report.rundir import open_run
from rl_reason.report.summary import Answer, Transcript, summarise


def make_run(root, name, *, steps=30, seed=0, method="clip_cov", finished=True):
    """A run whose entropy falls and whose reward follows R = -0.3 exp(H) + 1.2."""
    rng = np.random.default_rng(seed)
    run = open_run({"method": method, "seed": seed, "optimizer": {"lr": 1e-3}}, config_name="c", run=name, root=root)
    rows = []
    for step in range(1, steps + 1):
        entropy = 0.3 + np.exp(-step / 10) + rng.normal(0, 0.01)
        parts = {"timing_s/gen": rng.uniform(0.4, 0.5), "timing_s/update_actor": 0.2}
        parts |= {"timing_s/compile": 20.0} if step == 1 else {}
        rows.append(
            {
                "step": step,
                "training/global_step": step,
                "critic/score/mean": -0.3 * np.exp(entropy) + 1.2,
                "actor/entropy": entropy,
                "actor/grad_norm": 300.0 if step == 7 else rng.uniform(0.3, 0.5),
                "response_length/mean": rng.uniform(30, 40),
                f"{method}/fraction": 2e-4,
                "reward/error_fraction": np.nan if step == 3 else 0.0,
                "my/own [metric]": rng.normal(),
                **parts,
                "timing_s/step": sum(parts.values()) + 0.1,
            }
        )
    with MetricsWriter(run.path) as writer:
        writer.append(rows)
    records = [dict(input="1+1=", output="<b>2</b>\x1b[0m", gts="2", score=None, group_id=0, sample_id=0,
                    finish_reason="stop")]  # fmt: skip
    RolloutWriter(run.rollouts).write(steps, records)
    if finished:
        transcript = Transcript("1+1=", Answer("<script>x</script>", False), Answer("2", True), "add", "2")
        outcomes = [{"add": rng.random(50) < p, "mul": rng.random(50) < p} for p in (0.2, 0.9)]
        summarise(*outcomes, seconds={"wall": 75}, transcripts=[transcript]).save(run.summary)
    return run


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    make_run(root, "one")
    make_run(root, "two", seed=1, method="kl_cov", steps=12)
    return root


def test_the_report_is_one_file_with_all_that_was_found(root):
    page = write_report(root / "one").read_text()
    images = re.findall(r"src='data:image/png;base64,([^']+)'", page)
    names = {path.stem for path in (root / "one" / "plots").glob("*.png")}
    assert {"overview", "heldout", "reward", "entropy", "entropy_reward", "selected_tokens", "time"} <= names
    assert "other_my_own_metric" in names and "throughput" not in names and "ppo_kl" not in names
    assert len(images) == len(names) - 1
    assert all(base64.b64decode(image).startswith(b"\x89PNG") for image in images)
    assert not re.search(r"src='(?!data:)|<script|\x1b|https?:", page)
    assert "&lt;script&gt;" in page and r"&lt;b&gt;2&lt;/b&gt;\x1b[0m" in page
    assert "optimizer.lr" in page and "href='metrics.jsonl'" in page and "1:15" in page
    assert re.search(r"Held-out accuracy <b>\d+\.\d% → \d+\.\d%</b>", page)


def test_a_run_just_begun_or_without_metrics_has_a_report(tmp_path):
    short = make_run(tmp_path, "short", steps=1, finished=False)
    short.plots.mkdir()
    (short.plots / "throughput.png").touch()  # of an earlier report
    assert "not finished" in write_report(short.path).read_text()
    assert (short.plots / "reward.png").exists() and not (short.plots / "throughput.png").exists()
    empty = open_run({}, config_name="c", run="empty", root=tmp_path)
    assert "No metrics yet" in write_report(empty.path).read_text()
    assert not empty.plots.exists()


def test_the_command_compares_runs_by_name(root, capsys):
    assert report.main([f"--run={root}/one", f"--run={root}/two"]) == 0
    assert str(root / "comparison" / "report.html") in capsys.readouterr().out
    page = (root / "comparison" / "report.html").read_text()
    assert "href='../one/report.html'" in page
    assert re.search(r"<td class=mono>method</td><td class=mono>&quot;clip_cov&quot;</td>", page)
    assert "optimizer.lr" not in page  # the same in both


def test_the_command_refuses_what_is_no_run_and_what_would_be_lost(root, capsys):
    assert report.main([f"--run={root}/none"]) == 1
    assert re.search(r"error: .*none holds no run.*latest first: ", capsys.readouterr().err)
    assert report.main([f"--run={root}/one", f"--run={root}/two", f"--out={root}/one"]) == 1
    assert "choose another --out=DIR" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        report.main([f"--run={root}/one", "--out=x"])


def test_smoothing_keeps_constants_and_bridges_gaps():
    values = np.full(50, 3.0)
    values[[0, 20, 49]] = np.nan
    np.testing.assert_allclose(smooth(values), 3.0)


def test_every_metric_is_drawn_once_and_bookkeeping_never():
    names = ["step", "training/global_step", "timing_s/gen", "actor/kl_loss", "actor/ppo_kl", "a/b", "a/[b]"]
    drawn = [name for panel in panels_for(names) for name in panel.metrics(names)]
    assert sorted(drawn) == ["a/[b]", "a/b", "actor/kl_loss", "actor/ppo_kl"]


def test_step_times_add_up_to_the_step():
    columns = {f"timing_s/p{i}": np.full(4, 2.0**-i) for i in range(9)} | {"timing_s/step": np.full(4, 2.5)}
    parts = step_times({"step": np.arange(4), **columns}, max_parts=3)
    assert list(parts) == ["p0", "p1", "p2", "other"]
    np.testing.assert_allclose(sum(parts.values()), 2.5)

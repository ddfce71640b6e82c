"""The verifier pool: verdicts come back whatever verifiers do."""

import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest

from rl_reason.data.sources import make_source
from rl_reason.tasks.base import Problem
from rl_reason.verifier_pool import Job, VerifierPool, check_verifier
from rl_reason.verifier_worker import load_verifier

FIXTURES = pathlib.Path(__file__).parents[1] / "data"


@pytest.fixture(autouse=True)
def _fixtures_are_importable(monkeypatch):
    monkeypatch.syspath_prepend(str(FIXTURES))


def command(text: str) -> Job:
    return Job("fake_verifiers:on_command", text, Problem("source", 0, {"ground_truth": "", "extra_info": {}}))


def exact(completion: str, truth: str) -> Job:
    return Job("fake_verifiers:exact", completion, Problem("source", 0, {"ground_truth": truth, "extra_info": None}))


def gone(pid: int, within_s: float = 5.0) -> bool:
    end = time.monotonic() + within_s
    while time.monotonic() < end:
        try:
            os.kill(pid, 0)
            if pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (ProcessLookupError, FileNotFoundError):
            return True
        time.sleep(0.02)
    return False


@pytest.fixture(scope="module")
def pool():
    with VerifierPool(2, 0.5) as pool:
        yield pool


def test_verdicts_keep_the_order_of_jobs(pool):
    jobs = [exact(str(i), str(i - i % 3)) for i in range(500)]
    verdicts = pool.score(jobs)
    assert [verdict.score for verdict in verdicts] == [float(i % 3 == 0) for i in range(500)]
    assert all(verdict.valid for verdict in verdicts)
    assert pool.score(jobs) == verdicts


def test_no_jobs_and_no_processes_before_the_first():
    with VerifierPool(2, 0.5) as pool:
        assert pool.score([]) == []
        assert not pool._threads and not pool._workers


def test_tasks_verify_and_their_parts_come_back(pool):
    problem = Problem("sums", 3, {"score": 0.25})
    good, broken = pool.score([Job("fake_verifiers:echo", text, problem) for text in ("abc", "broken")])
    assert good == (0.25, True, "sums/3", (("length", 3.0),))
    assert (broken.score, broken.valid) == (0.0, False) and "cannot tell" in broken.why


def test_oracles_satisfy_their_verifiers(pool):
    source = make_source(tasks=["sort", "add"], seed=0)
    examples = [source.example(uid) for uid in range(30)]
    right = pool.score([Job(example.verifier, example.demonstration, example.problem) for example in examples])
    assert all(verdict.valid and verdict.score == 1 for verdict in right)
    wrong = pool.score([Job(example.verifier, "no idea", example.problem) for example in examples])
    assert all(verdict.valid and verdict.score == 0 for verdict in wrong)


def test_dict_extras_become_parts_and_text(pool):
    problem = Problem("source", 0, {"ground_truth": "", "extra_info": {"index": 7}})
    (verdict,) = pool.score([Job("fake_verifiers:detailed", "x=1", problem)])
    assert (verdict.score, verdict.valid) == (1.0, True)
    assert dict(verdict.parts) == {"format": 0.5, "index": 7.0}
    assert verdict.why == "nan=nan, pred=x=1"


def test_the_worker_imports_no_jax(pool):
    (verdict,) = pool.score([Job("fake_verifiers:sees_jax", "", Problem("s", 0, {}))])
    assert verdict.valid and verdict.score == 0.0


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("raise boom", "raised RuntimeError: boom (fake_verifiers.py:"),
        ("sysexit 0", "raised SystemExit"),
        ("exit 3", "died (exit code 3)"),
        ("exit 0", "died (exit code 0)"),
        ("segfault", "died (SIGSEGV)"),
        ("return float('nan')", "returned nan"),
        ("return float('inf')", "returned inf"),
        ("return -1", "returned -1; scores are in [0, 1]"),
        ("return 'yes'", "returned str, not a number"),
        ("return None", "returned NoneType, not a number"),
        ("return {'acc': 1}", "a dict without 'score': acc"),
        ("return {'score': None}", "returned NoneType"),
        ("hang", "no verdict within 0.5 s"),
    ],
)
def test_a_broken_verifier_is_invalid_and_costs_only_its_job(pool, text, why):
    verdicts = pool.score(
        [*(command("fine") for _ in range(20)), command(text), *(command("fine") for _ in range(20))]
    )
    bad = verdicts.pop(20)
    assert (bad.score, bad.valid) == (0.0, False)
    assert bad.why.startswith("verifier fake_verifiers:on_command") and why in bad.why, bad.why
    assert all(verdict == (1.0, True, "", ()) for verdict in verdicts)


def test_printing_is_harmless(pool):
    assert all(verdict.valid for verdict in pool.score([command("print x")] * 5))


def test_numpy_scores_count(pool):
    verdicts = pool.score([command(f"return __import__('numpy').{kind}(1)") for kind in ("float32", "bool_", "int64")])
    assert [verdict[:2] for verdict in verdicts] == [(1.0, True)] * 3


def test_several_hang_at_once(pool):
    begin = time.monotonic()
    verdicts = pool.score([command("hang" if i in (0, 1, 30, 59) else "fine") for i in range(60)])
    assert [i for i, verdict in enumerate(verdicts) if not verdict.valid] == [0, 1, 30, 59]
    assert time.monotonic() - begin < 5


def test_slow_jobs_within_the_deadline_add_up_beyond_it(pool):
    verdicts = pool.score([command("sleep 0.2")] * 8)  # 0.8 s a worker against 0.5 s a job
    assert all(verdict.valid for verdict in verdicts)


def test_threads_may_share_a_pool_and_submit_does_not_wait(pool):
    results = {}

    def score(name: str):
        results[name] = [verdict.score for verdict in pool.score([exact(name, str(i)) for i in range(200)])]

    threads = [threading.Thread(target=score, args=(str(i),)) for i in range(4)]
    for thread in threads:
        thread.start()
    begin = time.monotonic()
    future = pool.submit([command("sleep 0.3")] * 2)
    assert time.monotonic() - begin < 0.2
    for thread in threads:
        thread.join()
    assert all(results[str(n)] == [float(i == n) for i in range(200)] for n in range(4))
    assert [verdict.valid for verdict in future.result()] == [True, True]


def test_imports_have_a_deadline_of_their_own(monkeypatch, tmp_path):
    function = "def compute_score(data_source, solution_str, ground_truth, extra_info=None):\n    return 1.0\n"
    for name, seconds in (("slow_import", 0.7), ("hanging_import", 1000)):
        (tmp_path / f"{name}.py").write_text(f"import time\ntime.sleep({seconds})\n{function}")
    monkeypatch.syspath_prepend(str(tmp_path))
    slow = Job("slow_import:compute_score", "", Problem("s", 0, {}))
    hanging = Job("hanging_import:compute_score", "", Problem("s", 0, {}))
    with VerifierPool(1, 0.3, load_deadline_s=1.5) as pool:
        assert pool.score([slow])[0].valid
        begin = time.monotonic()
        verdicts = pool.score([hanging] * 20 + [exact("1", "1")])
        assert time.monotonic() - begin < 5  # once, not 20 times
    assert all("no import within 1.5 s" in verdict.why and not verdict.valid for verdict in verdicts[:20])
    assert verdicts[20].valid


def test_a_verifier_that_is_not_there_is_invalid_everywhere(pool):
    verdicts = pool.score(
        [Job("nowhere:f", "", Problem("s", 0, {})), Job("fake_verifiers:g", "", Problem("s", 0, {}))]
    )
    assert not any(verdict.valid for verdict in verdicts)
    assert "nowhere" in verdicts[0].why and "'g'" in verdicts[1].why


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS is Linux's")
def test_memory_may_be_limited():
    with VerifierPool(1, 5.0, max_memory_bytes=2 << 30) as pool:
        small, large, after = pool.score([command(f"allocate {n}") for n in (1 << 20, 8 << 30, 1 << 20)])
    assert small.valid and after.valid
    assert not large.valid and "MemoryError" in large.why


@pytest.mark.parametrize(("program", "message"), [("false", "did not start"), ("nowhere", "nowhere")])
def test_a_pool_that_cannot_start_says_so(monkeypatch, program, message):
    monkeypatch.setattr(sys, "executable", shutil.which(program) or program)
    with VerifierPool(2, 1.0) as pool:
        for _ in range(2):
            with pytest.raises((RuntimeError, OSError), match=message):
                pool.score([command("fine")] * 10)


def test_a_worker_killed_from_outside_is_replaced():
    job = Job("fake_verifiers:process", "", Problem("s", 0, {}))
    with VerifierPool(1, 5.0) as pool:
        parts = dict(pool.score([job])[0].parts)
        assert parts["parent"] == os.getpid()
        os.kill(int(parts["pid"]), signal.SIGKILL)
        assert gone(int(parts["pid"]))
        again = pool.score([job])[0]
        assert again.valid and dict(again.parts)["pid"] != parts["pid"]


def test_close_leaves_no_process_and_hangs_on_none(tmp_path):
    pool = VerifierPool(1, 60.0)
    future = pool.submit([command(f"spawn {tmp_path / 'pids'}"), command("fine")])
    pids = []
    while len(pids) < 2:
        time.sleep(0.02)
        pids = (tmp_path / "pids").read_text().split() if (tmp_path / "pids").exists() else []
    begin = time.monotonic()
    pool.close()
    assert time.monotonic() - begin < 5
    with pytest.raises(RuntimeError, match="closed"):
        future.result(timeout=1)
    with pytest.raises(RuntimeError, match="closed"):
        pool.score([command("fine")])
    assert all(gone(int(pid)) for pid in pids)
    pool.close()


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's help is Linux's")
@pytest.mark.parametrize("end", ["SIGKILL", "return"])
def test_workers_end_with_their_parent(tmp_path, end):
    program = f"""
import os, signal, sys, time
sys.path.insert(0, {str(FIXTURES)!r})
from rl_reason.tasks.base import Problem
from rl_reason.verifier_pool import Job, VerifierPool
pool = VerifierPool(1, 60.0)
job = lambda name, text: Job("fake_verifiers:" + name, text, Problem("s", 0, {{}}))
print(int(dict(pool.score([job("process", "")])[0].parts)["pid"]), flush=True)
pool.submit([job("on_command", "hang")])
time.sleep(0.2)
if {end!r} == "SIGKILL":
    os.kill(os.getpid(), signal.SIGKILL)
"""
    root = str(FIXTURES.parents[1])
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=30, cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": root},
    )  # fmt: skip
    assert gone(int(done.stdout)), done.stderr
    assert done.returncode == (-signal.SIGKILL if end == "SIGKILL" else 0), done.stderr


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere.at_all:compute_score", "No module named 'nowhere'.*imported from where you run"),
        ("fake_verifiers:nothing", "no attribute 'nothing'"),
        ("fake_verifiers:wrong_signature", r"must be compute_score\(data_source"),
    ],
)
def test_check_verifier_names_the_cure(name, message):
    with pytest.raises(ValueError, match=message):
        check_verifier(name)


def test_check_verifier_accepts_functions_and_tasks():
    check_verifier("fake_verifiers:exact")
    check_verifier("fake_verifiers:echo")
    assert load_verifier("fake_verifiers:exact")("a", Problem("s", 0, {"ground_truth": "a"})).score == 1.0


@pytest.mark.parametrize("arguments", [(0, 1.0), (1, 0.0), (1, -1.0)])
def test_nonsense_is_refused(arguments):
    with pytest.raises(ValueError, match="use at least 1"):
        VerifierPool(*arguments)


def test_throughput_is_not_the_bottleneck(pool):
    jobs = [exact("1", "1")] * 4000
    pool.score(jobs)
    begin = time.monotonic()
    pool.score(jobs)
    assert 4000 / (time.monotonic() - begin) > 2000  # a tenth of what two idle cores do

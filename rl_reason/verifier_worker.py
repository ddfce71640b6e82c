"""The process in which verifiers run: ``python -m rl_reason.verifier_worker <fd> <parent> <bytes>``. Imports no jax.

It answers chunks of jobs with one message a job, in order, so that its parent knows which job runs now. Whatever a
verifier does to this process, its parent outlives it (``verifier_pool``).
"""

import contextlib
import ctypes
import inspect
import json
import math
import multiprocessing.connection
import os
import pickle
import pkgutil
import signal
import sys
import traceback
import typing
from collections.abc import Callable, Mapping

import numpy as np

from rl_reason import tasks
from rl_reason.tasks.base import Problem, Verdict

MAX_WHY_LEN = 500  # characters
READY, LOADING, LOADED = b"ready", b"loading", b"loaded"
Judge = Callable[[str, Problem], Verdict]


def load_verifier(name: str) -> Judge:
    """What ``name`` means: a registered task, or 'module:attribute', a ``compute_score`` function or a task.

    Raises:
        ValueError: when there is none, or it cannot be called as verifiers are.
    """
    if ":" not in name:
        try:
            return tasks.get(name).verify
        except KeyError as error:
            raise ValueError(f"verifier {name!r}: {error.args[0]} Or name a function as 'module:function'.") from error
    try:
        target = pkgutil.resolve_name(name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"verifier {name!r}: {type(error).__name__}: {error}. Name a task, or 'module:compute_score' that can be "
            "imported from where you run."
        ) from error
    if hasattr(target, "verify"):
        return target.verify
    try:
        inspect.signature(target).bind(data_source="", solution_str="", ground_truth="", extra_info=None)
    except TypeError as error:
        raise ValueError(
            f"verifier {name!r}: {error}. It must be compute_score(data_source, solution_str, ground_truth, "
            "extra_info=None) -> float or dict with 'score'."
        ) from error

    def judge(completion: str, problem: Problem) -> Verdict:
        data = problem.data
        score = target(
            data_source=problem.task,
            solution_str=completion,
            ground_truth=data.get("ground_truth"),
            extra_info=data.get("extra_info"),
        )
        return verdict_of(score)

    return judge


def verdict_of(returned: typing.Any) -> Verdict:
    """A ``compute_score``'s float or dict as a verdict: numbers beside 'score' are its parts, text goes to ``why``.

    Raises:
        TypeError: when it is neither.

    >>> verdict_of({"score": 1, "format": 0.5, "pred": "42"})
    Verdict(score=1.0, valid=True, why='pred=42', parts=(('format', 0.5),))
    """
    if not isinstance(returned, Mapping):
        return Verdict(_number(returned), True, "")
    if "score" not in returned:
        raise TypeError(f"returned a dict without 'score': {', '.join(map(str, returned))}")
    parts, words = [], []
    for name, value in returned.items():
        if name == "score":
            continue
        with contextlib.suppress(TypeError):
            number = _number(value)
            if math.isfinite(number):
                parts.append((str(name), number))
                continue
        words.append(f"{name}={value}")
    return Verdict(_number(returned["score"]), True, ", ".join(words), tuple(parts))


def _number(value: typing.Any) -> float:
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, bool | int | float):
        return float(value)
    raise TypeError(f"returned {type(value).__name__}, not a number")


def checked(verdict: typing.Any, verifier: str) -> Verdict:
    """The verdict, or an invalid one that says what is wrong with it."""
    if not isinstance(verdict, Verdict):
        return Verdict(0.0, False, f"verifier {verifier} returned {type(verdict).__name__}, not a Verdict")
    try:
        score, valid, why = _number(verdict.score), bool(verdict.valid), str(verdict.why)[:MAX_WHY_LEN]
        parts = tuple((str(name), _number(value)) for name, value in verdict.parts)
    except (TypeError, ValueError) as error:
        return Verdict(0.0, False, f"verifier {verifier} {error}")
    if not valid:
        return Verdict(0.0, False, f"verifier {verifier}: {why}", parts)
    if not 0 <= score <= 1:  # NaN too
        return Verdict(
            0.0, False, f"verifier {verifier} returned {score:g}; scores are in [0, 1], so rescale it there"
        )
    return Verdict(score, True, why, parts)


def judged(judge: Judge, verifier: str, completion: str, problem: Problem) -> Verdict:
    """The verdict of a job, whatever the verifier raises."""
    try:
        return checked(judge(completion, problem), verifier)
    except BaseException as error:
        return Verdict(0.0, False, f"verifier {verifier} {_raised(error)}")


def _raised(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({os.path.basename(frames[-1].filename)}:{frames[-1].lineno})" if frames else ""
    own = isinstance(error, TypeError) and str(error).startswith("returned ")  # from _number and verdict_of
    return str(error)[:MAX_WHY_LEN] if own else f"raised {type(error).__name__}: {error}"[:MAX_WHY_LEN] + where


def serve(pipe: multiprocessing.connection.Connection) -> None:
    """Answers chunks until the parent hangs up."""
    judges: dict[str, Judge | str] = {}  # or why it could not be loaded
    pipe.send_bytes(READY)
    while True:
        try:
            chunk = pickle.loads(pipe.recv_bytes())
        except (EOFError, OSError):
            return
        for job in chunk:
            verifier, completion, problem = pickle.loads(job)
            if verifier not in judges:
                pipe.send_bytes(LOADING)
                judges[verifier] = _load(verifier)
                pipe.send_bytes(LOADED)
            judge = judges[verifier]
            if isinstance(judge, str):
                verdict = Verdict(0.0, False, judge)
            else:
                verdict = judged(judge, verifier, completion, Problem(*problem))
            pipe.send_bytes(json.dumps(verdict).encode())


def _load(verifier: str) -> Judge | str:
    try:
        return load_verifier(verifier)
    except BaseException as error:
        return f"verifier {verifier} did not load: {_raised(error)}"


def main(fd: int, parent: int, max_memory_bytes: int) -> None:
    """Serves on socket ``fd`` until ``parent`` is gone; 0 bytes are no limit."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    _die_with(parent)
    if max_memory_bytes:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (max_memory_bytes, max_memory_bytes))
    with multiprocessing.connection.Connection(fd) as pipe:
        # Verifiers print; from here on nobody listens, and startup errors have been heard.
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        serve(pipe)


def _die_with(parent: int) -> None:
    """On Linux the kernel ends this process with its parent, even in the middle of a verifier that never returns."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
        if os.getppid() != parent:
            sys.exit("the parent is gone")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))

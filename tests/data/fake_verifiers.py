"""Verifiers for the pool's tests: some good, most not. Imported by worker processes."""

import ctypes
import os
import sys
import time

from rl_reason.tasks.base import Verdict


def exact(data_source, solution_str, ground_truth, extra_info=None):
    return float(solution_str == ground_truth)


def detailed(data_source, solution_str, ground_truth, extra_info=None):
    return {"score": True, "format": 0.5, "nan": float("nan"), "pred": solution_str, "index": extra_info["index"]}


def on_command(data_source, solution_str, ground_truth, extra_info=None):
    """Does what the completion says."""
    command, _, argument = solution_str.partition(" ")
    if command == "hang":
        time.sleep(1000)
    if command == "sleep":
        time.sleep(float(argument))
    if command == "exit":
        os._exit(int(argument))
    if command == "sysexit":
        sys.exit(int(argument))
    if command == "segfault":
        ctypes.string_at(0)
    if command == "raise":
        raise RuntimeError(argument)
    if command == "print":
        print(argument * 10_000, flush=True)
        print(argument * 10_000, flush=True, file=sys.stderr)
    if command == "allocate":
        return float(len(bytearray(int(argument))) > 0)
    if command == "return":
        return eval(argument)
    if command == "spawn":
        pid = os.fork()
        if not pid:
            time.sleep(1000)
        with open(argument, "w") as file:
            file.write(f"{os.getpid()} {pid}")
        time.sleep(1000)
    return 1.0


def sees_jax(data_source, solution_str, ground_truth, extra_info=None):
    return float("jax" in sys.modules)


def process(data_source, solution_str, ground_truth, extra_info=None):
    return {"score": 1, "pid": os.getpid(), "parent": os.getppid()}


def wrong_signature(text):
    return 1.0


class _Echo:
    """A task, as far as verifying goes."""

    def verify(self, completion, problem):
        if completion == "broken":
            return Verdict(1.0, False, "cannot tell")
        return Verdict(problem.data["score"], True, f"{problem.task}/{problem.level}", (("length", len(completion)),))


echo = _Echo()

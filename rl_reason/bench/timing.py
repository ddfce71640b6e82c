"""Clocks that wait for the device, what a compiled program costs, and what this machine can do at best."""

import dataclasses
import importlib.metadata
import os
import pathlib
import platform
import resource
import statistics
import sys
import time
import typing
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import PyTree


def timed(run: Callable[[], typing.Any]) -> tuple[float, typing.Any]:
    """(seconds until everything that ``run`` returns is computed, what it returned)."""
    began = time.perf_counter()
    out = jax.block_until_ready(run())
    return time.perf_counter() - began, out


MAX_REPEATS = 50


def interleaved(
    things: Mapping[str, Callable[[], typing.Any]], repeats: int, at_least_s: float = 0.0
) -> dict[str, list[float]]:
    """Seconds of each repeat of each thing, in turn (A B A B ...), so that a drifting machine is shared fairly.

    One turn warms up. Then at least ``repeats`` turns, and more (up to MAX_REPEATS) until ``at_least_s`` are spent.
    """
    seconds: dict[str, list[float]] = {name: [] for name in things}
    began = time.perf_counter()
    for turn in range(-1, MAX_REPEATS):
        if turn >= repeats and time.perf_counter() - began > at_least_s:
            break
        for name, run in things.items():
            elapsed = timed(run)[0]
            if turn >= 0:
                seconds[name].append(elapsed)
    return seconds


def median(values: list[float]) -> float:
    """The middle one."""
    return float(statistics.median(values))


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program and what compiling it took."""

    call: Callable[..., typing.Any]
    trace_seconds: float  # Python, to StableHLO
    compile_seconds: float  # XLA
    memory: dict[str, int]  # bytes on a device: arguments, outputs, temporary, aliased, peak; empty if unknown
    xla_flops: float | None  # XLA's own count, in which the body of a loop counts once

    def record(self) -> dict[str, typing.Any]:
        """What goes into the JSON."""
        fields = ("trace_seconds", "compile_seconds", "memory", "xla_flops")
        return {name: getattr(self, name) for name in fields}


def compiled(jitted: typing.Any, *args: PyTree) -> Program:
    """Compiles a jitted function for the shapes and shardings of ``args``."""
    began = time.perf_counter()
    lowered = jitted.lower(*args)
    traced = time.perf_counter()
    executable = lowered.compile()
    done = time.perf_counter()
    return Program(executable, traced - began, done - traced, memory_of(executable), flops_of(executable))


def memory_of(executable: typing.Any) -> dict[str, int]:
    """Bytes on a device while the program runs, by the compiler's reckoning; empty where it gives none."""
    analysis = executable.memory_analysis()
    if analysis is None:
        return {}
    sizes = {
        "arguments": int(analysis.argument_size_in_bytes),
        "outputs": int(analysis.output_size_in_bytes),
        "temporary": int(analysis.temp_size_in_bytes),
        "aliased": int(analysis.alias_size_in_bytes),
    }
    # Outputs that reuse an argument's buffer (donation) are counted once.
    return sizes | {"peak": sizes["arguments"] + sizes["outputs"] + sizes["temporary"] - sizes["aliased"]}


def flops_of(executable: typing.Any) -> float | None:
    """XLA's count, None where it has none."""
    analysis: typing.Any = executable.cost_analysis()
    analysis = analysis[0] if isinstance(analysis, list) and analysis else analysis
    return float(analysis["flops"]) if analysis and "flops" in analysis else None


def matmul_rate(dtype: str, seconds: float) -> dict[str, typing.Any]:
    """FLOP/s of one device on a square product in ``dtype``: sizes double until one takes 20 ms, then the best of
    ``seconds`` of them.
    """
    square = jax.jit(lambda x: x @ x)
    size, elapsed = 512, 0.0
    while elapsed < 0.02 and size < 16384:
        size *= 2
        # Random numbers: a GPU multiplies constants a tenth faster, on less power.
        x = jax.random.normal(jax.random.key(0), (size, size), dtype)
        elapsed = min(_repeat(square, x, 3)[1:])  # the first compiles
    runs = _repeat(square, x, max(3, min(50, int(seconds / elapsed))))
    return {"flops_per_s": 2 * size**3 / min(runs), "size": size, "dtype": dtype, "seconds": runs}


def _repeat(run: Callable[[jax.Array], jax.Array], x: jax.Array, times: int) -> list[float]:
    return [timed(lambda: run(x))[0] for _ in range(times)]


def copy_rate(seconds: float, megabytes: int | None = None) -> dict[str, typing.Any]:
    """Bytes/s of one device, read and written, adding 1 to an array far larger than its caches: the best of some."""
    if megabytes is None:
        megabytes = 256 if jax.default_backend() == "cpu" else 2048
    x = jnp.zeros((megabytes * 2**20 // 4,), jnp.float32)
    add = jax.jit(lambda x: x + 1)
    elapsed = _repeat(add, x, 2)[1]  # the first compiles
    runs = _repeat(add, x, max(3, min(50, int(seconds / elapsed))))
    return {"bytes_per_s": 2 * x.nbytes / min(runs), "bytes": 2 * x.nbytes, "seconds": runs}


def cpu_model() -> str:
    """The processor's name."""
    info = pathlib.Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith(("model name", "Model")):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def machine() -> dict[str, typing.Any]:
    """What the numbers were measured on and with."""
    versions = {}
    for name in ("jax", "jaxlib", "flax", "optax", "numpy", "rl_reason"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": cpu_model(),
        "cores": cores,
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": versions,
        "backend": jax.default_backend(),
        "devices": [device.device_kind for device in jax.devices()],
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


def device_peak() -> int | None:
    """Bytes, the most that any device has held so far; None where devices do not say (CPU)."""
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.local_devices()]
    known = [peak for peak in peaks if peak is not None]
    return max(known) if known else None


def process_peak() -> int:
    """Bytes of resident memory, the most this process has had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024

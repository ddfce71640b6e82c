"""Four CPU devices, and compiled programs kept between test runs; all of it set before jax is imported."""

import os
import pathlib

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    # Four devices play a small pod. Programs here are tiny: halving their compilation is worth slower code.
    flags = "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()
# Callbacks on several CPU devices hang jax 0.10 without a host thread for each device and core.
os.environ.setdefault("NPROC", str(4 + (os.cpu_count() or 1)))
cache = pathlib.Path(os.environ.get("RL_REASON_CACHE") or pathlib.Path.home() / ".cache" / "rl_reason")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache / "tests-compiled"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")  # a thousand small ones add up


@pytest.fixture
def no_rank_promotion():
    """[N] against [N T] without an explicit axis is an error; models do broadcast, losses and advantages never may."""
    import jax

    with jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture
def x64():
    """float64 is float64 inside the test."""
    import jax

    with jax.enable_x64(True):
        yield

"""Shapes checked, four CPU devices, compiled programs kept between test runs: all of it set before jax is imported."""

import gc
import os
import pathlib

import pytest
from jaxtyping import install_import_hook

from tests import quick

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    flags = f"--xla_force_host_platform_device_count=4 {quick.XLA_FLAGS}"  # four devices play a small pod
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()
# Callbacks on several CPU devices hang jax 0.10 without a host thread for each device and core.
os.environ.setdefault("NPROC", str(4 + (os.cpu_count() or 1)))
cache = pathlib.Path(os.environ.get("RL_REASON_CACHE") or pathlib.Path.home() / ".cache" / "rl_reason")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache / "tests-compiled"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")  # a thousand small ones add up

# Where annotations have shapes. To check every call of the others as well, tasks first, takes a fifth of the suite's time.
ROOT = pathlib.Path(__file__).parents[1]
SOURCES = [path for room in ("rl_reason", "kernels") for path in (ROOT / room).rglob("*.py")]
SHAPED = [path for path in SOURCES if "from jaxtyping import" in path.read_text()]
install_import_hook([".".join(path.relative_to(ROOT).with_suffix("").parts) for path in SHAPED], "beartype.beartype")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests of a chip do not pass, or fail in a hundred lines, for want of one: they say what to set."""
    if item.get_closest_marker("gpu"):
        import jax

        if jax.default_backend() != "gpu":
            pytest.fail(f"for a GPU, and jax is on {jax.default_backend()}: set JAX_PLATFORMS=cuda", pytrace=False)


@pytest.fixture(autouse=True)
def nothing_kept_of_absent_chips(request: pytest.FixtureRequest):
    """A program compiled for a TPU that is not here can be kept, but not read again."""
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    def keep(programs):
        jax.config.update("jax_enable_compilation_cache", programs)
        compilation_cache.reset_cache()  # it asks once

    absent = request.node.get_closest_marker("tpu") is not None
    if absent:
        keep(False)
    yield
    if absent:
        keep(True)


@pytest.fixture(autouse=True, scope="module")
def forget_compiled_programs():
    """Each maps pages of memory, of which a process may have some 65,000: a whole suite's would crash the compiler."""
    import jax

    yield
    jax.clear_caches()
    gc.collect()


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

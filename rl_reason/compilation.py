"""Listening to the compiler: how long it took, and whether it was called when it should not have been."""

import time
from collections.abc import Callable, Collection

import jax

LOWERING = "/jax/core/compile/jaxpr_to_mlir_module_duration"  # comes before compiling, and before reading a cache
BACKEND_COMPILE = "/jax/core/compile/backend_compile_duration"


class CompileClock:
    """Seconds spent compiling, and a report of every program that is compiled although it was to be there."""

    def __init__(self):
        self.seconds = 0.0
        self._watched: Collection[str] = ()
        self._on_late: Callable[[str], None] = lambda _: None
        jax.monitoring.register_event_duration_secs_listener(self._heard)

    def watch(self, programs: Collection[str], on_late: Callable[[str], None]) -> None:
        """From now on compiling one of these jitted functions, by name, is a bug and is reported."""
        self._watched, self._on_late = programs, on_late

    def _heard(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == BACKEND_COMPILE:
            self.seconds += duration_secs
        name = str(kwargs.get("fun_name", "")).removeprefix("jit(").removesuffix(")")
        if event == LOWERING and name in self._watched:
            self._on_late(
                f"A program was compiled again after the first step ({name}): some shape, dtype or sharding changes "
                "between calls. Set JAX_LOG_COMPILES=1 to see which."
            )


class Stopwatch:
    """Seconds since it was made."""

    def __init__(self):
        self._began = time.perf_counter()

    def __call__(self) -> float:
        return time.perf_counter() - self._began

"""Listening to the compiler: how long it took, and whether it was called when it should not have been."""

import time
from collections.abc import Callable

import jax

BACKEND_COMPILE = "/jax/core/compile/backend_compile_duration"
NOTABLE_S = 0.5  # a compilation shorter than this after the first step is not worth a warning


class CompileClock:
    """Seconds spent compiling, and a report of every compilation once ``steady`` was called."""

    def __init__(self):
        self.seconds, self.programs = 0.0, 0
        self._on_late: Callable[[str], None] | None = None
        jax.monitoring.register_event_duration_secs_listener(self._heard)

    def steady(self, on_late: Callable[[str], None] | None) -> None:
        """From now on a compilation is a bug and is reported; None: it is expected again."""
        self._on_late = on_late

    def _heard(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event != BACKEND_COMPILE:
            return
        self.seconds += duration_secs
        self.programs += 1
        if self._on_late is not None and duration_secs > NOTABLE_S:
            self._on_late(
                f"A program was compiled again after the first step ({duration_secs:.1f} s): some shape, dtype or sharding "
                "changes between calls. Set JAX_LOG_COMPILES=1 to see which."
            )


class Stopwatch:
    """Seconds since it was made."""

    def __init__(self):
        self._began = time.perf_counter()

    def __call__(self) -> float:
        return time.perf_counter() - self._began

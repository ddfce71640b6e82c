"""SIGTERM and SIGINT: remember that one came, and let the loop stop where its state can be saved."""

import signal
import threading
from collections.abc import Callable


class Interrupts:
    """Install after ``jax.distributed.initialize``, which sets a handler of its own. A second SIGINT stops at once."""

    def __init__(self, announce: Callable[[str], None]):
        self._announce, self._name = announce, ""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._heard)

    @property
    def requested(self) -> str:
        """The signal's name, or nothing."""
        return self._name

    def _heard(self, number: int, _) -> None:
        if self._name and number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            raise KeyboardInterrupt
        self._name = signal.Signals(number).name
        # Not from here: the code that this interrupts may be printing, and hold the locks that printing takes.
        message = f"{self._name}: saving at the next chunk boundary, then stopping."
        threading.Thread(target=self._announce, args=(message,), daemon=True).start()

"""Stop signals: a flag that handlers set and the training loop reads."""

from __future__ import annotations

import signal
import time
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class StopFlag:
    """Set by a signal, read between steps. The handlers do nothing else, as they may run in the middle of anything."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._received_at = 0.0

    @property
    def requested(self) -> bool:
        """True if this process has received a stop signal."""
        return self.signal is not None

    @property
    def seconds(self) -> float | None:
        """Seconds since the first stop signal; None without one."""
        return time.monotonic() - self._received_at if self.requested else None

    def install(self, interactive: bool = False) -> StopFlag:
        """Handle SIGTERM, SIGUSR1 and SIGUSR2, and ignore SIGCONT, which Slurm sends along.

        Args:
            interactive: handle the first Ctrl-C as well; a second one interrupts as usual.
        """
        for number in (*STOP_SIGNALS, signal.SIGINT) if interactive else STOP_SIGNALS:
            signal.signal(number, self._handle)
        signal.signal(signal.SIGCONT, signal.SIG_IGN)
        return self

    def ignore(self) -> None:
        """Ignore stop signals from here on: an interpreter that ends restores their default, and would die of one."""
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def raise_flag(self) -> None:
        """Act as if SIGTERM had been received: for one that came before `install`."""
        self._set(signal.SIGTERM)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._set(signal.Signals(number))
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _set(self, number: signal.Signals) -> None:
        # The first signal is the reason; later ones, such as SIGTERM after our own requeue, do not change it.
        if self.signal is None:
            self._received_at, self.signal = time.monotonic(), number

"""Being told to stop: the flag that signals set, and what to do once the state is on disk."""

from __future__ import annotations

import signal
import time
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class StopFlag:
    """Set by a signal, read between steps. The handlers do nothing else: whatever else they did could happen in the
    middle of anything."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._told: float | None = None

    @property
    def requested(self) -> bool:
        """Whether this process has been told to stop."""
        return self.signal is not None

    @property
    def seconds(self) -> float | None:
        """How long ago this process was told to stop; None if it was not."""
        return None if self._told is None else time.monotonic() - self._told

    def install(self, interactive: bool = False) -> StopFlag:
        """Take over SIGTERM, SIGUSR1 and SIGUSR2, and ignore SIGCONT, which Slurm sends along.

        Args:
            interactive: take over the first Ctrl-C as well; a second one interrupts as usual.
        """
        for number in (*STOP_SIGNALS, signal.SIGINT) if interactive else STOP_SIGNALS:
            signal.signal(number, self._handle)
        signal.signal(signal.SIGCONT, signal.SIG_IGN)
        return self

    def ignore(self) -> None:
        """Ignore these signals from here on: an interpreter that ends puts their default back, and would die of one."""
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def raise_flag(self) -> None:
        """As if SIGTERM had come: for one that came before `install`."""
        if self.signal is None:
            self.signal, self._told = signal.SIGTERM, time.monotonic()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        # The first one tells why; later ones, such as SIGTERM after our own requeue, do not change that.
        if self.signal is None:
            self.signal, self._told = signal.Signals(number), time.monotonic()
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

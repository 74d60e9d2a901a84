"""Process of an attempt: rank and job, stop signals, time of each phase of the start, age."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
FIRST_STEP = "first_step"  # the last phase


@dataclass(frozen=True)
class Launch:
    """Rank and job of this process, from its launcher.

    rendezvous: a file on the shared file system, new for every attempt, where rank 0 publishes its address; None under
        torchrun, whose environment variables name the address.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    scheduler: str | None = None  # "slurm" | "local" (submitit's executor) | None (a plain process or torchrun)
    job_id: str | None = None
    rendezvous: Path | None = None


class Stopwatch:
    """Seconds of each phase of a start. The first one, `process`, is the age of the process."""

    def __init__(self) -> None:
        self.seconds = {"process": process_age()}
        self._last = time.monotonic()

    def lap(self, phase: str) -> None:
        """End `phase`, which began with the last call."""
        now = time.monotonic()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._last
        self._last = now

    @property
    def over(self) -> bool:
        """True if the first step is done."""
        return FIRST_STEP in self.seconds

    @property
    def total(self) -> float:
        """Seconds from the beginning of the process to the last lap."""
        return sum(self.seconds.values())

    def plain(self) -> dict[str, float]:
        """Seconds by phase and `total`, to the millisecond."""
        return {phase: round(seconds, 3) for phase, seconds in (*self.seconds.items(), ("total", self.total))}

    def __str__(self) -> str:
        return f"{self.total:.1f} s: " + ", ".join(f"{phase} {s:.1f}" for phase, s in self.seconds.items())


class Patience:
    """A time limit that hardly counts the time in which this process is suspended.

    seconds: what is left when it was last asked.
    """

    def __init__(self, seconds: float) -> None:
        # The most that is counted between two questions: a look for another rank may take 10 s.
        self.seconds, self._longest, self._last = seconds, min(10.0, seconds / 3), time.monotonic()

    def over(self) -> bool:
        """True once the time has run out. To be asked again and again; less is counted of what takes longer."""
        now = time.monotonic()
        self.seconds -= min(now - self._last, self._longest)
        self._last = now
        return self.seconds < 0


def process_age() -> float:
    """Seconds since this process began, to a hundredth; 0 if that is not known."""
    fields = _stat("self")
    if len(fields) < 20:
        return 0.0
    began = int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - began)


def is_running(pid: int) -> bool:
    """True if a process of this machine has not ended."""
    fields = _stat(pid)
    return bool(fields) and fields[0] not in "ZX"


def siblings() -> list[int]:
    """Process ids of the other children of this process's parent."""
    pids = [int(path.name) for path in Path("/proc").glob("[0-9]*")]
    return [pid for pid in pids if pid != os.getpid() and _stat(pid)[1:2] == [str(os.getppid())]]


def _stat(pid: int | str) -> list[str]:
    """Fields of /proc/PID/stat from the state on (proc_pid_stat(5)); empty if there is no such process."""
    try:
        # The name, which comes before, may hold blanks and parentheses itself.
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return []


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

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.raise_flag(signal.Signals(number))
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def raise_flag(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Act as if the signal had been received: for one that came before `install`."""
        # The first signal is the reason; later ones, such as SIGTERM after our own requeue, do not change it.
        if self.signal is None:
            self._received_at, self.signal = time.monotonic(), number

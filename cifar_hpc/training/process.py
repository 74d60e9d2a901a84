"""What the time from the start of a process to its first step goes into."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Launch:
    """What the launcher told this process: its place among the others, and the job it belongs to.

    `rendezvous` is a file on the shared file system, new for every start, where rank 0 publishes its address; None
    under torchrun, whose environment variables name the address.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    scheduler: str | None = None  # "slurm" | "local" (submitit's executor) | None (a plain process or torchrun)
    job_id: str | None = None
    rendezvous: Path | None = None


FIRST_STEP = "first_step"  # the last phase


class Stopwatch:
    """Seconds of each phase of a start; the first one, `process`, is what had passed since the process began."""

    def __init__(self) -> None:
        self.seconds = {"process": process_age()}
        self._last = time.monotonic()

    def lap(self, phase: str) -> None:
        """`phase` took the time since the last call."""
        now = time.monotonic()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._last
        self._last = now

    @property
    def over(self) -> bool:
        """Whether the first step is done."""
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


def process_age() -> float:
    """Seconds since this process began, to a hundredth (proc_pid_stat(5), starttime); 0 where that is not known."""
    try:
        # The name, which comes second, may hold blanks and parentheses itself.
        began = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return 0.0
    return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - began)

"""Process of an attempt: rank and job, stop signals, time of each phase of the start, age."""

from __future__ import annotations

import io
import os
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from cifar_hpc.errors import SpecError
from cifar_hpc.text import shown

# SIGHUP: the terminal closes. SIGXCPU: a limit of CPU time (ulimit -St), once a second until the hard limit.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGXCPU)
FIRST_STEP = "first_step"  # the last phase
_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


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


def launch_of(environment: Mapping[str, str], folder: Path) -> tuple[Launch, int]:
    """(launch, threads that are this process's share) under torchrun, in a step of srun, or of a single process.

    Args:
        folder: where rank 0 of a step publishes its address.

    Raises:
        SpecError: names the variable of torchrun that is missing or has no meaning.
    """

    def number(name: str, default: str, low: int, high: int) -> int:
        text = environment.get(name, default)
        if text.isascii() and text.isdecimal() and len(text) < 10 and low <= int(text) <= high:
            return int(text)
        raise SpecError(f"{name}: {shown(text)} is not allowed; allowed: {low} to {high}{beside}")

    size, *names = "WORLD_SIZE", "RANK", "LOCAL_RANK"
    # Of a step: a batch script and the shell of salloc have SLURM_NTASKS, too, and are a single process.
    step = environment.get("SLURM_STEP_NUM_TASKS", "1") != "1" and environment.keys().isdisjoint((size, *names))
    if step:
        size, *names = "SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID"
    beside = (
        f", with {size}={environment.get(size)}. HINT: is it left over? torchrun sets it; unset {' '.join(_TORCHRUN)}"
    )
    world, job = number(size, "1", 1, 999_999), environment.get("SLURM_JOB_ID")
    rank, local_rank = (number(name, "0" if name == "LOCAL_RANK" or world == 1 else "", 0, world - 1) for name in names)
    if step:
        file = f"{job}.{environment['SLURM_STEP_ID']}-{environment.get('SLURM_RESTART_COUNT') or 0}.json"
        launch = Launch(rank, world, local_rank, None, job, folder / file)
        return launch, number("SLURM_CPUS_PER_TASK", "1", 1, 999_999)
    here = number("LOCAL_WORLD_SIZE", "1", 1, world)
    if world > 1:
        number("MASTER_PORT", "", 1, 65535)
        if not environment.get("MASTER_ADDR"):
            raise SpecError(f"MASTER_ADDR: '' is not allowed; allowed: the host of rank 0{beside}")
    return Launch(rank, world, local_rank, None, job), max(1, len(os.sched_getaffinity(0)) // here)


class _Output(io.FileIO):
    """Standard output or error, where a `lossy` one drops what cannot be written; any is, after its first error."""

    lossy = False

    def write(self, content: Any) -> int:
        try:
            return super().write(content) or len(content)
        except OSError:
            if not self.lossy:
                self.lossy = True  # Python tries again as it ends, which would change the exit status
                raise
        return len(content)


def open_streams(lossy: bool = False) -> None:
    """Open /dev/null in place of closed standard streams, and print what their encoding lacks as escapes.

    A file opened later would get the number of a closed one, and with it what libraries print.

    Args:
        lossy: a full disk or a reader that has gone never raises an exception; on standard error it never does.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # opens the lowest number that is free
    for name, number in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is getattr(sys, f"__{name}__"):  # and not a replacement, as a test's
            raw, encoding = _Output(number, "w", closefd=False), getattr(stream, "encoding", None)
            raw.lossy = lossy or number == 2
            new = io.TextIOWrapper(io.BufferedWriter(raw), encoding, "backslashreplace", line_buffering=True)
            setattr(sys, name, new)


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
        return f"{self.total:.1f} s: " + ", ".join(f"{phase} {s:.1f}" for phase, s in self.seconds.items() if s >= 0.5)


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
        """Handle the stop signals, and ignore SIGCONT, which Slurm sends along.

        SIGHUP and SIGINT stay ignored if they are: nohup, or a shell's `&`.

        Args:
            interactive: handle the first Ctrl-C as well; a second one interrupts as usual.
        """
        for number in (*STOP_SIGNALS, signal.SIGINT) if interactive else STOP_SIGNALS:
            if number not in (signal.SIGHUP, signal.SIGINT) or signal.getsignal(number) is not signal.SIG_IGN:
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

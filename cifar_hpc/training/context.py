"""The context of an attempt, shared by all its parts: run, process, logs and events."""

from functools import cached_property
from threading import Timer
from typing import Any

from cifar_hpc.config.spec import Spec
from cifar_hpc.runs.events import Event, FirstStep
from cifar_hpc.runs.history import History
from cifar_hpc.runs.lock import WriterLock
from cifar_hpc.runs.logs import TrainLog, soon
from cifar_hpc.runs.paths import RunPaths
from cifar_hpc.runs.progress import record_event, update_progress
from cifar_hpc.training.distributed.watchdog import Heartbeat
from cifar_hpc.training.process import FIRST_STEP, Launch, StopFlag, Stopwatch


class Context:
    """An attempt at a run, on one rank.

    Attributes:
        first: true on rank 0.
        log: enabled on the rank that also writes events and calls Slurm: rank 0, or another one once that is gone.
        lock: held by rank 0 from the start of the attempt, or from before it.
    """

    def __init__(
        self, paths: RunPaths, spec: Spec, launch: Launch, stop: StopFlag, startup: Stopwatch | None = None
    ) -> None:
        self.paths, self.spec, self.launch, self.stop = paths, spec, launch, stop
        self.startup = startup or Stopwatch()
        self.first = launch.rank == 0
        self.log = TrainLog(paths.train_log, enabled=self.first)
        self.heart = Heartbeat()
        self.lock = WriterLock(paths)
        self._timer = Timer(0, id)

    @cached_property
    def restart(self) -> int:
        """Number of earlier attempts; from events.jsonl until all ranks have agreed on it."""
        return History.read(self.paths.events).earlier_than(self.launch.job_id)

    def begin(self, doing: str) -> None:
        """Begin a part of the start, which is mentioned if it takes longer than a moment."""
        self.heart.beat(doing)
        self.quiet()
        if self.first:
            self._timer = soon(self.say, doing)

    def quiet(self) -> None:
        """End the last part."""
        self._timer.cancel()

    def say(self, doing: str) -> None:
        """Tell in the log and in progress.json what the start is doing."""
        self.log.line(doing)
        if self.lock.held:  # else they are another process's
            update_progress(self.paths, doing=doing)

    def say_first_step(self, step: int) -> None:
        """Report the first step, which takes longer than others: it loads kernels, and may compile the model."""
        self.quiet()
        self.startup.lap(FIRST_STEP)
        self.emit(FirstStep(step=step, startup=self.startup.plain()))
        own = self.startup.seconds[FIRST_STEP]
        self.log.line(f"first step done after {self.startup.total:.1f} s; it took {own:.1f} s")

    def report(self, eta_by_rate: float | None = None, **position: Any) -> None:
        """Write the position of the run to progress.json; only on rank 0.

        Args:
            eta_by_rate, position: as `update_progress`.

        Raises:
            RunFailedError: another process has taken the run's lock.
        """
        if self.first:
            for path in self.lock.renew():
                self.log.warn(f"{path} was deleted or replaced under this process, which holds that lock; made again")
            memory = self.heart.peak_memory_bytes
            update_progress(self.paths, self.spec, eta_by_rate, peak_memory_bytes=memory, doing=None, **position)

    def emit(self, event: Event) -> None:
        """Append to events.jsonl, on the rank whose log is enabled."""
        if self.log.enabled:
            sender = {"job_id": self.launch.job_id, "restart": self.restart, "world_size": self.launch.world_size}
            record_event(self.paths, event, self.spec, **sender)

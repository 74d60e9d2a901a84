"""What every part of one start of a run shares: which run, which process, and where to say things."""

from __future__ import annotations

from typing import Any

from cifar_hpc.config.spec import Spec
from cifar_hpc.runs.events import append_event, count_starts
from cifar_hpc.runs.logs import TrainLog, read_jsonl
from cifar_hpc.runs.paths import RunPaths
from cifar_hpc.training.distributed.watchdog import Heart
from cifar_hpc.training.process import FIRST_STEP, Launch, Stopwatch
from cifar_hpc.training.signals import StopFlag


class Context:
    """One start of one run, as seen by one rank."""

    def __init__(
        self, paths: RunPaths, spec: Spec, launch: Launch, stop: StopFlag, startup: Stopwatch | None = None
    ) -> None:
        self.paths, self.spec, self.launch, self.stop = paths, spec, launch, stop
        self.startup = startup or Stopwatch()
        self.first = launch.rank == 0
        self.log = TrainLog(paths.train_log, enabled=self.first)
        self.heart = Heart()
        self.speaks = self.first  # whether this rank writes the run's logs and talks to Slurm
        self._restart: int | None = None

    @property
    def restart(self) -> int:
        """How often the run had been started before; what events.jsonl says until all ranks know the same."""
        return count_starts(read_jsonl(self.paths.events)) if self._restart is None else self._restart

    @restart.setter
    def restart(self, number: int) -> None:
        self._restart = number

    def speak(self) -> None:
        """Let this rank write the logs in rank 0's place."""
        self.speaks = self.log.enabled = True

    def say_first_step(self, step: int) -> None:
        """The start is over. Its first step takes longer than others: it loads kernels, and compiles if asked to."""
        self.startup.lap(FIRST_STEP)
        self.emit("first_step", step=step, startup=self.startup.plain())
        own = self.startup.seconds[FIRST_STEP]
        self.log.line(f"first step done after {self.startup.total:.1f} s, {own:.1f} s of them its own")

    def emit(self, event: str, **details: Any) -> None:
        """Append to events.jsonl; silent on every rank but the one that speaks for the run, rank 0 as a rule."""
        if self.speaks:
            append_event(
                self.paths.events,
                event,
                job_id=self.launch.job_id,
                restart=self.restart,
                world_size=self.launch.world_size,
                **details,
            )

"""What every part of one start of a run shares: which run, which process, and where to say things."""

from __future__ import annotations

from typing import Any

from cifar_hpc.distributed import Launch
from cifar_hpc.paths import RunPaths
from cifar_hpc.preemption import StopFlag
from cifar_hpc.runlog import TrainLog, append_event
from cifar_hpc.spec import Spec


class Context:
    """One start of one run, as seen by one rank."""

    def __init__(self, paths: RunPaths, spec: Spec, launch: Launch, stop: StopFlag) -> None:
        self.paths, self.spec, self.launch, self.stop = paths, spec, launch, stop
        self.first = launch.rank == 0
        self.log = TrainLog(paths.train_log, enabled=self.first)
        self.restart = 0  # how often the run had been started before; known once the events have been read

    def emit(self, event: str, **details: Any) -> None:
        """Append to events.jsonl; silent on every rank but 0."""
        if self.first:
            append_event(
                self.paths.events,
                event,
                job_id=self.launch.job_id,
                restart=self.restart,
                world_size=self.launch.world_size,
                **details,
            )

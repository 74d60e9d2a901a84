"""Epilog of the batch script: reports and requeues an attempt whose processes were all killed at once.

That happens to a run of one process on a node short of memory, and to the tasks that are left when one node's
slurmstepd dies. Any task that lives does so itself (training/exit).
"""

import os
import sys
from collections.abc import Sequence
from datetime import datetime
from itertools import takewhile
from pathlib import Path

from cifar_hpc.errors import SchedulerError, UserError
from cifar_hpc.runs.events import Checkpoint, Event, Failed, Left, Requeued
from cifar_hpc.runs.frozen_spec import require_frozen
from cifar_hpc.runs.history import History, step_of
from cifar_hpc.runs.logs import TrainLog, read_jsonl
from cifar_hpc.runs.paths import RunPaths, keep_others_out, run_of_task
from cifar_hpc.runs.progress import record_event
from cifar_hpc.runs.requeue import ALIVE, Decision, Ending, decide, request_requeue
from cifar_hpc.slurm.client import job_fields, own_job_id


def main(arguments: Sequence[str]) -> int:
    """Complete the end of an attempt.

    Args:
        arguments: the root, a run or an array's points.json, and the exit status of srun.
    """
    root, target, status = arguments
    keep_others_out()
    try:
        Epilog(run_of_task(Path(root), target), own_job_id() or "").run(status)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


class Epilog:
    """The end of an attempt of this job."""

    def __init__(self, paths: RunPaths, job_id: str) -> None:
        self.paths, self.job_id = paths, job_id
        self.log = TrainLog(paths.train_log, enabled=True)
        self.spec = require_frozen(paths)
        self.job: dict[str, str] | None = None
        self.history = History.read(paths.events)
        self.attempt = self.history.attempt_of(job_id)

    def run(self, status: str) -> None:
        """Report the end and request the requeue, unless a task has done so."""
        if self.attempt is None or not self._has_nodes():
            return
        last = self.history.end
        if not last:
            self._all_killed(status)
        elif last["event"] == Requeued.name:  # a task has died between this event and its request
            delay = int(last.get("delay_seconds") or 0)
            self._requeue(Decision("requeue", str(last.get("reason")), "", delay), recorded=True)
        elif last["event"] == Failed.name and last.get("again"):
            before = takewhile(lambda row: row.get("time") != last.get("time"), read_jsonl(self.paths.events))
            self._act(self._decide("error", History.of(before), step_of(last)))

    def _has_nodes(self) -> bool:
        """True if the job still has its nodes: otherwise it is being ended, or its requeue is under way."""
        try:
            self.job = job_fields(self.job_id)
        except SchedulerError as error:
            self.log.line(f"WARNING {error}")
            return True
        return self.job.get("JobState") in ALIVE

    def _all_killed(self, status: str) -> None:
        # The last step is not known; progress is what is on disk.
        step = max(self.attempt.step if self.attempt else 0, step_of(self.history.last_of(Checkpoint)))
        decision = self._decide("killed", self.history, step)
        if decision.reason == "failure":
            words = f"all processes were killed (exit status {status})"
            self._emit(Failed(step=step, error=words, cause="killed", again=decision.action == "requeue"))
            self.log.line(f"FAILED: {words}. HINT: out of memory? See --mem, and what sacct -j {self.job_id} says")
        self._act(decision)

    def _decide(self, cause: str, history: History, step: int) -> Decision:
        restarts = int(os.environ.get("SLURM_RESTART_COUNT") or 0)
        return decide(Ending(cause, restarts=restarts, step=step), self.spec, history, self.job, datetime.now())

    def _act(self, decision: Decision) -> None:
        self.log.line(decision.explanation)
        if decision.action == "requeue":
            self._requeue(decision)
        elif decision.action == "leave":
            self._emit(Left(reason=decision.reason, explanation=decision.explanation))

    def _requeue(self, decision: Decision, recorded: bool = False) -> None:
        try:
            request_requeue(self.job_id, decision, self.spec, self._emit, recorded)
        except SchedulerError as refusal:
            self.log.line(f"WARNING not requeued: {refusal}")

    def _emit(self, event: Event) -> None:
        assert self.attempt is not None
        restart, world_size = self.attempt.restart, self.attempt.world_size
        record_event(self.paths, event, job_id=self.job_id, restart=restart, world_size=world_size)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""The batch script's last word: what the tasks of a start could not say or ask for, since all were killed at once.

That is what a node short of memory does to a run of one process, and srun to the tasks that are left when one node's
slurmstepd dies. While any task lives it speaks for the run itself (see failing).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cifar_hpc.errors import SchedulerError, SpecError, UserError
from cifar_hpc.runs.events import append_event, since_submission
from cifar_hpc.runs.frozen_spec import read_frozen
from cifar_hpc.runs.history import start_and_last_word
from cifar_hpc.runs.logs import TrainLog, read_jsonl
from cifar_hpc.runs.paths import RunPaths, keep_others_out, run_at
from cifar_hpc.runs.requeue import ALIVE, Retry, decide_retry, told_before
from cifar_hpc.slurm import client as slurm


def main(arguments: Sequence[str]) -> int:
    """Look at how a start ended, and see to what is left to do.

    Args:
        arguments: the root, a run or an array's points.json, and the exit status of srun.
    """
    root, what, status = arguments
    keep_others_out()
    try:
        run = run_at(Path(what), os.environ.get("SLURM_ARRAY_TASK_ID", "")) if "/" in what else what
        end = End(RunPaths(Path(root), run), slurm.own_job_id() or "", status)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if end.start is not None and end.alive():
        end.act()
    return 0


class End:
    """How a start of a run by this job ended."""

    def __init__(self, paths: RunPaths, job_id: str, status: str) -> None:
        self.paths, self.job_id, self.status = paths, job_id, status
        self.log = TrainLog(paths.train_log, enabled=True)
        self.fields: dict[str, str] = {}
        spec = read_frozen(paths)
        if spec is None:
            raise SpecError(f"{paths.spec}: is missing. HINT: submit the run again.")
        self.spec = spec
        self.events = since_submission(read_jsonl(paths.events))
        self.start, self.last = start_and_last_word(self.events, job_id)

    def alive(self) -> bool:
        """Whether the job still has its nodes: otherwise it is being ended, or its requeue is under way."""
        try:
            self.fields = slurm.job_fields(self.job_id)
        except SchedulerError as error:
            self.log.line(f"WARNING {error}")
            return True
        return self.fields.get("JobState") in ALIVE

    def act(self) -> None:
        """Say what nobody has said, and ask for what nobody has got."""
        last = self.last or {}
        if not last:
            self._speak()
        elif last["event"] == "requeued":  # a task has died between these words and the deed
            self._requeue(int(last.get("delay_seconds") or 0))
        elif last["event"] == "failed" and last.get("again"):
            before = self.events[: self.events.index(last)]
            self._say_requeued("failure", self._retry(before, int(last.get("step") or 0)))

    def _speak(self) -> None:
        if self.fields and told_before(self.fields):
            words = "all processes were killed by a preemption"
            return self._say_requeued("preemption", Retry(self.spec.resources.requeue, 0, words))
        # How far it was, nobody knows; what is on disk is what it has got done.
        saved = [self.start, *(e for e in self.events if e.get("event") == "checkpoint")]
        step = max(int(e.get("step") or 0) for e in saved if e is not None)
        words = f"all processes were killed (exit status {self.status})"
        retry = self._retry(self.events, step)
        self._emit("failed", step=step, error=words, cause="killed", again=retry.again)
        self.log.line(f"FAILED: {words}. HINT: for want of memory? See --mem, and what sacct -j {self.job_id} says")
        self._say_requeued("failure", retry)

    def _retry(self, events: Sequence[Mapping[str, Any]], step: int) -> Retry:
        return decide_retry(events, step, self.spec.failures.max, bool(self.fields) and self.spec.resources.requeue)

    def _say_requeued(self, reason: str, retry: Retry) -> None:
        self.log.line(retry.explanation)
        if retry.again:
            self._emit("requeued", reason=reason, delay_seconds=retry.delay_seconds)
            self._requeue(retry.delay_seconds)

    def _requeue(self, delay_seconds: int) -> None:
        try:
            slurm.requeue(self.job_id, delay_seconds, self.spec.resources.fewest_tasks)
        except SchedulerError as refusal:
            self._emit("requeue_failed", reason=str(refusal))
            self.log.line(f"WARNING not requeued: {refusal}")

    def _emit(self, event: str, **details: Any) -> None:
        assert self.start is not None
        restart, world_size = self.start.get("restart"), self.start.get("world_size")
        append_event(self.paths.events, event, job_id=self.job_id, restart=restart, world_size=world_size, **details)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

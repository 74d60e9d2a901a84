"""Epilog of the batch script: reports and requeues an attempt that ended without a word.

That is one of which no rank ever spoke (srun, a module, Python or an import failed), and one whose processes were all
killed at once: a run of one process on a node short of memory, the tasks that are left when one node's slurmstepd
dies. Any task that lives does so itself (training/exit).
"""

import os
import re
import sys
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from itertools import takewhile
from pathlib import Path

from cifar_hpc.errors import SchedulerError, UserError
from cifar_hpc.runs import requeue
from cifar_hpc.runs.events import FAILURES, Checkpoint, Event, Failed, Left, Requeued
from cifar_hpc.runs.frozen_spec import require_frozen
from cifar_hpc.runs.history import Attempt, History, step_of
from cifar_hpc.runs.lock import holder
from cifar_hpc.runs.logs import TrainLog, output_of_start, read_jsonl
from cifar_hpc.runs.paths import RunPaths, keep_others_out, run_of_task
from cifar_hpc.runs.progress import record_event
from cifar_hpc.runs.requeue import ALIVE, Decision, Ending
from cifar_hpc.slurm.client import own_job_id, restart_count
from cifar_hpc.text import one_line, printable

LAST_LINES = 8  # of a task
LAST_FILES = 3
CLOCKS_DIFFER = 5.0  # seconds, between a node and a file server
# What srun says after a task has said why.
_NO_REASON = re.compile(r"srun: error: .* task\S* .*: (Exited|Killed|Terminated)|srun: (Job step|Terminating)")


def main(arguments: Sequence[str]) -> int:
    """Complete the end of an attempt.

    Args:
        arguments: the root, a run or an array's points.json, and the exit status of srun.
    """
    root, target, status = arguments
    keep_others_out()
    try:
        paths = run_of_task(Path(root), target)
    except UserError as error:
        print(printable(f"error: {error}"), file=sys.stderr)
        return 1
    history = History.read(paths.events)
    attempt = history.attempt_of(own_job_id() or "", restart_count())
    if attempt is not None:
        # Slurm writes the output of an array's tasks into the folder of the sweep.
        output = Path(target).parent / "slurm" if "/" in target else paths.slurm
        Epilog(paths, history, attempt, output).run(status)
    return 0


class Epilog:
    """The end of an attempt of this job.

    Args:
        output: folder of the job's output files.
    """

    def __init__(self, paths: RunPaths, history: History, attempt: Attempt, output: Path) -> None:
        self.paths, self.history, self.attempt, self.output = paths, history, attempt, output
        self.job_id = str(attempt.job_id)
        self.log = TrainLog(paths.train_log, enabled=True)
        self.job: dict[str, str] | None = None

    def run(self, status: str) -> None:
        """Report the end and request the requeue, unless a task has done so."""
        last = self.attempt.said
        failed = last.get("event") in FAILURES and last.get("again")
        if last and not failed and last["event"] != Requeued.name:
            return
        if not self._has_nodes():
            job = self.job or {}
            if not last and not self.attempt.begun and int(job.get("Restarts") or 0) <= restart_count():
                self._act(requeue.without_nodes(job))
            return
        try:
            self.spec = require_frozen(self.paths)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            self._emit(Failed(step=0, error=one_line(str(error)), cause="start", again=False))
            return self.log.line(f"FAILED: {error}")
        if not last:
            self._nothing_said(status)
        elif failed:
            before = takewhile(lambda row: row.get("time") != last.get("time"), read_jsonl(self.paths.events))
            ending = Ending("error", step=step_of(last), bad_node=str(last.get("bad_node") or ""))
            self._act(self._decide(ending, History.of(before)), str(last.get("error")))
        else:  # a task has died between this event and its request
            delay = int(last.get("delay_seconds") or 0)
            self._requeue(Decision("requeue", str(last.get("reason")), "", delay), recorded=True)

    def _has_nodes(self) -> bool:
        """True if the job still has its nodes: otherwise it is being ended, or its requeue is under way."""
        self.job = requeue.ask_about(self.job_id, self.log.warn, requeue.PATIENCE_SECONDS)
        return self.job is None or self.job.get("JobState") in ALIVE

    def _nothing_said(self, status: str) -> None:
        # The last step is not known; progress is what is on disk.
        step = max(self.attempt.step, step_of(self.history.last_of(Checkpoint)))
        error, text = f"before training began (exit status {status})", ""
        ending = Ending("busy")  # as a rank would have said: another process holds the run, and writes its logs
        if self.attempt.begun:
            how, why = ("were killed", "out of memory? See --mem,")
            if 0 < int(status) < 128:
                how, why = "ended without a word", f"a full disk? See df {self.paths.logs},"
            error = f"all processes {how} (exit status {status})"
            text = f"{error}. HINT: {why} and what sacct -j {self.job_id} says"
            ending = Ending("killed", step=step)
        elif holder(self.paths.lock) is None:
            lines = self._last_lines()
            text = "\n    ".join([f"{error}, with these last words:", *(lines or ["none"])])
            reasons = [line for line in lines if not _NO_REASON.search(line)] or lines
            error = ": ".join([error, *(one_line(line)[:500] for line in reasons[-1:])])
            ending = Ending("start", step=step, bad_node=requeue.broken_node("\n".join(lines), _node(lines)))
        decision = self._decide(ending, self.history)
        if decision.reason == "failure" and text:
            again, bad_node = decision.action == "requeue", ending.bad_node or None
            self._emit(Failed(step=step, error=error, cause=ending.cause, again=again, bad_node=bad_node))
            self.log.line(f"FAILED: {text}")
        if text or decision.action == "requeue":
            self._act(decision, error)

    def _last_lines(self) -> list[str]:
        """Last lines of the output of this start: of some tasks, and then of srun and task 0."""
        lines: list[str] = []
        for path in reversed(sorted(self.output.glob(f"{self.job_id}_*_log.out"))[:LAST_FILES]):
            with suppress(OSError):
                if path.stat().st_mtime >= (self.attempt.start or 0.0) - CLOCKS_DIFFER:
                    lines += output_of_start(path)[-LAST_LINES:]
        return lines

    def _decide(self, ending: Ending, history: History) -> Decision:
        decision = requeue.decide(ending, self.spec, history, self.job, datetime.now(UTC))
        return requeue.elsewhere(decision, ending, self.spec, self.job_id)

    def _act(self, decision: Decision, error: str = "") -> None:
        self.log.line(decision.explanation)
        if decision.action == "requeue":
            self._requeue(decision)
        elif decision.action == "leave":
            self._emit(Left(reason=decision.reason, explanation=decision.explanation))
        else:
            requeue.end_for_good(self.job_id, self.history)
            requeue.notify(self.paths, self.spec, "failed", error, self.log)

    def _requeue(self, decision: Decision, recorded: bool = False) -> None:
        try:
            requeue.request_requeue(self.job_id, decision, self.spec, self._emit, recorded)
        except SchedulerError as refusal:
            self.log.line(f"WARNING not requeued: {refusal}")

    def _emit(self, event: Event) -> None:
        restart, world_size = self.attempt.restart, self.attempt.world_size
        record_event(self.paths, event, job_id=self.job_id, restart=restart, world_size=world_size)


def _node(lines: Sequence[str]) -> str | None:
    """The node that srun names in its last words, or the only one of the job."""
    named = re.findall(r"srun: error: (\S+): task|on node (\S+?):", "\n".join(lines))
    only = os.environ.get("SLURMD_NODENAME") if os.environ.get("SLURM_JOB_NUM_NODES") == "1" else None
    return "".join(named[-1]) if named else only


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

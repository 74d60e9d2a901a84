"""Whether a run that failed is started again, as a pure function of what events.jsonl tells."""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from cifar_hpc.runs.events import count_requeues
from cifar_hpc.slurm.client import parse_instant

# What `scontrol show job` calls a job that holds its nodes. While a SIGCONT is on its way, which Slurm sends along with
# its warnings, the job is SIGNALING (seen with a checkpoint written in 20 ms); STOPPED until a SIGSTOP is taken back.
ALIVE = ("RUNNING", "SIGNALING", "STOPPED", "RESIZING")


@dataclass(frozen=True)
class Decision:
    """What rank 0 does after the checkpoint is on disk.

    action: "requeue" (ask Slurm for it), "leave" (exit; Slurm or a person has decided), or "hold" (stay until Slurm
        ends the process, since leaving by oneself would end the job for good).
    reason: preemption | timeout | cancelled | node or job ended | ... for logs and counts.
    """

    action: str
    reason: str
    explanation: str


# The time before another try: Slurm's own after a requeue, doubled with each failure, but no longer than an hour.
FIRST_DELAY_SECONDS, LONGEST_DELAY_SECONDS = 120, 3600


@dataclass(frozen=True)
class Retry:
    """Whether a failed run is started again, after how many seconds, and the words for the log."""

    again: bool
    delay_seconds: int
    explanation: str


def decide_retry(
    events: Sequence[Mapping[str, Any]], step: int, limit: int, may_requeue: bool, again: bool = True
) -> Retry:
    """Another try, only where it may help and only while the run gets further from one failure to the next.

    Args:
        events: of this run since it was last submitted, without this failure.
        step: how far the run was.
        limit: failures.max.
        may_requeue: resources.requeue, and a scheduler that can.
        again: whether this failure may pass by itself.
    """
    used = count_requeues(events).get("failure", 0)
    earlier = [int(e.get("step") or 0) for e in events if e.get("event") in ("failed", "hang")]
    if not again:
        return Retry(False, 0, "not requeued: the same would happen again")
    if not may_requeue:
        return Retry(False, 0, "not requeued; submit the same again to go on from the newest checkpoint")
    if earlier and step <= earlier[-1]:
        return Retry(
            False,
            0,
            f"not requeued: the run failed at step {earlier[-1]} before and got no further this time "
            f"(step {step}). HINT: mend the cause and submit again",
        )
    if used >= limit:
        return Retry(False, 0, f"not requeued: failures.max ({limit}) is used up; submit again to go on")
    delay = min(FIRST_DELAY_SECONDS << used, LONGEST_DELAY_SECONDS)
    return Retry(True, delay, f"requeueing after failure {used + 1} of at most {limit}")


def told_before(fields: Mapping[str, str]) -> bool:
    """Whether Slurm has told this start of a job to end already, by what `scontrol show job` says."""
    return fields.get("JobState") not in ALIVE or _preempted(fields)


def decide(
    received: signal.Signals | None,
    fields: Mapping[str, str] | None,
    *,
    now: datetime,
    own_restarts: int,
    warning_seconds: int,
    timeouts_left: int,
    may_requeue: bool,
) -> Decision:
    """The table of signals and job states.

    Args:
        received: the signal that stopped this rank; None where another rank was told.
        fields: `scontrol show job`, or None where scontrol does not answer.
        now: local time, as Slurm's own times are.
        own_restarts: SLURM_RESTART_COUNT of this attempt.
        timeouts_left: how many more timeouts may be requeued.
        may_requeue: resources.requeue.
    """
    if fields is None:
        return Decision("hold", "unknown", "scontrol does not answer, so requeueing is left to Slurm; waiting for it")
    state = fields.get("JobState", "")
    if state != "RUNNING" and int(fields.get("Restarts") or 0) > own_restarts:
        return Decision("leave", "preemption", f"JobState={state}: Slurm has requeued the job itself")
    if state not in ALIVE:
        # scontrol requeue would succeed here and bring back a job that somebody has cancelled.
        return Decision("leave", "ended", f"JobState={state}: cancelled, or its node is going; not requeueing")
    preempted = _preempted(fields)
    end = parse_instant(fields.get("EndTime"))
    near_end = end is not None and (end - now).total_seconds() <= warning_seconds + EARLY_SECONDS
    timeout = not preempted and near_end and received is not signal.SIGTERM
    reason = "timeout" if timeout else "preemption"
    if not may_requeue or fields.get("Requeue") == "0":
        return Decision("leave", reason, f"{reason}; the job may not be requeued (--no-requeue): submit again to go on")
    if timeout and timeouts_left <= 0:
        return Decision("leave", reason, "timeout; timeouts.max is used up: submit again to go on")
    return Decision("requeue", reason, f"JobState={state}: {reason}; requeueing")


# Slurm delivers --signal=USR2@S up to a minute early (sbatch(1)).
EARLY_SECONDS = 60


def _preempted(fields: Mapping[str, str]) -> bool:
    """Whether this start of the job is being preempted: a PreemptTime before StartTime is an earlier start's."""
    preempted, started = parse_instant(fields.get("PreemptTime")), parse_instant(fields.get("StartTime"))
    return preempted is not None and (started is None or preempted >= started)

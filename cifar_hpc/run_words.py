"""What a run is doing, in a word, and why, in a few."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from cifar_hpc import waiting
from cifar_hpc.preemption import ALIVE
from cifar_hpc.slurm import QueuedJob


def in_the_queue(job: QueuedJob, last_word: Mapping[str, Any], now: datetime) -> tuple[str, str]:
    """(state, detail) of a run that has a job.

    Args:
        last_word: as `Facts` has it.
        now: with a zone.
    """
    if job.waits:
        start = waiting.start_of(job)
        begin = f"not before {waiting.clock(start, now)}" if start is not None else "waits for its begin time"
        if job.reason == "BeginTime" and last_word.get("event") == "submitted":
            return "queued", f"BeginTime: {begin}"
        if job.reason != "BeginTime":
            return "queued", ", ".join(filter(None, (waiting.why(job), waiting.expected(start, now))))
        cause = _REQUEUED.get(str(last_word.get("reason"))) if last_word.get("event") in ("requeued", "left") else None
        until = f"until {waiting.clock(start, now)}" if start is not None else "waits for its begin time"
        return "requeued", ", ".join(filter(None, (until, cause)))
    if job.state in (*ALIVE, "CONFIGURING"):
        return "running", f"on {job.nodes}"
    if job.state == "SUSPENDED":
        return "suspended", f"by Slurm, on {job.nodes}"
    return "stopping", f"{job.state}: {_STOPPING.get(str(last_word.get('event')), 'Slurm ends the job')}"


_REQUEUED = {"preemption": "preempted", "timeout": "at its time limit", "failure": "after a failure"}
_STOPPING = {
    "finished": "the run has finished",
    "requeued": "to be requeued",
    "failed": "the run has failed",
    "hang": "the run has failed",
    "cancelled": "it was cancelled",
}


def afterwards(event: Mapping[str, Any]) -> tuple[str, str]:
    """(state, detail) once the job is gone, from the last event that says something about it."""
    name = event["event"]
    if name == "finished":
        return "finished", f"{event.get('test_accuracy', float('nan')):.2f}%"
    if name in ("failed", "hang"):
        return "failed", _failure(event)
    if name == "cancelled":
        return "cancelled", f"by {event.get('by', '?')}"
    if name == "left" and event.get("reason") == "ended":
        return "cancelled", "by scancel, or its node was lost"
    if name == "left":
        return "stopped", str(event.get("explanation", ""))
    return "stopped", f"{_SUBMIT_AGAIN[name]}; submit again to go on"


def told_its_end(event: Mapping[str, Any]) -> bool:
    """Whether the run itself has said that it ended, so that this need not be taken from its job being gone."""
    return event["event"] not in _SUBMIT_AGAIN


def _failure(event: Mapping[str, Any]) -> str:
    """The reason of a failure, without the names of this project's own exceptions."""
    words = re.sub(r"^(User|Spec|RunFailed|RanksLost|Scheduler|RunBusy)Error: ", "", str(event.get("error", "")))
    if event.get("event") == "hang":
        return f"hung: {words}"
    known = event.get("cause") == "out_of_memory" and "out of memory" not in words.lower()
    return f"out of memory: {words}" if known else words


_SUBMIT_AGAIN = {
    "submitted": "its job is gone from the queue",
    "started": "it ended without a word (killed?)",
    "resumed": "it ended without a word (killed?)",
    "checkpoint": "it ended without a word (killed?)",
    "requeued": "its requeued job is gone from the queue",
    "holding": "Slurm ended the job",
}

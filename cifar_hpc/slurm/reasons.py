"""Reasons why a queued job waits, and its expected start, in words.

The codes are those of squeue(1), JOB REASON CODES, and of https://slurm.schedmd.com/job_reason_codes.html. The code
itself always comes first, so that it can be looked up; one that is not known here has no words.
"""

from __future__ import annotations

import re
from datetime import datetime

from cifar_hpc.slurm.client import QueuedJob, parse_instant
from cifar_hpc.text import duration

_WORDS = {
    "Resources": "no room yet",
    "Priority": "other jobs go first",
    "JobHeldUser": "held by its owner; the command requeue releases it",
    "JobHeldAdmin": "held by an administrator; ask them",
    "JobArrayTaskLimit": "as many of the sweep's runs at a time as sweep.parallel allows",
    "DependencyNeverSatisfied": "what it depends on has failed: cancel it",
    "Licenses": "no licence free",
    "Reservation": "its reservation has not begun",
    "ReservationDeleted": "its reservation is gone",
    "PartitionDown": "the partition takes no jobs now",
    "PartitionInactive": "the partition takes no jobs now",
    "PartitionNodeLimit": "more nodes than the partition allows, or they are down",
    "PartitionTimeLimit": "a longer time limit than the partition allows",
    "PartitionConfig": "it asks for what the partition does not allow",
    "BadConstraints": "no node has the features it asks for",
    "ReqNodeNotAvail": "a node it asks for is busy, reserved or down",
    "NodeDown": "a node it asks for is down",
    "Cleaning": "its last start is still being tidied up",
    "Prolog": "its node is being prepared",
    "JobLaunchFailure": "it could not be launched; ask an administrator",
    "InvalidAccount": "no such account",
    "AccountNotAllowed": "the partition does not allow the account",
    "InvalidQOS": "no such QOS",
    "QOSNotAllowed": "the partition does not allow the QOS",
    "Nodes required": "its nodes are down, or kept for partitions that go first",
    "job requeued in held state": "whoever requeued it holds it; the command requeue releases it",
    "launch failed requeued held": "it could not be launched and is held; the command requeue releases it",
}
_LIMITS = (
    ("QOSMaxJobs", "as many of your jobs at a time as the QOS allows"),
    ("QOSJobLimit", "as many jobs at a time as the QOS allows"),
    ("QOSGrp", "all jobs of the QOS together are at its limit"),
    ("QOSMax", "a limit of the QOS for one job or user"),
    ("QOS", "a limit of the QOS"),
    ("AssocMaxJobs", "as many of your jobs at a time as your account allows"),
    ("AssocGrp", "all jobs of your account together are at its limit"),
    ("Assoc", "a limit of your account"),
)


def why(job: QueuedJob) -> str:
    """`Priority: other jobs go first`; the code alone if it is not known here."""
    code, words = reason_code(job), None
    if code == "None":
        return "Slurm has not looked at it yet"
    if code == "Dependency":
        words = _dependency(job.dependency)
    elif code in _WORDS:
        words = _WORDS[code]
    elif (limit := re.fullmatch(r"Max\w*(PerAccount|PerUser)", code)) is not None:
        words = "a limit of the QOS for one account" if limit[1] == "PerAccount" else "a limit of the QOS for one user"
    else:
        words = next((text for prefix, text in _LIMITS if code.startswith(prefix)), None)
    return f"{code}: {words}" if words else code


def reason_code(job: QueuedJob) -> str:
    """Slurm's reason without details such as the names of nodes."""
    code = job.reason.replace("_", " ") if "held" in job.reason else job.reason
    if code.startswith("Nodes required for job are"):  # a sentence, in place of a code
        return "Nodes required"
    return code.partition(",")[0].strip()


def _dependency(text: str) -> str:
    jobs = re.findall(r"after\w*:([0-9_*]+)", text)
    if jobs:
        return f"job{'s' * (len(jobs) > 1)} {', '.join(jobs)} must end first"
    return "another job of this run must end first" if "singleton" in text else "another job must end first"


def start_of(job: QueuedJob) -> datetime | None:
    """Expected start of a job, in local time with its zone; None if it is not known or the job is held."""
    instant = parse_instant(job.start) if not job.held else None
    return None if instant is None else instant.astimezone()


def expected(start: datetime | None, now: datetime) -> str:
    """`starts in ~12m`, or nothing where that is not known or has passed. Slurm plans by the time limits of what
    runs, so that jobs often start earlier; and later where others come that go first."""
    seconds = 0.0 if start is None else (start - now).total_seconds()
    return f"starts in ~{duration(seconds)}" if seconds > 0 else ""


def clock(instant: datetime, now: datetime) -> str:
    """Local time such as `14:05:30`, with its date unless that is today's."""
    local = instant.astimezone()
    return f"{local:%H:%M:%S}" if local.date() == now.astimezone().date() else f"{local:%Y-%m-%d %H:%M:%S}"

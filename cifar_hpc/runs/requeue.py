"""Requeueing: the decision, as a pure function of how an attempt ended, and the request to Slurm."""

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime

from cifar_hpc.config.spec import Spec
from cifar_hpc.errors import SchedulerError, without_class
from cifar_hpc.runs.events import Event, Requeued, RequeueFailed, RequeueRequested
from cifar_hpc.runs.history import History, time_of
from cifar_hpc.runs.logs import TrainLog
from cifar_hpc.runs.paths import RunPaths
from cifar_hpc.slurm import client
from cifar_hpc.slurm.client import NO_CONTACT, forbid_requeue, job_fields, parse_instant, requeue_job, restart_count
from cifar_hpc.slurm.options import node_counts
from cifar_hpc.text import one_line

# Job states in which a job has its nodes. A job is SIGNALING while the SIGCONT that Slurm sends along with its warnings
# is on its way (seen with a checkpoint written in 20 ms), and STOPPED until a SIGSTOP is taken back.
ALIVE = ("RUNNING", "SIGNALING", "STOPPED", "RESIZING")
# Slurm delivers --signal=USR2@S up to a minute early (sbatch(1)).
EARLY_SECONDS = 60
# A request to requeue whose signal has not arrived after so long, with the step in hand, has been lost.
REQUEST_SECONDS = 600
# Delay of a retry: the first one, doubled with each failure up to the last. Under Slurm the first is Slurm's own delay
# after a requeue; on one's own machine only the processes that are ending need time.
DELAY_SECONDS = {"slurm": (120, 3600), "local": (2, 60)}
# Words of refusals that asking again does not change (Slurm's src/common/slurm_errno.c, and those of a site's own).
_FOR_GOOD = re.compile(r"permitted|denied|not allowed|presently disabled|not supported|Invalid user id", re.I)
# What the programs of a job say where its node is broken, and the same job would run on another one.
_NODE_FAULT = re.compile(
    r"no CUDA-capable device|finds no usable GPU|\bECC\b|uncorrectable|\bXid\b|fallen off the bus|GPU is lost"
    r"|busy or unavailable|system not yet initialized|CUDA unknown error|CUDA driver|initialize NVML|/dev/nvidia"
    r"|[Dd]river/library version mismatch|[Ll]aunch failed:|Task launch for .* failed|slurmstepd: error: exec"
    r"|Stale file handle|Transport endpoint is not connected|\bsh: (line )?1: (cd|exec): "
    r"|No space left on device: '?/(tmp|var|local|dev/shm)\b"
)
# Nodes that take jobs, by their state in sinfo; marks at its end: * does not answer, $ maintenance.
_TAKES_JOBS = re.compile(r"(idle|mix|alloc|comp|plnd)[^*$]*")
# submitit's local controller restarts a job at most this often (submitit.local.local, Controller.run).
LOCAL_REQUEUES = 5
# A controller that is down may be back soon: how long it is asked after a failure, and how often.
PATIENCE_SECONDS, ASK_AGAIN_SECONDS = 300.0, 10.0
NOTIFY_SECONDS = 30.0
Emit = Callable[[Event], None]


@dataclass(frozen=True)
class Ending:
    """The end of an attempt.

    cause: "signal", "killed" (all processes at once), "start" (before any rank could speak), "busy" (another process
        holds the run's lock), or the cause of a rank's report: "error", "out_of_memory", "hang", "lost".
    scheduler: "slurm", "local" (submitit's executor) or None.
    received: the signal that stopped this rank; None if another rank received it.
    restarts: of the job before this attempt, by Slurm.
    step: the last step before a failure.
    retryable: false for an error that would come again.
    bad_node: the node whose fault it was; empty if it was none's.
    refused: Slurm's words, if it has refused to requeue the job and asking again is useless; empty after a passing
        refusal, None if it was not asked.
    """

    cause: str
    scheduler: str | None = "slurm"
    received: signal.Signals | None = None
    restarts: int = field(default_factory=restart_count)
    step: int = 0
    retryable: bool = True
    bad_node: str = ""
    refused: str | None = None


@dataclass(frozen=True)
class Decision:
    """The action after the end of an attempt.

    action: "requeue", "leave" (exit: Slurm or a person has decided), "hold" (stay until Slurm ends the process, since
        leaving would end the job for good) or "fail" (exit with an error).
    reason: preemption, timeout, failure, requested (by the command requeue), requeued (by Slurm or a person, unknown
        which), signal (nobody says why), ended, ...: for logs and counts.
    explanation: a line for train.log.
    exclude: nodes that the next attempt may not start on.
    """

    action: str
    reason: str
    explanation: str
    delay_seconds: int = 0
    exclude: str = ""

    def event(self) -> Requeued:
        """The event of a requeue."""
        return Requeued(reason=self.reason, delay_seconds=self.delay_seconds, explanation=self.explanation)


def decide(ending: Ending, spec: Spec, history: History, job: Mapping[str, str] | None, now: datetime) -> Decision:
    """Decide whether a run is requeued after the end of an attempt.

    Args:
        history: of the run, without this failure.
        job: fields of `scontrol show job`; None if scontrol does not answer or there is no Slurm.
        now: with its time zone.
    """
    if ending.cause == "signal" and ending.scheduler != "slurm":
        return _after_signal_without_slurm(ending, spec, history, now)
    if ending.cause == "signal" or (ending.cause in ("killed", "start") and job is not None and _preempted(job)):
        return _after_signal(ending, spec, history, job, now)
    return _after_failure(ending, spec, history, job)


def _requested_by(ending: Ending, history: History, now: datetime) -> str:
    """The user whose command `requeue` this attempt answers; empty where there is none.

    The command sends SIGUSR2, which perhaps only another rank has received. A signal that came for another reason is
    not taken for it: the request is of this attempt, and not older than REQUEST_SECONDS.
    """
    request = history.last_of(RequeueRequested)
    asked = time_of(request)
    recent = asked is not None and now.timestamp() - asked <= REQUEST_SECONDS
    return str(request.get("by")) if recent and ending.received in (signal.SIGUSR2, None) else ""


def _who_requeued(job: Mapping[str, str]) -> str:
    """A preemption without grace time and `scontrol requeue` look alike (Slurm 22.05); only people requeue and hold."""
    if "requeued_in_held" in job.get("Reason", ""):
        return "requeued and held by a person"
    return "requeued by Slurm or a person (scontrol requeue, or preempted without grace time)"


def without_nodes(job: Mapping[str, str]) -> Decision:
    """Leave a job that has no nodes any more: Slurm has put it back into the queue, or it is being ended."""
    state = job.get("JobState")
    if state in ("PENDING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT"):
        return Decision("leave", "requeued", f"JobState={state}: {_who_requeued(job)}")
    return Decision("leave", "ended", f"JobState={state}: cancelled, or its node is going; not requeueing")


def used_up_here(history: History) -> bool:
    """True if submitit's local controller will not start the run again."""
    return sum(history.requeues_since_submission.values()) >= LOCAL_REQUEUES


def _after_signal_without_slurm(ending: Ending, spec: Spec, history: History, now: datetime) -> Decision:
    if ending.scheduler is None:
        return Decision("leave", "stopped", "run the same command again to go on from here")
    if ending.received is signal.SIGTERM or not spec.resources.requeue:
        return Decision("leave", "stopped", "not requeued; submit the same again to go on from here")
    if used_up_here(history):
        limit = f"not requeued: the local executor restarts a job at most {LOCAL_REQUEUES} times"
        return Decision("leave", "stopped", f"{limit}; submit the same again to go on from here")
    if by := _requested_by(ending, history, now):
        return Decision("requeue", "requested", f"requeued for {by}: the local executor starts the run again")
    return Decision("requeue", "signal", "requeued after a signal: the local executor starts the run again")


def _after_signal(
    ending: Ending, spec: Spec, history: History, job: Mapping[str, str] | None, now: datetime
) -> Decision:
    if job is None:
        return Decision("hold", "unknown", "scontrol does not answer, so requeueing is left to Slurm; waiting for it")
    state = job.get("JobState", "")
    if state != "RUNNING" and int(job.get("Restarts") or 0) > ending.restarts:
        return Decision("leave", "requeued", f"JobState={state}: {_who_requeued(job)}")
    too_late = job.get("Reason") == "TimeLimit"  # the warning came before Python could hear it; a requeue is accepted
    if state not in ALIVE and not too_late:
        # scontrol requeue would succeed here and bring back a job that somebody has cancelled.
        return without_nodes(job)
    end, preempted = parse_instant(job.get("EndTime")), _preempted(job)
    near_end = end is not None and (end - now).total_seconds() <= spec.resources.warning_seconds + EARLY_SECONDS
    by = "" if preempted or too_late else _requested_by(ending, history, now)
    timeout = too_late or (near_end and not (preempted or by) and ending.received is not signal.SIGTERM)
    reason = "preemption" if preempted else "requested" if by else "timeout" if timeout else "signal"
    words = {"requested": f"{by} asked for a requeue", "signal": "a signal for which Slurm has no reason"}.get(
        reason, reason
    )
    if not _may_requeue(spec, job):
        return Decision("leave", reason, f"{words}; the job may not be requeued (--no-requeue): submit again to go on")
    asked = ending.refused is not None  # and so counted in the history
    if timeout and history.requeues_since_submission.get("timeout", 0) >= spec.timeouts.max + asked:
        return Decision("leave", reason, "timeout; timeouts.max is used up: submit again to go on")
    if ending.refused and preempted and (end is None or (now - end).total_seconds() < EARLY_SECONDS):
        return Decision("hold", reason, f"{ending.refused}; waiting until Slurm ends the job, and perhaps requeues it")
    if ending.refused:
        return Decision("leave", reason, f"{words}; not requeued: {ending.refused} Submit again to go on")
    killed = "all processes were killed, " if ending.cause == "killed" else ""
    return Decision("requeue", reason, f"JobState={state}: {killed}{words}; requeueing")


def _after_failure(ending: Ending, spec: Spec, history: History, job: Mapping[str, str] | None) -> Decision:
    """Retry only if that may help, and only while the run gets further from one failure to the next."""
    state = "unknown" if job is None else job.get("JobState")
    ended = ending.scheduler == "slurm" and state not in ALIVE
    if ending.cause == "busy" and job is None:
        ended = False  # Slurm refuses the requeue itself if the job may not come back
    if ended and job is not None and ending.cause == "lost":
        return Decision("leave", "ended", f"JobState={state}: the job is being ended, and another rank was faster")
    used, limit = history.requeues_since_submission.get("failure", 0), spec.failures.max
    earlier, refusal = history.failed_step, ""
    if not ending.retryable:
        refusal = ": the same would happen again"
    elif ending.scheduler is None or not _may_requeue(spec, job):
        refusal = "; submit the same again to go on from the newest checkpoint"
    elif earlier is not None and ending.step <= earlier and not (ending.cause == "busy" or ending.bad_node):
        refusal = (
            f": the run failed at step {earlier} before and got no further this time (step {ending.step}). "
            "HINT: fix the cause and submit again"
        )
    elif ending.scheduler == "local" and used_up_here(history):
        refusal = f": the local executor restarts a job at most {LOCAL_REQUEUES} times; submit again to go on"
    elif used >= limit:
        refusal = f": failures.max ({limit}) is used up; submit again to go on"
    elif ended:
        refusal = f": JobState={state}" if job else ": scontrol does not answer; submit again to go on"
    if refusal:
        return Decision("fail", "failure", f"not requeued{refusal}")
    first, longest = DELAY_SECONDS[str(ending.scheduler)]
    # The other process holds the lock for longer than this one has already waited for it.
    delay = min(first << (used + (ending.cause == "busy")), longest)
    return Decision("requeue", "failure", f"requeueing after failure {used + 1} of at most {limit}", delay)


def ask_about(job_id: str, warn: Callable[[str], None], patience_seconds: float = 0.0) -> dict[str, str] | None:
    """Ask Slurm for the fields of a job, again and again while there is no contact; None if it does not answer.

    Args:
        warn: logs the first refusal.
    """
    end, warned = time.monotonic() + patience_seconds, False
    while True:
        try:
            return job_fields(job_id)
        except SchedulerError as error:
            if not warned:
                warn(str(error))
            warned = True
            if not NO_CONTACT.search(str(error)) or time.monotonic() >= end:
                return None
        time.sleep(ASK_AGAIN_SECONDS)


def _may_requeue(spec: Spec, job: Mapping[str, str] | None) -> bool:
    return spec.resources.requeue and (job is None or job.get("Requeue") != "0")


def is_stopping(job: Mapping[str, str]) -> bool:
    """True if Slurm has begun to stop this start of a job, by its fields."""
    return job.get("JobState") not in ALIVE or _preempted(job)


def _preempted(job: Mapping[str, str]) -> bool:
    """True if this start of a job is being preempted: a PreemptTime before StartTime is an earlier start's."""
    preempted, started = parse_instant(job.get("PreemptTime")), parse_instant(job.get("StartTime"))
    return preempted is not None and (started is None or preempted >= started)


def refused_for_good(refusal: SchedulerError) -> bool:
    """True if asking again is useless."""
    return _FOR_GOOD.search(str(refusal)) is not None


def broken_node(words: str, node: str | None) -> str:
    """`node`, if these words of a failed program tell of a fault of its node; else nothing."""
    return node or "" if _NODE_FAULT.search(words) else ""


def _nodes_but(node: str, job_id: str, fewest: int) -> str:
    """The nodes to exclude, so that a job and the other tasks of its array keep away from `node`, too.

    Args:
        fewest: nodes that the job needs at least.

    Returns:
        A value for `requeue_job`; empty if too few nodes of the same kind would be left.

    Raises:
        SchedulerError: Slurm does not answer.
    """
    text = client.command(["scontrol", "show", "job", "-o", job_id.partition("_")[0]])
    excluded, partitions = (set(re.findall(rf" {key}=([^\s(]\S*)", text)) for key in ("ExcNodeList", "Partition"))
    expanded = client.command(["scontrol", "show", "hostnames", ",".join({node, *excluded})]).split()
    options = ("--noheader", "--Node", f"--partition={','.join(partitions)}")
    lines = client.command(["sinfo", *options, "--format=%N|%t|%c|%m|%G|%f"]).splitlines()
    rows = [line.split("|", 2) for line in lines if line.count("|") > 1]
    kinds = {name: kind for name, _, kind in rows}
    alike = {name for name, state, kind in rows if kind == kinds.get(node) and _TAKES_JOBS.fullmatch(state)}
    return ",".join(sorted(expanded)) if len(alike.difference(expanded)) >= fewest else ""


def elsewhere(decision: Decision, ending: Ending, spec: Spec, job_id: str) -> Decision:
    """The decision, with the broken node kept away from the next attempt if enough others are left."""
    if decision.action != "requeue" or not ending.bad_node:
        return decision
    exclude, why = "", ": resources.nodelist asks for certain nodes"
    if spec.resources.nodelist is None:
        try:
            exclude = _nodes_but(ending.bad_node, job_id, node_counts(spec.resources.nodes)[0])
            why = "" if exclude else ": too few others would be left"
        except SchedulerError as error:
            why = f": {error}"
    words = f"{'without' if exclude else 'not without'} node {ending.bad_node}, which looks broken{why}"
    return replace(decision, exclude=exclude, explanation=f"{decision.explanation}, {words}")


def notify(paths: RunPaths, spec: Spec, state: str, reason: str, log: TrainLog) -> None:
    """Run the user's notify.command for a run that is over; its trouble is a line in train.log.

    Args:
        state: finished, failed, or stopped (timeouts.max is used up).
    """
    if not spec.notify.command:
        return
    known = {"RUN": paths.name, "STATE": state, "REASON": one_line(without_class(reason)), "LOGS": str(paths.logs)}
    environment = {**os.environ, **{f"CIFAR_HPC_{key}": value for key, value in known.items()}}
    shell = ("/bin/sh", "-c", spec.notify.command)
    try:
        process = subprocess.Popen(shell, env=environment, stdin=subprocess.DEVNULL, start_new_session=True)
        if status := process.wait(NOTIFY_SECONDS):
            log.warn(f"notify.command ended with exit status {status}; what it printed is in the job's output")
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        log.warn(f"notify.command did not end within {NOTIFY_SECONDS:g} s, and was killed")
    except OSError as error:
        log.warn(f"notify.command could not run: {error}")


def end_for_good(job_id: str, history: History) -> None:
    """Keep a job that is over from coming back on behalf of a preemption that it has answered itself."""
    if history.requeues_since_submission.get("preemption"):  # otherwise a person may still requeue it by hand
        forbid_requeue(job_id)


def request_requeue(
    job_id: str, decision: Decision, spec: Spec, emit: Emit, recorded: bool = False, again: bool = False
) -> None:
    """Requeue a job, and record that in events.jsonl.

    Args:
        emit: appends an event.
        recorded: the event has been written already.
        again: the caller asks again after a passing refusal.

    Raises:
        SchedulerError: Slurm refused; that is recorded, too, if it was the last time.
    """
    if not recorded:  # before the request, since Slurm kills this process right after it
        emit(decision.event())
    try:
        requeue_job(job_id, decision.delay_seconds, spec.resources.fewest_tasks, decision.exclude)
    except SchedulerError as refusal:
        if not again or refused_for_good(refusal):
            emit(RequeueFailed(reason=str(refusal)))
        raise

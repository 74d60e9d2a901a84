"""Slurm's commands (scontrol(1), squeue(1), scancel(1)): the state of jobs and of the queue, and changes to them."""

import contextlib
import os
import pwd
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

from cifar_hpc.errors import SchedulerError
from cifar_hpc.slurm.options import left_out

# After a requeue Slurm waits for about this long by itself (Reason=BeginTime).
SLURM_DELAY_SECONDS = 121
# A node refuses a start of a job in the very second in which it ended the job's last one ("Job credential revoked"),
# and Slurm then gives the job up for good: FAILED (measured with Slurm 22.05). One more for clocks that differ.
RELEASE_SECONDS = 2
SILENT_SECONDS = 30.0  # until the next question after one that Slurm did not answer, for which squeue takes ten
# Slurm signals a job's whole process tree; a scontrol that dies of its own requeue's SIGTERM would look like a refusal.
_IGNORE_SIGNALS = 'trap "" TERM USR1 USR2; exec "$@"'
# Words of failures in which Slurm may have done what it was asked, or will once it is reached again.
NO_CONTACT = re.compile(r"(?i)timed? ?out|not answer|contact|connect|communic|zero bytes|transmi|receiv|unexpected")
# Options of Slurm's commands by environment variable: the cluster, which jobs are shown or cancelled, and how.
_OPTIONS = re.compile("(?:SQUEUE|SINFO|SCONTROL|SCANCEL)_|SLURM_CLUSTERS$")
_ALL = {"SQUEUE_ALL": "1", "SINFO_ALL": "1", "SCONTROL_ALL": "1"}  # partitions that a site hides have jobs, too


def command(
    arguments: Sequence[str], timeout_seconds: float = 30, stderr_too: bool = False, folder: Path | None = None
) -> str:
    """Run one of Slurm's commands and return what it prints.

    Args:
        folder: to run it in.

    Raises:
        SchedulerError: the command is missing, refuses (its own words are in the message), or does not answer.
    """
    if shutil.which(arguments[0]) is None:
        hint = "HINT: is this a node of the cluster, is Slurm's module loaded?"
        raise SchedulerError(f"{arguments[0]} is not on PATH. {hint}")
    times = {"SLURM_TIME_FORMAT": "standard" if arguments[0] == "sbatch" else "%s"}  # for people, and for parse_instant
    out = set(left_out(os.environ)) if arguments[0] == "sbatch" else set(filter(_OPTIONS.match, os.environ))
    try:
        result = subprocess.run(
            ["/bin/sh", "-c", _IGNORE_SIGNALS, "sh", *arguments],
            capture_output=True,
            text=True,
            errors="replace",  # a job of this user may work in a folder of any name
            env={k: v for k, v in os.environ.items() if k not in out} | times | _ALL,
            cwd=folder,
            timeout=timeout_seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise SchedulerError(f"{' '.join(arguments)} did not answer within {timeout_seconds:g} s.") from None
    if result.returncode != 0:
        words = (result.stderr or result.stdout).strip() or f"exit status {result.returncode}"
        raise SchedulerError(f"{' '.join(arguments)} was refused: {words}")
    return result.stdout + (result.stderr if stderr_too else "")


def answers() -> bool:
    """True if this machine can submit to a Slurm.

    Raises:
        SchedulerError: Slurm is configured but its controller does not answer. Training on a login node instead,
            without a word, would be wrong.
    """
    if shutil.which("sbatch") is None:
        return False
    try:
        command(["squeue", "--noheader", "--jobs=1", "--states=all"], timeout_seconds=15)
    except SchedulerError as error:
        if "Invalid job id" in str(error):
            return True
        if _unconfigured(error):
            return False
        hint = "HINT: try again, or use --cluster local to train on this machine."
        raise SchedulerError(f"Slurm is installed but does not answer: {error} {hint}") from None
    return True


def own_job_id() -> str | None:
    """The id of the job that this process belongs to, for Slurm's commands; None outside of a job.

    SLURM_JOB_ID does not name a task of an array: for the last one to start it is the id of the array itself, by which
    `scontrol show job` shows all of them.
    """
    array, index = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{index}" if array and index else os.environ.get("SLURM_JOB_ID")


def job_fields(job_id: str) -> dict[str, str]:
    """The fields of `scontrol show job -o`, such as JobState, PreemptTime, EndTime, Restarts.

    Raises:
        SchedulerError: scontrol is missing, does not know the job, or prints anything but this one job.
    """
    text = command(["scontrol", "show", "job", "-o", job_id])
    jobs = re.findall(r"^JobId=.* JobState=.*", text, re.MULTILINE)  # a site's wrapper may print lines of its own
    # The first counts: a comment or a path may hold words such as JobState=FAILED.
    fields = dict(reversed(re.findall(r"(\S+?)=(.*?)(?=\s\S+?=|\s*$)", jobs[0]))) if len(jobs) == 1 else {}
    if job_id not in (fields.get("JobId"), f"{fields.get('ArrayJobId')}_{fields.get('ArrayTaskId')}"):
        shown = " ".join(text.split())[:200] or "nothing"
        raise SchedulerError(f"scontrol show job {job_id} does not answer: it printed {shown}.")
    return fields


def restart_count() -> int:
    """Number of restarts, by Slurm, of the job that this process belongs to."""
    return int(os.environ.get("SLURM_RESTART_COUNT") or 0)


def requeue_job(job_id: str, delay_seconds: int = 0, fewest_tasks: int | None = None, exclude: str = "") -> None:
    """Put this process's running job back into the queue.

    Args:
        delay_seconds: time until it may start, if longer than Slurm's own two minutes.
        fewest_tasks: see `allow_fewer_nodes`.
        exclude: nodes that it may not start on, and the waiting tasks of its array neither; empty for no change.

    Raises:
        SchedulerError: Slurm refused.
    """
    try:
        command(["scontrol", "requeue", job_id])
    except SchedulerError:
        # A controller that was too slow with its answer may have done it.
        if int(job_fields(job_id).get("Restarts") or 0) <= restart_count():
            raise
    if exclude:
        with contextlib.suppress(SchedulerError):  # refused for tasks of the array that run, accepted for the others
            _update(job_id.partition("_")[0], f"ExcNodeList={exclude}")
    allow_fewer_nodes(job_id, fewest_tasks)
    if delay_seconds > SLURM_DELAY_SECONDS:
        # Accepted while the job is COMPLETING, and kept when that ends (measured with Slurm 22.05).
        with contextlib.suppress(SchedulerError):
            _update(job_id, f"StartTime=now+{delay_seconds}")


def allow_fewer_nodes(job_id: str, fewest_tasks: int | None) -> None:
    """Let a requeued job that asked for a range of nodes start on the fewest of them again.

    Slurm keeps the number of tasks of the largest start so far, and would wait for as many nodes (measured with Slurm
    22.05). Accepted while the job is COMPLETING, too; with more nodes Slurm raises the number by itself.

    Args:
        fewest_tasks: number of tasks on the fewest nodes; None if the number of nodes is fixed.
    """
    if fewest_tasks is not None:
        with contextlib.suppress(SchedulerError):  # a job that is not in the queue
            _update(job_id, f"NumTasks={fewest_tasks}")


def forbid_requeue(job_id: str) -> None:
    """Keep Slurm from requeueing a job that is about to end for good, if Slurm answers.

    Since Slurm 24.05 a preemption's request outlives the start it was meant for, if that has requeued itself: the job
    comes back once more, however a later start ends.
    """
    with contextlib.suppress(SchedulerError):
        _update(job_id, "Requeue=0")


def release_job(job_id: str, held: bool = False) -> None:
    """Let a waiting job start RELEASE_SECONDS from now, instead of after Slurm's two minutes or when it is released."""
    _update(job_id, f"StartTime=now+{RELEASE_SECONDS}")
    if held:  # JobHeldUser, or launch_failed_requeued_held after a node's trouble; last, since now it may start
        command(["scontrol", "release", job_id])


def _update(job_id: str, change: str) -> None:
    command(["scontrol", "update", f"jobid={job_id}", change])


def end_step(job_id: str) -> None:
    """Kill every task of the step that this process belongs to, itself too; the job then ends as FAILED."""
    command(["scancel", "--signal=KILL", f"{job_id}.{os.environ.get('SLURM_STEP_ID', '0')}"])


def cancel_job(*job_ids: str) -> None:
    """Cancel a job, or several."""
    command(["scancel", *job_ids])


def parse_instant(text: str | None) -> datetime | None:
    """A time as Slurm's commands print it here, in seconds since 1970 (a local time is ambiguous when clocks are set
    back); None for N/A, Unknown and None."""
    return datetime.fromtimestamp(int(text), UTC) if text and re.fullmatch("[0-9]{1,11}", text) else None


_HELD = ("REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD")


# Reasons of squeue(1), JOB REASON CODES, and https://slurm.schedmd.com/job_reason_codes.html, in words. The code itself
# always comes first, so that it can be looked up; one that is not known here has no words.
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


@dataclass(frozen=True)
class QueuedJob:
    """One line of squeue."""

    job_id: str  # 123, or 123_4 for a task of an array
    name: str
    state: str
    reason: str
    start: str  # expected or actual, in seconds since 1970 or N/A; of a job that waits for its begin time, that time
    nodes: str
    partition: str  # or several, with commas
    dependency: str  # those not fulfilled yet, as squeue prints them: singleton(unfulfilled),afterok:5(unfulfilled)
    directory: str  # the folder it works in
    user: str = ""  # who has submitted it, if that is another user
    behind: str = ""  # the job that its singleton waits for, if that belongs to another folder

    @property
    def waits(self) -> bool:
        """True if it is pending; squeue names some pending jobs by what holds them."""
        return self.state in ("PENDING", "REQUEUE_FED", *_HELD)

    @property
    def held(self) -> bool:
        """True if it waits until it is released."""
        return self.state in _HELD or "held" in self.reason.lower()

    @property
    def start_time(self) -> datetime | None:
        """Expected or actual start; None if it is not known or the job is held."""
        return parse_instant(self.start) if not self.held else None

    @property
    def reason_code(self) -> str:
        """Slurm's reason without details such as the names of nodes."""
        code = self.reason.replace("_", " ") if "held" in self.reason else self.reason
        # A sentence, in place of a code.
        return "Nodes required" if code.startswith("Nodes required for job are") else code.partition(",")[0].strip()

    @property
    def why(self) -> str:
        """`Priority: other jobs go first`; the code alone if it is not known here."""
        code = self.reason_code
        if code == "None":
            return "Slurm has not looked at it yet"
        after = re.findall(r"after\w*:([0-9_*]+)", self.dependency) if code == "Dependency" else []
        if after:
            words: str | None = f"job{'s' * (len(after) > 1)} {', '.join(after)} must end first"
        elif code == "Dependency" and self.behind:
            words = f"{self.behind} must end first"
        elif code == "Dependency":
            words = f"another job{' of this run' * ('singleton' in self.dependency)} must end first"
        elif limit := re.fullmatch(r"Max\w*Per(Account|User)", code):
            words = f"a limit of the QOS for one {limit[1].lower()}"
        else:
            words = _WORDS.get(code) or next((text for prefix, text in _LIMITS if code.startswith(prefix)), None)
        return f"{code}: {words}" if words else code


_QUEUE_FORMAT = "%i|%j|%T|%r|%S|%N|%P|%E|%Z"
# Names and folders of jobs that are not of this project may hold bars as well; no other field does.
_QUEUE_LINE = re.compile(r"([^|]*)\|(.*?)\|([A-Z_]+)" + r"\|([^|]*)" * 5 + r"\|(.*)")
ON_CLUSTER = " on cluster "  # in the user of a job that is not of the cluster here
HIDDEN = "HIDDEN"  # state of a job that its user has recorded and that Slurm does not show to others
IDS_A_CALL = 1000  # arguments have a limit


@cache
def user_name() -> str:
    """Name of this user, by number: $LOGNAME, from which getpass takes it, is another user's under su(1)."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:  # in a container the user may have no name
        return str(os.getuid())


def squeue(timeout_seconds: float = 30) -> list[QueuedJob]:
    """This user's jobs; none on a machine without Slurm.

    Raises:
        SchedulerError: Slurm does not answer.
    """
    return [_queued(line) for line in _squeue(_QUEUE_FORMAT, timeout_seconds, "--user", str(os.getuid()))]


def squeue_jobs(ids: Sequence[str], timeout_seconds: float = 30) -> dict[str, QueuedJob]:
    """Those of these jobs, of any user, that are in the queue and may be seen, by id.

    Raises:
        SchedulerError: Slurm does not answer.
    """
    lines: list[str] = []
    for begin in range(0, len(ids), IDS_A_CALL):
        asked = f"--jobs={','.join(ids[begin : begin + IDS_A_CALL])}"
        try:
            lines += _squeue(f"{_QUEUE_FORMAT}|%u", timeout_seconds, asked)
        except SchedulerError as error:
            if "Invalid job id" not in str(error):  # with which Slurm knows none of them
                raise
    rows = [line.rpartition("|") for line in lines if line.partition("|")[0] in ids]
    jobs = [replace(_queued(line), user=user if user != user_name() else "") for line, _, user in rows]
    return {job.job_id: job for job in jobs}


def hides_jobs() -> bool:
    """True if squeue may not show jobs of other users here."""
    try:
        return "jobs" in config().get("PrivateData", "").split(",")
    except SchedulerError:
        return True


@cache
def cluster_name() -> str:
    """Name of the cluster whose Slurm answers here; empty if it does not answer."""
    with contextlib.suppress(SchedulerError):
        return config().get("ClusterName", "")
    return ""


def config() -> dict[str, str]:
    """Slurm's configuration, by the names of `scontrol show config`.

    Raises:
        SchedulerError: Slurm does not answer.
    """
    text = command(["scontrol", "show", "config"])
    return {key: value.strip() for key, value in re.findall(r"^(\w+)\s*= ?(.*)$", text, re.MULTILINE)}


def _queued(line: str) -> QueuedJob:
    match = _QUEUE_LINE.fullmatch(line)
    if match is None:  # to leave out a job would be to say that it is gone
        raise SchedulerError(f"squeue does not answer: it printed {line[:200]!r}, where a line of a job should be.")
    return QueuedJob(*match.groups())


def _squeue(fields: str, timeout_seconds: float, *options: str) -> list[str]:
    """Lines of jobs; none on a machine without Slurm."""
    if shutil.which("squeue") is None:
        return []
    try:  # with --array each waiting task of an array has a line of its own
        text = command(["squeue", "--noheader", "--array", *options, f"--format={fields}"], timeout_seconds)
    except SchedulerError as error:
        if _unconfigured(error):
            return []
        raise
    lines: list[str] = []
    for line in text.split("\n"):  # a site's wrapper may print lines of its own, a job's name may hold line breaks
        if re.match(r"[0-9]+[^|\s]*\|", line):
            lines.append(line)
        elif lines and lines[-1].count("|") < fields.count("|"):
            lines[-1] += f" {line}"
    return lines


def _unconfigured(error: SchedulerError) -> bool:
    """True if Slurm's programs are installed here without belonging to any cluster."""
    return any(words in str(error) for words in ("configuration source", "Unable to process configuration file"))

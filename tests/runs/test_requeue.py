"""The decision on a requeue. The states are those that a real Slurm showed (docs/slurm-scenarios.md)."""

from __future__ import annotations

import os
import signal
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from helpers import tiny_spec

from cifar_hpc.errors import SchedulerError
from cifar_hpc.runs import requeue
from cifar_hpc.runs.events import Event, Requeued, RequeueFailed
from cifar_hpc.runs.history import History
from cifar_hpc.runs.logs import TrainLog
from cifar_hpc.runs.paths import RunPaths
from cifar_hpc.runs.requeue import LOCAL_REQUEUES, Decision, Ending, decide, is_stopping, notify, request_requeue

NOW = datetime(2026, 1, 2, 12, 0, 0, tzinfo=UTC)


def at(clock: str) -> str:
    """A time of that day as Slurm is asked to print it."""
    return str(int(datetime.fromisoformat(f"2026-01-02T{clock}+00:00").timestamp()))


LATER, SOON = at("16:00:00"), at("12:02:30")
RUNNING = {"JobState": "RUNNING", "Restarts": "0", "Requeue": "1", "PreemptTime": "None", "EndTime": LATER}
PREEMPTED = RUNNING | {"PreemptTime": at("11:59:58"), "EndTime": SOON}
COMPLETING = RUNNING | {"JobState": "COMPLETING"}
ASKED = "2026-01-02T11:59:58Z"
ATTEMPT = {"event": "attempt", "job_id": "7", "restart": None, "restart_count": 0}
STARTED = {"event": "resumed", "job_id": "7", "restart": 0, "step": 5}
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


def requeued(reason: str, count: int) -> list[dict[str, Any]]:
    return [{"event": "requeued", "reason": reason}] * count


def failed(step: int, event: str = "failed") -> list[dict[str, Any]]:
    return [{"event": event, "step": step}, *requeued("failure", 1)]


def after_signal(
    received: signal.Signals | None,
    job: dict[str, str] | None,
    scheduler: str | None = "slurm",
    restarts: int = 0,
    timeouts: int = 0,
    preemptions: int = 0,
    requests: int = 0,
    requeue: bool = True,
    before: tuple[dict[str, Any], ...] = (),
    then: tuple[dict[str, Any], ...] = (),
    **asked: str | None,
) -> Decision:
    spec = tiny_spec(resources={"requeue": requeue, "warning_seconds": 120}, timeouts={"max": 3})
    counts = {"timeout": timeouts, "preemption": preemptions, "requested": requests}
    events = [row for reason, count in counts.items() for row in requeued(reason, count)]
    request = [{"event": "requeue_requested", "job_id": "7", "by": "alice", "time": time} for time in asked.values()]
    events = [*events, *before, *request, *then]
    return decide(Ending("signal", scheduler, received, restarts), spec, History.of(events), job, NOW)


def after_failure(
    cause: str = "error",
    events: list[dict[str, Any]] | None = None,
    step: int = 5,
    job: dict[str, str] | None = RUNNING,
    limit: int = 3,
    requeue: bool = True,
    **ending: Any,
) -> Decision:
    spec = tiny_spec(resources={"requeue": requeue}, failures={"max": limit})
    return decide(Ending(cause, step=step, **ending), spec, History.of(events or []), job, NOW)


# case, signal, fields of scontrol, changes -> action, reason
SIGNALS = [
    ("preempted, its signal on the way", signal.SIGTERM, PREEMPTED | {"JobState": "SIGNALING"}, {}, "requeue",
     "preemption"),
    ("preempted with grace", signal.SIGTERM, PREEMPTED, {}, "requeue", "preemption"),
    ("preempted, USR2 first", signal.SIGUSR2, PREEMPTED, {}, "requeue", "preemption"),
    ("preempted, another rank got the signal", None, PREEMPTED, {}, "requeue", "preemption"),
    ("SIGTERM by a person or the node", signal.SIGTERM, RUNNING, {}, "requeue", "signal"),
    ("the same, PreemptTime=N/A", signal.SIGTERM, RUNNING | {"PreemptTime": "N/A"}, {}, "requeue", "signal"),
    ("a preemption near the end is none of the timeouts", signal.SIGTERM, PREEMPTED, {"timeouts": 3}, "requeue",
     "preemption"),
    ("preempted after earlier restarts", signal.SIGTERM, PREEMPTED | {"Restarts": "4"}, {"restarts": 4}, "requeue",
     "preemption"),
    ("near the time limit after an earlier start was preempted", signal.SIGUSR2,
     PREEMPTED | {"StartTime": at("12:00:00")}, {}, "requeue", "timeout"),
    ("no grace, or scontrol requeue: Slurm has requeued", signal.SIGTERM, COMPLETING | {"Restarts": "1"}, {}, "leave",
     "requeued"),
    ("the same at the fifth time", signal.SIGTERM, COMPLETING | {"Restarts": "5"}, {"restarts": 4}, "leave",
     "requeued"),
    ("pending again already", signal.SIGTERM, RUNNING | {"JobState": "PENDING", "Restarts": "1"}, {}, "leave",
     "requeued"),
    ("scancel", signal.SIGTERM, COMPLETING, {}, "leave", "ended"),
    ("scancel after restarts", signal.SIGTERM, COMPLETING | {"Restarts": "2"}, {"restarts": 2}, "leave", "ended"),
    ("cancelled", signal.SIGTERM, RUNNING | {"JobState": "CANCELLED"}, {}, "leave", "ended"),
    ("node down", signal.SIGTERM, RUNNING | {"JobState": "NODE_FAIL"}, {}, "leave", "ended"),
    ("node down, another rank got the signal", None, COMPLETING, {}, "leave", "ended"),
    ("time limit near", signal.SIGUSR2, RUNNING | {"EndTime": SOON}, {}, "requeue", "timeout"),
    ("time limit near, another rank got the signal", None, RUNNING | {"EndTime": SOON}, {}, "requeue", "timeout"),
    ("time limit, warned 60 s early", signal.SIGUSR2, RUNNING | {"EndTime": at("12:03:00")}, {}, "requeue",
     "timeout"),
    ("time limit has passed", signal.SIGUSR2, RUNNING | {"EndTime": at("11:59:59")}, {}, "requeue", "timeout"),
    ("the last timeout", signal.SIGUSR2, RUNNING | {"EndTime": SOON}, {"timeouts": 2}, "requeue", "timeout"),
    ("timeouts used up", signal.SIGUSR2, RUNNING | {"EndTime": SOON}, {"timeouts": 3}, "leave", "timeout"),
    ("the limit, without a warning", signal.SIGTERM, COMPLETING | {"Reason": "TimeLimit"}, {}, "requeue", "timeout"),
    ("the same, timeouts used up", signal.SIGTERM, COMPLETING | {"Reason": "TimeLimit"}, {"timeouts": 3}, "leave",
     "timeout"),
    ("USR2 far from the end", signal.SIGUSR2, RUNNING | {"EndTime": at("12:03:01")}, {}, "requeue", "signal"),
    ("USR1 by a person", signal.SIGUSR1, RUNNING, {}, "requeue", "signal"),
    ("no time limit", signal.SIGUSR2, RUNNING | {"EndTime": "Unknown"}, {}, "requeue", "signal"),
    ("requested", signal.SIGUSR2, RUNNING, {"asked": ASKED}, "requeue", "requested"),
    ("requested, another rank got the signal", None, RUNNING, {"asked": ASKED}, "requeue", "requested"),
    ("requested near the time limit, with no timeout left", signal.SIGUSR2, RUNNING | {"EndTime": SOON},
     {"asked": ASKED, "timeouts": 3}, "requeue", "requested"),
    ("requested many times: no limit counts it", signal.SIGUSR2, RUNNING, {"asked": ASKED, "requests": 999}, "requeue",
     "requested"),
    ("requested, and preempted a second later", signal.SIGUSR2, PREEMPTED, {"asked": ASKED}, "requeue", "preemption"),
    ("requested, and the signal is another one", signal.SIGTERM, RUNNING, {"asked": ASKED}, "requeue", "signal"),
    ("requested, and requeued by scontrol meanwhile", signal.SIGUSR2, COMPLETING | {"Restarts": "1"}, {"asked": ASKED},
     "leave", "requeued"),
    ("requested, and cancelled meanwhile", signal.SIGUSR2, COMPLETING, {"asked": ASKED}, "leave", "ended"),
    ("requested, --no-requeue", signal.SIGUSR2, RUNNING, {"asked": ASKED, "requeue": False}, "leave", "requested"),
    ("requested long ago: its signal was lost, and this is the time limit", signal.SIGUSR2, RUNNING | {"EndTime": SOON},
     {"asked": "2026-01-02T11:49:00Z"}, "requeue", "timeout"),
    ("requested, by a row without a time", signal.SIGUSR2, RUNNING, {"asked": None}, "requeue", "signal"),
    ("requested in the attempt before", signal.SIGUSR2, RUNNING, {"asked": ASKED, "then": [STARTED]}, "requeue",
     "signal"),
    ("requested while the job started", signal.SIGUSR2, RUNNING, {"before": [ATTEMPT], "asked": ASKED,
     "then": [STARTED]}, "requeue", "requested"),
    ("--no-requeue", signal.SIGTERM, PREEMPTED, {"requeue": False}, "leave", "preemption"),
    ("--no-requeue, time limit", signal.SIGUSR2, RUNNING | {"EndTime": SOON}, {"requeue": False}, "leave",
     "timeout"),
    ("the job may not be requeued", signal.SIGTERM, PREEMPTED | {"Requeue": "0"}, {}, "leave", "preemption"),
    ("no scontrol", signal.SIGTERM, None, {}, "hold", "unknown"),
    ("no scontrol and --no-requeue", signal.SIGUSR2, None, {"requeue": False}, "hold", "unknown"),
    ("fields without a state", signal.SIGTERM, {}, {}, "leave", "ended"),
]  # fmt: skip


@pytest.mark.parametrize(("received", "job", "change", "action", "reason"), [row[1:] for row in SIGNALS],
                         ids=[row[0] for row in SIGNALS])  # fmt: skip
def test_decide_after_a_signal(
    received: signal.Signals | None, job: dict[str, str] | None, change: dict[str, Any], action: str, reason: str
) -> None:
    decision = after_signal(received, job, **change)
    assert (decision.action, decision.reason) == (action, reason)
    assert decision.explanation and decision.delay_seconds == 0


@pytest.mark.parametrize("state", ["COMPLETING", "CANCELLED", "PENDING", "FAILED", "TIMEOUT", "NODE_FAIL", "SUSPENDED"])
def test_only_a_job_that_has_its_nodes_is_ever_requeued(state: str) -> None:
    """`scontrol requeue` would succeed otherwise, and bring back a job that somebody has cancelled."""
    job = PREEMPTED | {"JobState": state}
    assert {after_signal(received, job).action for received in (*STOP_SIGNALS, None)} == {"leave"}
    assert after_failure("lost", job=job).action == "leave"
    for cause in ("error", "out_of_memory", "hang", "busy"):
        decision = after_failure(cause, job=job)
        assert (decision.action, decision.explanation) == ("fail", f"not requeued: JobState={state}")


@pytest.mark.parametrize(
    ("scheduler", "received", "preemptions", "action", "words"),
    [
        ("local", signal.SIGUSR2, 0, "requeue", "after a signal: the local executor starts the run again"),
        ("local", None, LOCAL_REQUEUES - 1, "requeue", "the local executor starts the run again"),
        ("local", signal.SIGUSR1, LOCAL_REQUEUES, "leave", "restarts a job at most 5 times"),
        ("local", signal.SIGTERM, 0, "leave", "submit the same again"),
        (None, signal.SIGUSR2, 0, "leave", "the same command again"),
    ],
)
def test_decide_after_a_signal_without_slurm(
    scheduler: str | None, received: signal.Signals | None, preemptions: int, action: str, words: str
) -> None:
    decision = after_signal(received, None, scheduler, preemptions=preemptions)
    assert (decision.action, decision.reason) == (action, "signal" if action == "requeue" else "stopped")
    assert words in decision.explanation
    if scheduler == "local" and received is not signal.SIGTERM:
        asked = after_signal(signal.SIGUSR2, None, scheduler, preemptions=preemptions, asked=ASKED)
        assert (asked.action, asked.reason) == (action, "requested" if action == "requeue" else "stopped")
    if scheduler == "local":
        assert after_signal(received, None, scheduler, requeue=False).action == "leave"


def test_the_words_of_a_decision_say_who_asked_for_it() -> None:
    assert after_signal(signal.SIGUSR2, RUNNING, asked=ASKED).explanation == (
        "JobState=RUNNING: alice asked for a requeue; requeueing"
    )
    local = after_signal(signal.SIGUSR2, None, "local", asked=ASKED)
    assert local.explanation == "requeued for alice: the local executor starts the run again"
    held = after_signal(signal.SIGTERM, COMPLETING | {"Restarts": "1", "Reason": "job_requeued_in_held_state"})
    assert held.explanation == "JobState=COMPLETING: requeued and held by a person"
    unknown = after_signal(signal.SIGTERM, COMPLETING | {"Restarts": "1", "Reason": "None"})
    assert "by Slurm or a person" in unknown.explanation


def test_the_local_executor_starts_a_run_six_times_for_whatever_causes() -> None:
    rows = [*requeued("requested", 2), *requeued("signal", 1), *failed(10), *failed(20)]
    assert "at most 5 times" in after_failure(events=rows, step=30, scheduler="local", job=None).explanation
    assert after_failure(events=rows, step=30).action == "requeue"


@pytest.mark.parametrize(
    ("events", "step", "delay", "words"),
    [
        ([], 0, 120, "failure 1 of at most 3"),
        (failed(10), 11, 240, "failure 2 of at most 3"),
        ([*failed(10), *failed(20, "hang")], 21, 480, "failure 3 of at most 3"),
        (requeued("preemption", 9), 5, 120, "failure 1 of at most 3"),
        ([*failed(10), *failed(20), *failed(30)], 40, None, "failures.max (3) is used up"),
        (failed(10), 10, None, "failed at step 10 before and got no further this time (step 10)"),
        (failed(10), 7, None, "failed at step 10 before and got no further this time (step 7)"),
        (failed(0), 0, None, "failed at step 0 before"),
        (failed(20, "hang"), 20, None, "failed at step 20 before"),
    ],
)
def test_decide_retries_only_after_progress_and_after_a_growing_delay(
    events: list[dict[str, Any]], step: int, delay: int | None, words: str
) -> None:
    decision = after_failure(events=events, step=step)
    assert decision.action == ("fail" if delay is None else "requeue")
    assert (decision.reason, decision.delay_seconds) == ("failure", delay or 0)
    assert words in decision.explanation


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"retryable": False}, "the same would happen again"),
        ({"requeue": False}, "submit the same again"),
        ({"scheduler": None, "job": None}, "submit the same again"),
        ({"job": RUNNING | {"Requeue": "0"}}, "submit the same again"),
        ({"limit": 0}, "failures.max (0) is used up"),
        ({"job": None}, "scontrol does not answer"),
    ],
)
def test_decide_does_not_retry_where_that_is_useless_or_not_allowed(change: dict[str, Any], words: str) -> None:
    decision = after_failure(**change)
    assert (decision.action, decision.delay_seconds) == ("fail", 0)
    assert decision.explanation.startswith("not requeued") and words in decision.explanation


def test_the_delay_has_a_limit_and_is_short_without_a_queue() -> None:
    events = [row for step in range(1, 9) for row in failed(step)]
    assert after_failure(events=events, step=9, limit=99).delay_seconds == 3600
    assert after_failure(events=events[:8], step=9, limit=99, scheduler="local", job=None).delay_seconds == 32
    assert after_failure(scheduler="local", job=None).delay_seconds == 2


def test_decide_waits_longer_for_another_process_that_holds_the_run_whatever_the_progress() -> None:
    decision = after_failure("busy", failed(20), step=0)
    assert (decision.action, decision.reason, decision.delay_seconds) == ("requeue", "failure", 480)
    assert after_failure("busy", failed(20), step=0, limit=1).action == "fail"
    assert after_failure("busy", job=None).action == "requeue"  # Slurm refuses it, if the job may not come back


def test_decide_when_all_processes_were_killed() -> None:
    assert after_failure("killed").delay_seconds == 120
    preempted = after_failure("killed", failed(20), job=PREEMPTED)
    assert (preempted.action, preempted.reason, preempted.delay_seconds) == ("requeue", "preemption", 0)
    assert "all processes were killed" in preempted.explanation
    assert after_failure("killed", job=PREEMPTED, requeue=False).action == "leave"


@pytest.mark.parametrize(
    ("job", "stopping"),
    [
        (RUNNING, False),
        (RUNNING | {"JobState": "SIGNALING"}, False),
        (PREEMPTED, True),
        (PREEMPTED | {"StartTime": at("11:00:00")}, True),
        (PREEMPTED | {"StartTime": at("12:00:00")}, False),  # an earlier start was preempted, not this one
        (COMPLETING, True),
        (RUNNING | {"JobState": "PENDING"}, True),
    ],
)
def test_is_stopping(job: dict[str, str], stopping: bool) -> None:
    assert is_stopping(job) is stopping


def told(run: RunPaths, command: str | None, reason: str = "it is over") -> str:
    """What train.log says after notify.command."""
    run.create()
    notify(run, tiny_spec(notify={"command": command}), "failed", reason, TrainLog(run.train_log, enabled=True))
    return run.train_log.read_text() if run.train_log.exists() else ""


def test_notify_hands_the_command_what_happened_on_one_printable_line(tmp_path: Path) -> None:
    run = RunPaths(tmp_path, "run")
    script = tmp_path / "tell.sh"
    script.write_text(f"""#!/bin/sh
printf '%s|' "$1" "$CIFAR_HPC_RUN" "$CIFAR_HPC_STATE" "$CIFAR_HPC_REASON" "$CIFAR_HPC_LOGS" >> {tmp_path}/told
""")
    script.chmod(0o755)
    assert told(run, f"{script} 'a b'", "Error: \x1b[31mred\n $(touch x) 'é'") == ""
    reason = "Error: \\x1b[31mred $(touch x) 'é'"
    assert (tmp_path / "told").read_text() == f"a b|run|failed|{reason}|{run.logs}|"
    assert told(run, None) == ""


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("echo no; exit 3", "notify.command ended with exit status 3; what it printed is in the job's output"),
        ("/no/such/program", "ended with exit status 127; "),
        ("kill -9 $$", "ended with exit status -9; "),
        ("sleep 77 & sleep 77", "notify.command did not end within 0.5 s, and was killed"),
    ],
)
def test_a_notify_command_that_fails_or_hangs_is_one_line_of_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, words: str
) -> None:
    monkeypatch.setattr(requeue, "NOTIFY_SECONDS", 0.5 if "sleep" in command else 30.0)
    log = told(RunPaths(tmp_path, "run"), command)
    assert "WARNING" in log and words in log and log.count("\n") == 1


def test_what_a_notify_command_leaves_behind_is_not_waited_for(tmp_path: Path) -> None:
    """It has the output of the command open, as a program has that goes on in the background."""
    assert told(RunPaths(tmp_path, "run"), f"sleep 60 & echo $! > {tmp_path}/pid") == ""
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("refused", [False, True])
def test_request_requeue_records_it_before_the_request_and_a_refusal_after(
    monkeypatch: pytest.MonkeyPatch, recorded: bool, refused: bool
) -> None:
    happened: list[tuple[Any, ...] | Event] = []

    def requeue_job(*arguments: Any) -> None:
        happened.append(arguments)
        if refused:
            raise SchedulerError("no")

    monkeypatch.setattr(requeue, "requeue_job", requeue_job)
    decision = Decision("requeue", "failure", "again", 240)
    try:
        spec = tiny_spec(resources={"nodes": "1-2", "tasks_per_node": 2})
        request_requeue("7", decision, spec, happened.append, recorded)
    except SchedulerError:
        assert refused
    event = Requeued(reason="failure", delay_seconds=240, explanation="again")
    expected = [*([] if recorded else [event]), ("7", 240, 2, ""), *([RequeueFailed(reason="no")] * refused)]
    assert happened == expected


@pytest.mark.parametrize(
    ("words", "for_good"),
    [
        ("Requested operation is presently disabled for job 9", True),
        ("sudo: you are not permitted to do this", True),
        ("Invalid user id", True),
        ("Unable to contact slurm controller (connect failure)", False),
        ("Job can not be altered now, try again later", False),
        ("Zero Bytes were transmitted or received", False),
    ],
)
def test_refusals_for_good_and_those_that_pass(words: str, for_good: bool) -> None:
    assert requeue.refused_for_good(SchedulerError(words)) is for_good

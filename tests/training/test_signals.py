"""What to do with a signal: the table of states that a real Slurm showed, and the flag that handlers set."""

from __future__ import annotations

import os
import signal
import time
from datetime import datetime
from typing import Any

import pytest

from cifar_hpc.runs.requeue import Decision, decide, told_before
from cifar_hpc.training.signals import STOP_SIGNALS, StopFlag

NOW = datetime(2026, 1, 2, 12, 0, 0)
LATER, SOON = "2026-01-02T16:00:00", "2026-01-02T12:02:30"
RUNNING = {"JobState": "RUNNING", "Restarts": "0", "Requeue": "1", "PreemptTime": "None", "EndTime": LATER}
PREEMPTED = RUNNING | {"PreemptTime": "2026-01-02T11:59:58", "EndTime": SOON}
COMPLETING = RUNNING | {"JobState": "COMPLETING"}


def decided(received: signal.Signals | None, fields: dict[str, str] | None, **change: Any) -> Decision:
    arguments: dict[str, Any] = {
        "now": NOW, "own_restarts": 0, "warning_seconds": 120, "timeouts_left": 3, "may_requeue": True,
    }  # fmt: skip
    return decide(received, fields, **(arguments | change))


TABLE = [
    ("preempted, its signal on the way", signal.SIGTERM, PREEMPTED | {"JobState": "SIGNALING"}, {}, "requeue",
     "preemption"),
    # what happened, signal, scontrol's fields, changes -> action, reason
    ("preempted with grace", signal.SIGTERM, PREEMPTED, {}, "requeue", "preemption"),
    ("preempted, USR2 first", signal.SIGUSR2, PREEMPTED, {}, "requeue", "preemption"),
    ("preempted, another rank was told", None, PREEMPTED, {}, "requeue", "preemption"),
    ("preempted without PreemptTime", signal.SIGTERM, RUNNING, {}, "requeue", "preemption"),
    ("preempted, PreemptTime=N/A", signal.SIGTERM, RUNNING | {"PreemptTime": "N/A"}, {}, "requeue", "preemption"),
    ("a preemption near the end is none of the timeouts", signal.SIGTERM, PREEMPTED, {"timeouts_left": 0}, "requeue",
     "preemption"),
    ("preempted after earlier restarts", signal.SIGTERM, PREEMPTED | {"Restarts": "4"}, {"own_restarts": 4}, "requeue",
     "preemption"),
    ("near the time limit after an earlier start was preempted", signal.SIGUSR2,
     PREEMPTED | {"StartTime": "2026-01-02T12:00:00"}, {}, "requeue", "timeout"),
    ("preempted, no grace: Slurm has requeued", signal.SIGTERM, COMPLETING | {"Restarts": "1"}, {}, "leave",
     "preemption"),
    ("the same at the fifth time", signal.SIGTERM, COMPLETING | {"Restarts": "5"}, {"own_restarts": 4}, "leave",
     "preemption"),
    ("pending again already", signal.SIGTERM, RUNNING | {"JobState": "PENDING", "Restarts": "1"}, {}, "leave",
     "preemption"),
    ("scancel", signal.SIGTERM, COMPLETING, {}, "leave", "ended"),
    ("scancel after restarts", signal.SIGTERM, COMPLETING | {"Restarts": "2"}, {"own_restarts": 2}, "leave", "ended"),
    ("cancelled", signal.SIGTERM, RUNNING | {"JobState": "CANCELLED"}, {}, "leave", "ended"),
    ("node down", signal.SIGTERM, RUNNING | {"JobState": "NODE_FAIL"}, {}, "leave", "ended"),
    ("node down, another rank was told", None, COMPLETING, {}, "leave", "ended"),
    ("time limit near", signal.SIGUSR2, RUNNING | {"EndTime": SOON}, {}, "requeue", "timeout"),
    ("time limit near, another rank was told", None, RUNNING | {"EndTime": SOON}, {}, "requeue", "timeout"),
    ("time limit, warned 60 s early", signal.SIGUSR2, RUNNING | {"EndTime": "2026-01-02T12:03:00"}, {}, "requeue",
     "timeout"),
    ("time limit has passed", signal.SIGUSR2, RUNNING | {"EndTime": "2026-01-02T11:59:59"}, {}, "requeue", "timeout"),
    ("the last timeout", signal.SIGUSR2, RUNNING | {"EndTime": SOON}, {"timeouts_left": 1}, "requeue", "timeout"),
    ("timeouts used up", signal.SIGUSR2, RUNNING | {"EndTime": SOON}, {"timeouts_left": 0}, "leave", "timeout"),
    ("USR2 far from the end", signal.SIGUSR2, RUNNING | {"EndTime": "2026-01-02T12:03:01"}, {}, "requeue",
     "preemption"),
    ("USR1 by a person", signal.SIGUSR1, RUNNING, {}, "requeue", "preemption"),
    ("no time limit", signal.SIGUSR2, RUNNING | {"EndTime": "Unknown"}, {}, "requeue", "preemption"),
    ("--no-requeue", signal.SIGTERM, PREEMPTED, {"may_requeue": False}, "leave", "preemption"),
    ("--no-requeue, time limit", signal.SIGUSR2, RUNNING | {"EndTime": SOON}, {"may_requeue": False}, "leave",
     "timeout"),
    ("the job may not be requeued", signal.SIGTERM, PREEMPTED | {"Requeue": "0"}, {}, "leave", "preemption"),
    ("no scontrol", signal.SIGTERM, None, {}, "hold", "unknown"),
    ("no scontrol and --no-requeue", signal.SIGUSR2, None, {"may_requeue": False}, "hold", "unknown"),
    ("fields without a state", signal.SIGTERM, {}, {}, "leave", "ended"),
]  # fmt: skip


@pytest.mark.parametrize(("received", "fields", "change", "action", "reason"), [r[1:] for r in TABLE],
                         ids=[r[0] for r in TABLE])  # fmt: skip
def test_decide(
    received: signal.Signals | None, fields: dict[str, str] | None, change: dict[str, Any], action: str, reason: str
) -> None:
    decision = decided(received, fields, **change)
    assert (decision.action, decision.reason) == (action, reason)
    assert decision.explanation


@pytest.mark.parametrize("state", ["COMPLETING", "CANCELLED", "PENDING", "FAILED", "TIMEOUT", "NODE_FAIL", "SUSPENDED"])
@pytest.mark.parametrize("received", [*STOP_SIGNALS, None])
def test_only_a_running_job_is_ever_requeued(state: str, received: signal.Signals | None) -> None:
    """`scontrol requeue` would succeed otherwise, and bring back a job that somebody has cancelled."""
    assert decided(received, PREEMPTED | {"JobState": state}).action == "leave"


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        (RUNNING, False),
        (RUNNING | {"JobState": "SIGNALING"}, False),
        (PREEMPTED, True),
        (PREEMPTED | {"StartTime": "2026-01-02T11:00:00"}, True),
        (PREEMPTED | {"StartTime": "2026-01-02T12:00:00"}, False),  # an earlier start was preempted, not this one
        (COMPLETING, True),
        (RUNNING | {"JobState": "PENDING"}, True),
    ],
)
def test_told_before_any_handler_was_there(fields: dict[str, str], told: bool) -> None:
    assert told_before(fields) is told


@pytest.fixture
def flag() -> Any:
    before = {number: signal.getsignal(number) for number in (*STOP_SIGNALS, signal.SIGCONT)}
    yield StopFlag().install()
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_sets_the_flag_and_the_first_one_tells_why(flag: StopFlag, number: signal.Signals) -> None:
    assert not flag.requested
    os.kill(os.getpid(), number)
    assert flag.requested
    assert flag.signal is number
    os.kill(os.getpid(), signal.SIGTERM)
    assert flag.signal is number


def test_sigcont_is_ignored(flag: StopFlag) -> None:
    os.kill(os.getpid(), signal.SIGCONT)
    assert not flag.requested


def test_a_flag_raised_by_hand_counts_as_sigterm_unless_a_signal_came_first(flag: StopFlag) -> None:
    other = StopFlag()
    other.raise_flag()
    assert other.requested and other.signal is signal.SIGTERM
    os.kill(os.getpid(), signal.SIGUSR2)
    flag.raise_flag()
    assert flag.signal is signal.SIGUSR2


def test_the_time_of_a_signal_is_that_of_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    flag = StopFlag()
    assert flag.seconds is None
    clock = iter([100.0, 107.5])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    flag.raise_flag()
    flag.raise_flag()
    seconds = flag.seconds
    monkeypatch.undo()
    assert seconds == 7.5

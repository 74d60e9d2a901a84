"""What restarts have cost, from events."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from cifar_hpc.runs.history import History

BEGIN = datetime(2026, 1, 1, tzinfo=UTC)


def restarts_of(events: list[dict[str, Any]]) -> tuple[dict[str, int], float, float]:
    """Causes, seconds lost, seconds up."""
    history = History.of(events)
    return history.restart_causes, history.lost_seconds, history.up_seconds


def at(second: float, event: str, **details: Any) -> dict[str, Any]:
    return {"time": (BEGIN + timedelta(seconds=second)).isoformat(), "event": event} | details


def test_a_stop_with_a_warning_costs_the_time_until_the_next_start() -> None:
    events = [
        at(0, "submitted"),
        at(60, "started"),
        at(100, "checkpoint"),
        at(160, "signal", step=9),
        at(161, "checkpoint"),
        at(162, "requeued", reason="preemption"),
        at(300, "resumed"),
        at(400, "checkpoint"),
    ]
    assert restarts_of(events) == ({"preemption": 1}, 138.0, 102.0 + 100.0)


def test_a_start_that_was_killed_loses_what_came_after_its_last_checkpoint() -> None:
    events = [at(0, "started"), at(50, "checkpoint"), at(90, "evaluated"), at(200, "resumed")]
    assert restarts_of(events) == ({"killed": 1}, 150.0, 50.0)
    assert restarts_of([at(0, "started"), at(200, "resumed")])[1] == 200.0


@pytest.mark.parametrize("end", ["failed", "hang", "evaluated"])
def test_an_end_without_a_signal_loses_what_came_after_the_last_checkpoint(end: str) -> None:
    reason = "preemption" if end == "evaluated" else "failure"  # SIGKILL, and the batch script asks for the requeue
    events = [at(0, "started"), at(50, "checkpoint"), at(90, end), at(91, "requeued", reason=reason)]
    assert restarts_of([*events, at(200, "resumed")]) == ({reason: 1}, 150.0, 50.0)
    late = at(95, "checkpoint")  # it was being written
    assert restarts_of([*events, late, at(200, "resumed")]) == ({reason: 1}, 105.0, 95.0)


def test_what_passes_before_a_person_submits_again_is_no_loss() -> None:
    again = [at(3000, "submitted"), at(3600, "resumed", restart=1), at(3700, "finished", restart=1, step=9)]
    stop = [at(50, "signal", restart=0, step=5), at(51, "left", restart=0, reason="ended")]
    assert restarts_of([at(0, "started", restart=0), *stop, *again]) == ({"submitted": 1}, 0.0, 151.0)
    # What was computed since the last checkpoint is one.
    for end in (at(90, "failed", restart=0), at(90, "evaluated", restart=0)):
        events = [at(0, "started", restart=0), at(50, "checkpoint", restart=0), end, *again]
        assert restarts_of(events) == ({"submitted": 1}, 40.0, 150.0)


@pytest.mark.parametrize(
    ("between", "cause"),
    [
        ([at(5, "requeued", reason="timeout")], "timeout"),
        ([at(5, "left", reason="preemption")], "preemption"),  # Slurm requeues by itself (rows of older versions)
        ([at(5, "left", reason="requeued")], "requeued"),
        ([at(5, "requeue_requested", by="alice")], "killed"),  # the signal never came
        ([at(5, "requeue_requested", by="alice"), at(6, "requeued", reason="requested")], "requested"),
        ([at(5, "left", reason="ended")], "killed"),  # a node that goes
        ([at(5, "failed"), at(6, "requeued", reason="failure")], "failure"),
        ([at(5, "hang")], "failure"),
        ([at(5, "requeued", reason="preemption"), at(6, "submitted")], "submitted"),
        ([at(5, "submitted"), at(6, "left", reason="preemption")], "submitted"),
        ([at(5, "holding", reason="unknown")], "preemption"),  # without scontrol, as in a container
        ([at(5, "requeued", reason="timeout"), at(6, "requeue_failed"), at(7, "holding", reason="timeout")], "timeout"),
        ([at(5, "holding", reason="unknown"), at(6, "requeued", reason="timeout")], "timeout"),
        ([], "killed"),
    ],
)
def test_causes(between: list[dict[str, Any]], cause: str) -> None:
    assert restarts_of([at(0, "started"), *between, at(9, "resumed")])[0] == {cause: 1}


def test_a_run_that_never_came_back_has_no_restarts() -> None:
    assert restarts_of([]) == ({}, 0.0, 0.0)
    assert restarts_of([at(0, "submitted"), at(1, "checkpoint"), at(5, "started")]) == ({}, 0.0, 0.0)


@pytest.mark.parametrize("time", [None, 7, "yesterday", "2026-01-01T00:00:00", [1]])
def test_times_that_are_none_cost_nothing(time: Any) -> None:
    end = {"event": "requeued", "reason": ["x"], "time": time}
    events = [at(0, "started"), {"event": "signal", "step": 9, "time": time}, end, at(9, "resumed")]
    assert restarts_of(events) == ({"['x']": 1}, 0.0, 0.0)


def test_a_clock_that_was_set_back_costs_nothing() -> None:
    events = [at(100, "started"), at(50, "requeued", reason="preemption"), at(20, "resumed")]
    assert restarts_of(events) == ({"preemption": 1}, 0.0, 0.0)


def test_a_start_that_never_began_costs_the_time_until_the_next_one_and_loses_no_work() -> None:
    own = {"job_id": "7", "restart": 1}
    events = [
        at(0, "started", job_id="7", restart=0),
        at(50, "signal", job_id="7", restart=0, step=9),
        at(51, "requeued", job_id="7", restart=0, reason="preemption"),
        at(200, "attempt", job_id="7", restart_count=1),
        at(210, "failed", **own, step=0),
        at(211, "requeued", **own, reason="failure"),
        at(500, "resumed", job_id="7", restart=2, step=9),
    ]
    assert restarts_of(events) == ({"preemption": 1, "failure": 1}, (211 - 51) + (500 - 211), 51.0)
    assert (History.of(events).losses.count, History.of(events).losses.seconds) == (0, 51.0)

"""The fold over a run's events, whatever they hold."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cifar_hpc.runs.events import Submitted
from cifar_hpc.runs.history import History

settings.register_profile("ci", derandomize=True, deadline=None, database=None)
settings.load_profile("ci")

SAY_STATE = (
    *("submitted", "started", "resumed", "checkpoint", "requeued", "holding"),
    *("finished", "failed", "hang", "left", "cancelled"),
)
values = st.one_of(st.none(), st.integers(-5, 5), st.floats(allow_nan=False), st.text(max_size=3), st.just([1]))
rows = st.fixed_dictionaries(
    {"event": st.sampled_from([*SAY_STATE, "evaluated", "signal", "mended"])},
    optional={
        "time": st.one_of(st.integers(0, 59).map("2026-01-01T00:00:{:02d}.000Z".format), values),
        "job_id": st.sampled_from(["7", "8", None, "", 9]),
        "world_size": values,
        "step": values,
        "restart": values,
        "reason": values,
    },
)


@given(st.lists(rows, max_size=12))
def test_the_fold_is_what_all_rows_say(events: list[dict[str, Any]]) -> None:
    history = History.of(events)
    starts = [e for e in events if e["event"] in ("started", "resumed")]
    submitted = [e for e in events if e["event"] == "submitted"]
    since = [*itertools.takewhile(lambda e: e["event"] != "submitted", reversed(events))]
    requeues = [str(e.get("reason")) for e in events if e["event"] == "requeued"]
    sizes = [e.get("world_size") for e in starts]
    assert [a.world_size for a in history.attempts] == [n if isinstance(n, int) else None for n in sizes]
    assert history.last_of(Submitted).get("job_id") == (submitted[-1].get("job_id") if submitted else None)
    assert history.requeues == {reason: requeues.count(reason) for reason in requeues}
    assert sum(history.requeues_since_submission.values()) == sum(e["event"] == "requeued" for e in since)
    failed = [e.get("step") for e in since if e["event"] in ("failed", "hang")]
    step = failed[0] if failed else None
    assert history.failed_step == (step if isinstance(step, int) else 0 if failed else None)
    assert history.job_id == next((e["job_id"] for e in reversed(events) if e.get("job_id") in ("7", "8")), None)
    assert sum(history.restart_causes.values()) == max(0, len(starts) - 1)
    assert math.isfinite(history.lost_seconds) and history.lost_seconds >= 0 and history.up_seconds >= 0
    assert history.losses.count < max(1, len(starts))


@given(st.lists(rows, max_size=12))
def test_the_last_event_says_the_state_but_a_cancelled_run_stays_cancelled(events: list[dict[str, Any]]) -> None:
    known = [e for e in events if e["event"] in SAY_STATE]
    expected = None
    for event in known:  # what stops a start of a run that has finished already says nothing about the run
        if expected != "finished" or event["event"] not in ("requeued", "left", "holding", "cancelled"):
            expected = event["event"]
    since = itertools.takewhile(lambda e: e["event"] not in ("submitted", "resumed"), reversed(known))
    if expected != "finished" and any(e["event"] == "cancelled" for e in since):
        expected = "cancelled"
    assert History.of(events).state.get("event") == expected


@given(st.lists(rows, max_size=12), st.integers(0, 12))
def test_a_fold_can_be_continued(events: list[dict[str, Any]], split: int) -> None:
    history = History.of(events[:split])
    for row in events[split:]:
        history.add(row)
    assert history == History.of(events)


@pytest.mark.parametrize("row", [{}, {"event": None}, {"event": ["started"]}, {"event": "of a later version"}])
def test_other_rows_are_passed_over(row: dict[str, Any]) -> None:
    history = History.of([row])
    assert (history.attempts, history.state) == ([], {})


def test_limits_count_from_the_last_submission() -> None:
    failed = [{"event": "failed", "step": 7}, {"event": "requeued", "reason": "failure"}]
    history = History.of([{"event": "submitted"}, *failed, *failed])
    assert (history.requeues_since_submission, history.failed_step) == ({"failure": 2}, 7)
    history.add({"event": "submitted"})
    assert (history.requeues_since_submission, history.failed_step) == ({}, None)
    assert history.requeues == {"failure": 2}


def test_a_job_that_starts_again_after_it_has_finished_its_run_is_no_attempt() -> None:
    def attempt(job_id: str, count: int) -> dict[str, Any]:
        return {"event": "attempt", "job_id": job_id, "restart": None, "restart_count": count}

    ended = [
        {"event": "submitted", "job_id": "7"},
        attempt("7", 0),
        {"event": "started", "job_id": "7", "restart": 0},
        {"event": "finished", "job_id": "7", "restart": 0, "step": 9},
    ]
    history = History.of([*ended, attempt("7", 1)])
    assert len(history.attempts) == 1 and history.state["event"] == "finished"
    assert history.attempt_of("7", 1) is None  # so that the epilog has nothing to report
    # Another job was submitted for more epochs, and may begin before that is recorded.
    for rows in ([{"event": "submitted", "job_id": "8"}, attempt("8", 0)], [attempt("8", 0)]):
        assert History.of([*ended, *rows]).attempt_of("8", 0) is not None


ATTEMPT = {"event": "attempt", "job_id": "7", "restart": None, "restart_count": 0}
STARTED = {"event": "started", "job_id": "7", "restart": 0, "world_size": 2, "step": 0}


@pytest.mark.parametrize(
    ("events", "begun", "causes", "state"),
    [
        ([{"event": "submitted", "job_id": "7"}, ATTEMPT], [False], {}, "attempt"),
        ([{"event": "submitted", "job_id": "7"}, ATTEMPT, STARTED], [True], {}, "started"),
        # It began before its submission was recorded.
        ([ATTEMPT, {"event": "submitted", "job_id": "7"}, STARTED], [True], {}, "started"),
        ([STARTED | {"job_id": "6"}, ATTEMPT, {"event": "submitted", "job_id": "7"}, STARTED | {"restart": 1}],
         [True, True], {"submitted": 1}, "started"),
        # Its node was lost, and it started again.
        ([ATTEMPT, ATTEMPT | {"restart_count": 1}, STARTED | {"restart": 1}], [False, True], {"killed": 1}, "started"),
        ([ATTEMPT, {"event": "failed", "job_id": "7", "restart": 0, "step": 0}, ATTEMPT | {"restart_count": 1}],
         [False, False], {"failure": 1}, "attempt"),
        # A start that waits in vain for another job, which holds the run.
        ([STARTED, ATTEMPT | {"job_id": "8"}, {"event": "requeued", "job_id": "8", "restart": 1, "reason": "failure"},
          {"event": "finished", "job_id": "7", "restart": 0, "step": 9}], [True, False], {"killed": 1}, "finished"),
        ([{"event": "finished", "step": 9}, ATTEMPT], [False], {}, "finished"),  # a start that has nothing to do
    ],
)  # fmt: skip
def test_attempts_that_never_began_are_attempts(
    events: list[dict[str, Any]], begun: list[bool], causes: dict[str, int], state: str
) -> None:
    history = History.of(events)
    assert [attempt.begun for attempt in history.attempts] == begun
    assert (history.restart_causes, history.state["event"]) == (causes, state)
    assert history.earlier_than("9") == len(begun)
    assert history.earlier_than("7") == len(begun) - (events[-1]["event"] == "attempt")


def test_a_refused_requeue_and_a_fault_of_a_node_do_not_count() -> None:
    history = History.of([{"event": "requeued", "reason": "timeout"}, {"event": "failed", "step": 5, "bad_node": "n1"}])
    assert (history.requeues_since_submission, history.failed_step) == ({"timeout": 1}, None)
    history.add({"event": "requeue_failed", "reason": "Access/permission denied"})
    assert history.requeues == history.requeues_since_submission == {"timeout": 0}
    assert History.of([{"event": "requeue_failed"}]).requeues == {}

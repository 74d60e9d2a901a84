"""A run's life as its logs tell it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from run_logs import BEGIN, STEPS, at, event, make_run, write_events, write_metrics

from cifar_hpc.runs.paths import RunPaths
from cifar_hpc.runs.timeline import Timeline, read_timeline

STARTUP = {"total": 4.0}


@pytest.fixture
def run(tmp_path: Path) -> RunPaths:
    return make_run(tmp_path, "a")


def timeline(run: RunPaths, *events: dict[str, Any]) -> Timeline:
    write_events(run, events)
    return read_timeline(run)


def spans(timeline: Timeline) -> list[tuple[str, float, float]]:
    zero = BEGIN.timestamp()
    return [(span.kind, round(span.begin - zero, 3), round(span.end - zero, 3)) for span in timeline.spans]


def marks(timeline: Timeline) -> list[tuple[str, float]]:
    return [(mark.kind, round(mark.at - BEGIN.timestamp(), 3)) for mark in timeline.marks]


def start(seconds: float, step: int = 0, **details: Any) -> list[dict[str, Any]]:
    """A start whose process began 4 s before `seconds`, and which has taken a step 1 s after it."""
    name = "resumed" if step else "started"
    return [
        event(seconds, name, step=step, startup=STARTUP, **details),
        event(seconds + 1, "first_step", step=step + 1, startup=STARTUP),
    ]


FIRST = [event(0, "submitted", scheduler="slurm"), *start(10)]
REQUESTED = [event(29, "requeue_requested", by="alice"), event(30, "signal", signal="SIGUSR2", step=25, epoch=2),
             event(30, "requeued", reason="requested")]  # fmt: skip
PREEMPTED = [event(30, "signal", signal="SIGTERM", step=25, epoch=2), event(30, "requeued", reason="preemption")]


def test_a_preemption(run: RunPaths) -> None:
    life = timeline(
        run,
        *FIRST,
        event(20, "evaluated", epoch=1, step=STEPS),
        event(20.5, "checkpoint", step=STEPS, epoch=1),
        event(29.9, "checkpoint", step=25, epoch=2),
        *PREEMPTED,
        *start(150, step=25),
        event(160, "evaluated", epoch=3, step=3 * STEPS),
        event(161, "finished", step=3 * STEPS, epoch=3),
    )
    assert spans(life) == [
        ("waiting", 0, 6),
        ("starting", 6, 11),
        ("training", 11, 30),
        ("waiting", 30, 146),
        ("starting", 146, 151),
        ("training", 151, 161),
    ]
    assert marks(life) == [
        ("checkpoint", 20.5),
        ("checkpoint", 29.9),
        ("preempted", 30),
        ("restart", 146),
        ("finished", 161),
    ]
    first, second = ([(round(t - BEGIN.timestamp(), 1), e) for t, e in line] for line in life.progress)
    assert first == [(10, 0), (11, 0.1), (20, 1), (30, 2.5)]
    assert second == [(150, 2.5), (151, 2.6), (160, 3), (161, 3)]
    assert (life.begin, life.end) == (BEGIN.timestamp(), BEGIN.timestamp() + 161)
    assert life.seconds("waiting") == pytest.approx(122)


@pytest.mark.parametrize(
    ("stop", "mark"),
    [
        (REQUESTED, "requeued"),
        ([*REQUESTED[:1], *PREEMPTED], "preempted"),  # another cause, a moment later
        ([event(30, "signal", step=25), event(30, "left", reason="requeued", explanation="by Slurm")], "requeued"),
        ([event(30, "signal", step=25), event(30, "requeued", reason="signal")], "stopped"),
    ],
)
def test_a_requeue_has_a_mark_of_its_own(run: RunPaths, stop: list[dict[str, Any]], mark: str) -> None:
    life = timeline(run, *FIRST, event(29, "checkpoint", step=25), *stop, *start(90, step=25))
    assert (mark, 30) in marks(life) and ("waiting", 30, 86) in spans(life)
    assert life.seconds("lost") == 0


def test_a_kill_loses_what_came_after_the_checkpoint(run: RunPaths) -> None:
    life = timeline(
        run,
        *FIRST,
        event(20, "checkpoint", step=STEPS, epoch=1),
        event(33, "failed", step=23, error="killed", again=True),
        event(33, "requeued", reason="failure"),
        *start(60, step=STEPS),
    )
    assert spans(life)[2:5] == [("training", 11, 20), ("lost", 20, 33), ("waiting", 33, 56)]
    assert ("failed", 33) in marks(life)


@pytest.mark.parametrize(("step", "last"), [(STEPS, (25, 1.5)), (23, (33, 2.3))])
def test_a_failure_shows_the_steps_that_it_knows_of(run: RunPaths, step: int, last: tuple[float, float]) -> None:
    write_metrics(run, [10])
    life = timeline(run, *FIRST, event(25, "signal", step=15), event(33, "failed", step=step))
    at, epochs = life.progress[0][-1]
    assert (round(at - BEGIN.timestamp(), 3), epochs) == last


def test_a_kill_without_a_word_ends_where_it_was_last_heard_of(run: RunPaths) -> None:
    life = timeline(
        run,
        *FIRST,
        event(20, "checkpoint", step=STEPS, epoch=1),
        event(25, "evaluated", step=2 * STEPS, epoch=2),
        *start(60, step=STEPS),
    )
    assert spans(life)[2:5] == [("training", 11, 20), ("lost", 20, 25), ("waiting", 25, 56)]


def test_going_back_to_an_older_checkpoint_loses_whole_starts(run: RunPaths) -> None:
    life = timeline(
        run, *FIRST, event(20, "checkpoint", step=STEPS, epoch=1), *PREEMPTED, *start(60, step=25),
        event(70, "signal", step=32), event(70, "requeued", reason="timeout"), *start(90, step=STEPS),
    )  # fmt: skip
    assert [s for s in spans(life) if s[0] == "lost"] == [("lost", 20, 30), ("lost", 61, 70)]
    assert ("timeout", 70) in marks(life)


def test_starting_all_over_loses_everything(run: RunPaths) -> None:
    life = timeline(run, *FIRST, event(30, "failed", step=5), event(30, "requeued", reason="failure"), *start(60))
    assert ("lost", 11, 30) in spans(life)
    assert ("restart", 56) in marks(life)


def test_a_start_that_was_killed_before_its_first_step_loses_nothing(run: RunPaths) -> None:
    stopped = [*FIRST, event(20, "checkpoint", step=STEPS, epoch=1), *PREEMPTED]
    life = timeline(run, *stopped, start(60, step=25)[0], *start(90, step=25))
    assert not life.seconds("lost") and ("training", 11, 30) in spans(life)
    life = timeline(run, *stopped, *start(60, step=25), event(66, "failed", step=27), *start(90, step=25))
    assert [s for s in spans(life) if s[0] == "lost"] == [("lost", 61, 66)]


@pytest.mark.parametrize("damage", [{"step": None}, {"step": "x"}])
def test_a_second_stop_that_tells_no_step_loses_nothing(run: RunPaths, damage: dict[str, Any]) -> None:
    life = timeline(
        run,
        *FIRST,
        event(20, "checkpoint", step=STEPS, epoch=1),
        *PREEMPTED,
        event(31, "signal", signal="SIGTERM", **damage),
        *start(60, step=25),
    )
    assert not life.seconds("lost")


def test_what_slurm_requeued_itself_was_waiting(run: RunPaths) -> None:
    told = [event(30, "signal", step=25), event(30, "left", reason="preemption", explanation="requeued by Slurm")]
    life = timeline(run, *FIRST, event(29, "checkpoint", step=25), *told, *start(90, step=25))
    assert ("waiting", 30, 86) in spans(life)
    assert ("preempted", 30) in marks(life)


def test_between_an_end_and_the_next_submission_nothing_is_done(run: RunPaths) -> None:
    stopped = [event(30, "signal", step=25), event(30, "left", reason="ended", explanation="scancel")]
    life = timeline(
        run, *FIRST, event(29, "checkpoint", step=25), *stopped, event(500, "submitted"), *start(510, step=25)
    )  # fmt: skip
    assert spans(life)[2:4] == [("training", 11, 30), ("waiting", 500, 506)]
    assert ("stopped", 30) in marks(life)


def test_between_a_kill_and_the_next_submission_nothing_is_done(run: RunPaths) -> None:
    killed = [*FIRST, event(29, "checkpoint", step=25)]
    again = event(500, "submitted", job_id="9")
    life = timeline(run, *killed, again, *start(510, step=25, job_id="9"))
    assert spans(life)[2:4] == [("training", 11, 29), ("waiting", 500, 506)] and not life.seconds("lost")
    assert spans(timeline(run, *killed, again))[2:] == [("training", 11, 29)]
    life = timeline(run, *killed, again, event(600, "cancelled", by="me"))
    assert spans(life)[2:] == [("training", 11, 29), ("waiting", 500, 600)]
    assert ("cancelled", 600) in marks(life)
    late = event(12, "submitted", job_id=killed[1]["job_id"])  # of the job that has begun
    assert spans(timeline(run, *start(10), late, *killed[3:]))[-1] == ("training", 11, 29)


def test_outside_a_scheduler_nobody_waits(run: RunPaths) -> None:
    life = timeline(
        run,
        *start(10, job_id=None),
        event(20, "checkpoint", step=STEPS, job_id=None),
        *start(90, step=STEPS, job_id=None),
    )
    assert spans(life) == [("starting", 6, 11), ("training", 11, 20), ("starting", 86, 91)]


def test_a_run_that_was_cancelled_while_it_waited(run: RunPaths) -> None:
    life = timeline(run, event(0, "submitted"), event(20, "cancelled", by="me"))
    assert spans(life) == [("waiting", 0, 20)]
    assert marks(life) == [("cancelled", 20)]


def test_a_run_that_has_not_ended(run: RunPaths) -> None:
    assert marks(timeline(run, *FIRST, event(20, "evaluated", epoch=1, step=STEPS)))[-1] == ("under way", 20)
    assert marks(timeline(run, event(5, "submitted"))) == [("under way", 5)]


def test_metrics_alone_tell_of_training(run: RunPaths) -> None:
    write_metrics(run, [10, 20, 30])
    life = read_timeline(run)
    assert spans(life) == [("training", 0, 30)]
    assert [epochs for line in life.progress for _, epochs in line] == [1, 2, 3]


def test_no_logs_are_no_life(run: RunPaths) -> None:
    life = read_timeline(run)
    assert (life.spans, life.marks, life.progress, life.begin, life.end) == ([], [], [], 0, 0)


@pytest.mark.parametrize(
    "damage",
    [
        {"time": None},
        {"time": "yesterday"},
        {"time": "9999-12-31T23:59:59Z"},
        {"time": 12},
        {"event": ["evaluated"]},
        {"event": None},
        {"step": "x", "epoch": -1},
        {"step": 10**400, "epoch": 0},
        {"startup": "long"},
        {"startup": {"total": float("nan")}},
        {"startup": {"total": 1e300}},
    ],
)
def test_damage_is_passed_over(run: RunPaths, damage: dict[str, Any]) -> None:
    whole = [*FIRST, event(20, "evaluated", epoch=1, step=STEPS), *PREEMPTED, *start(60, step=25)]
    for place in range(len(whole)):
        life = timeline(run, *whole[:place], {**whole[place], **damage}, *whole[place + 1 :])
        assert life.spans
        assert all(0 <= s.end - s.begin <= 61 for s in life.spans)


def test_naive_times_and_other_zones_are_times(run: RunPaths) -> None:
    there = {**event(0, "submitted"), "time": "2026-01-02T05:00:00+02:00"}
    assert timeline(run, there, {**event(0, "cancelled"), "time": at(3)}).seconds("waiting") == 3

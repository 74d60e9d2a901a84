"""What is new about a run: lines of a log that is rotated and cut, and what is said about the queue."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from stub_slurm import slurm_time

from cifar_hpc.cli import tail
from cifar_hpc.cli.tail import EpochFollower, LogFollower, StateFollower
from cifar_hpc.errors import SchedulerError
from cifar_hpc.runs import queue as run_queue
from cifar_hpc.runs.paths import RunPaths
from cifar_hpc.slurm.client import QueuedJob


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "train.log"


def append(path: Path, text: str) -> None:
    with path.open("a") as file:
        file.write(text)


def test_history_then_what_comes(log: Path) -> None:
    follower = LogFollower(log)
    assert follower.poll() == []  # there is none yet
    append(log, "one\ntwo\n")
    assert follower.poll() == ["one", "two"]
    assert follower.poll() == []
    append(log, "three\n\x1b[2J\n")
    assert follower.poll() == ["three", "\\x1b[2J"]
    follower.close()


def test_half_a_line_waits_for_its_end(log: Path) -> None:
    follower = LogFollower(log)
    append(log, "one\nhal")
    assert follower.poll() == ["one"]
    append(log, "f\n")
    assert follower.poll() == ["half"]
    append(log, "never en")
    assert follower.poll() == [] and follower.rest() == ["never en"] and follower.rest() == []
    follower.close()


def rotate(log: Path) -> None:
    log.rename(log.with_suffix(".1"))
    log.write_text("new\n")


def cut(log: Path) -> None:
    with log.open("w") as file:
        file.write("new\n")


def replace(log: Path) -> None:
    other = log.with_name("other")
    other.write_text("new\n")
    other.replace(log)


@pytest.mark.parametrize("change", [rotate, cut, replace])
def test_a_log_that_was_rotated_or_cut_is_followed_from_its_beginning(
    log: Path, change: Callable[[Path], None]
) -> None:
    follower = LogFollower(log)
    append(log, "an old line\nand half of o")
    assert follower.poll() == ["an old line"]
    change(log)
    assert follower.poll() == ["and half of o", "[train.log was replaced or cut; from its beginning:]"]
    assert follower.poll() == ["new"]
    follower.close()


def test_what_was_written_before_a_rotation_is_not_lost(log: Path) -> None:
    follower = LogFollower(log)
    append(log, "one\n")
    assert follower.poll() == ["one"]
    append(log, "two\n")
    rotate(log)
    assert follower.poll() == ["two"]
    assert follower.poll()[-1].startswith("[train.log was replaced") and follower.poll() == ["new"]
    follower.close()


def test_a_log_that_is_gone_is_waited_for(log: Path) -> None:
    follower = LogFollower(log)
    append(log, "one\n")
    assert follower.poll() == ["one"]
    log.unlink()
    assert len(follower.poll()) == 1 and follower.poll() == []
    append(log, "again\n")
    assert follower.poll() == ["again"]
    follower.close()


def test_a_log_that_was_let_go_is_read_on(log: Path) -> None:
    append(log, "one\nhal")
    follower = LogFollower(log)
    assert follower.poll() == ["one"]
    follower.close()
    append(log, "f\n")
    assert follower.poll() == ["half"]
    follower.close()
    cut(log)
    assert follower.poll() == ["new"]
    follower.close()


def test_beginning_at_a_place(log: Path) -> None:
    append(log, "of another start\n")
    follower = LogFollower(log, begin=log.stat().st_size)
    assert follower.poll() == []
    append(log, "new\n")
    assert follower.poll() == ["new"]
    follower.close()
    shorter = LogFollower(log, begin=1000)
    assert shorter.poll() == ["of another start", "new"]
    shorter.close()


def test_rows_that_are_computed_again_are_not_repeated(tmp_path: Path) -> None:
    row = (
        '{"epoch": %d, "train_loss": 1.0, "train_accuracy": 50.0, "test_loss": 1.0, "test_accuracy": 50.0, "lr": 0.1, '
        '"epoch_seconds": 1.0, "images_per_second": 9.0}\n'
    )
    metrics = tmp_path / "metrics.jsonl"
    follower = EpochFollower(metrics)
    assert follower.poll() == []
    metrics.write_text(row % 1 + row % 2)
    assert [line.split()[1] for line in follower.poll()] == ["1", "2"]
    metrics.write_text(row % 1)
    assert follower.poll() == []
    metrics.write_text(row % 1 + row % 2 + row % 3)
    assert [line.split()[1] for line in follower.poll()] == ["3"]


class Queue:
    """A queue that holds at most one job."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.job: QueuedJob | None = None
        self.silent, self.asked = False, 0
        monkeypatch.setattr(run_queue, "queue", self._queue)
        monkeypatch.setattr(tail, "STATE_SECONDS", 0.0)

    def holds(self, state: str, reason: str = "None", start: str = "N/A") -> None:
        self.job = QueuedJob("7", "run", state, reason, start, "n1", "gpu", "(null)", "/logs/run")

    def _queue(self, root: Path, timeout_seconds: float) -> dict[str, QueuedJob]:
        self.asked += 1
        if self.silent:
            raise SchedulerError("no answer")
        return {"run": self.job} if self.job else {}


@pytest.fixture
def queue(monkeypatch: pytest.MonkeyPatch) -> Queue:
    return Queue(monkeypatch)


@pytest.fixture
def states(tmp_path: Path) -> StateFollower:
    run = RunPaths(tmp_path, "run")
    run.create()
    run.events.write_text('{"event": "submitted", "scheduler": "slurm", "job_id": "7"}\n')
    return StateFollower(run)


def news(states: StateFollower) -> str:
    state = states.poll()
    assert state is not None
    return states.news(state)


def test_each_reason_is_said_once(queue: Queue, states: StateFollower) -> None:
    queue.holds("PENDING", "Priority")
    assert news(states) == "queued: Priority: other jobs go first"
    assert news(states) == ""
    queue.holds("PENDING", "Resources")
    assert news(states).startswith("queued: Resources: no room yet")
    queue.holds("RUNNING")
    assert news(states) == ""
    states.paths.events.write_text('{"event": "requeued", "reason": "timeout"}\n')
    queue.holds("PENDING", "BeginTime", slurm_time("2026-01-01T10:00:00"))
    assert news(states) == "requeued: until 2026-01-01 10:00:00, at its time limit"
    queue.holds("PENDING", "Resources")
    assert news(states) != ""


def test_what_has_changed_is_said_again_after_a_while(
    queue: Queue, states: StateFollower, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue.holds("PENDING", "Priority")
    before = news(states)
    queue.holds("PENDING", "Priority", slurm_time("2999-01-01T10:00:00"))
    assert news(states) == ""
    monkeypatch.setattr(tail, "REPEAT_SECONDS", 0.0)
    assert news(states) not in ("", before)
    assert news(states) == ""  # nothing has changed


def test_a_silent_slurm_is_left_in_peace_for_a_while(
    queue: Queue, states: StateFollower, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue.holds("RUNNING")
    queue.silent = True
    for _ in range(5):
        assert states.poll() is not None
    assert queue.asked == 1
    queue.silent = False
    monkeypatch.setattr(states.queue, "next_poll", 0.0)
    states.poll()
    assert states.state is not None and states.state.state == "running"


def test_a_silent_slurm_is_no_end(queue: Queue, states: StateFollower) -> None:
    queue.holds("RUNNING")
    states.poll()
    queue.silent = True
    assert news(states) == "unknown: Slurm does not answer"
    assert states.state is not None and not states.state.ended
    with states.paths.events.open("a") as file:
        file.write('{"event": "finished", "test_accuracy": 90.0}\n')
    states.poll()
    assert states.state.state == "finished"


def test_the_queue_is_not_asked_each_time(queue: Queue, states: StateFollower, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tail, "STATE_SECONDS", 1000.0)
    state = states.poll()
    assert state is not None and states.poll() is None and states.words(state).startswith("stopped: ")


def test_a_log_that_is_none_is_named(log: Path) -> None:
    os.mkfifo(log)
    with pytest.raises(OSError, match="no regular file"):
        LogFollower(log).poll()

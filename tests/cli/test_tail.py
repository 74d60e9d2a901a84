"""tail and submit.py --follow, from the queue to the run's end; time passes as the test says."""

from __future__ import annotations

import errno
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from stub_slurm import slurm_time

from cifar_hpc import files as jsonfile
from cifar_hpc.__main__ import main
from cifar_hpc.cli import tail
from cifar_hpc.runs import queue as run_queue
from cifar_hpc.runs import state as run_state
from cifar_hpc.runs.paths import RunPaths
from cifar_hpc.slurm.client import QueuedJob

DONE = "2026-01-01 00:00:00 epoch 1/3 DONE  train loss 2.3 acc 11.33%  |  test loss 2.1 acc 21.09%  |  lr 0.05"
PROGRESS = (
    "2026-01-01 00:00:00 epoch 1/3 step 12/16 (total 12)  loss 2.3  acc 10.1%  lr 0.05  187.8 img/s  run ETA 0:01:45"
)


class World:
    """A run and its queue; each time somebody sleeps, the next thing happens."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.paths = RunPaths(root, "run")
        self.paths.create()
        self.paths.spec.write_text("train: {epochs: 3}\n")
        self.jobs: dict[str, QueuedJob] = {}
        self.then: list[Callable[[], object]] = []
        monkeypatch.setenv("CIFAR_HPC_ROOT", str(root))
        monkeypatch.setattr(run_queue, "queue", lambda *_: self.jobs)
        monkeypatch.setattr(tail, "STATE_SECONDS", 0.0)
        monkeypatch.setattr("cifar_hpc.cli.tail.time.sleep", lambda _: self.then.pop(0)())
        self.event("submitted", scheduler="slurm", job_id="7")

    def event(self, event: str, **details: Any) -> None:
        with self.paths.events.open("a") as file:
            file.write(json.dumps({"event": event} | details) + "\n")

    def log(self, *lines: str) -> None:
        with self.paths.train_log.open("a") as file:
            file.writelines(f"{line}\n" for line in lines)

    def job(self, state: str, reason: str = "None", start: str = "N/A") -> None:
        self.jobs = {"run": QueuedJob("7", "run", state, reason, start, "n1", "gpu", "(null)", "/logs/run")}

    def ends(self, event: str, **details: Any) -> None:
        self.jobs = {}
        self.event(event, **details)


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    return World(tmp_path, monkeypatch)


def test_from_the_queue_to_the_end(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    world.job("PENDING", "Resources")
    world.then = [
        lambda: world.job("RUNNING"),
        lambda: world.log("== run run  |  started from step 0", PROGRESS, DONE),
        lambda: world.event("requeued", reason="preemption"),
        lambda: world.job("PENDING", "BeginTime", slurm_time("2026-01-01T10:00:00")),
        lambda: world.job("RUNNING"),
        lambda: world.log("== run run  |  resumed"),
        lambda: (world.log("FINISHED"), world.ends("finished", test_accuracy=90.0)),
    ]
    assert main(["tail", "run"]) == 0
    captured = capsys.readouterr()
    lines = ["== run run  |  started from step 0", PROGRESS, DONE, "== run run  |  resumed", "FINISHED"]
    assert captured.out.splitlines() == lines
    assert captured.err.splitlines() == [
        "[queued: Resources: no room yet]",
        "[requeued: until 2026-01-01 10:00:00, preempted]",
    ]


@pytest.mark.parametrize(
    ("event", "details", "note"),
    [
        ("failed", {"error": "RunFailedError: NaN"}, "[failed: NaN]"),
        ("cancelled", {"by": "me"}, "[cancelled: by me]"),
        ("left", {"reason": "timeout", "explanation": "used up"}, "[stopped: used up]"),
    ],
)
def test_any_other_end_is_told_and_is_1(
    world: World, capsys: pytest.CaptureFixture[str], event: str, details: dict[str, Any], note: str
) -> None:
    world.job("RUNNING")
    world.log("one")
    world.then = [lambda: (world.log("two"), world.ends(event, **details))]
    assert main(["tail", "run"]) == 1
    captured = capsys.readouterr()
    assert captured.out.splitlines() == ["one", "two"] and captured.err.splitlines() == [note]


def test_a_last_line_without_an_end_is_shown(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    world.paths.train_log.write_text("one\nof a full di")
    world.ends("finished", test_accuracy=90.0)
    assert main(["tail", "run"]) == 0
    assert capsys.readouterr().out == "one\nof a full di\n"


def stale(*_: Any) -> Any:
    raise OSError(errno.ESTALE, "Stale file handle", "events.jsonl")


def test_a_file_server_that_is_away_for_a_moment_is_no_end(
    world: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def goes() -> None:
        patch.setattr(run_state.Path, "stat", stale)
        patch.setattr(jsonfile.os, "open", stale)

    world.job("RUNNING")
    world.log("one")
    with monkeypatch.context() as patch:
        world.then = [
            goes,
            world.jobs.clear,  # so that the files alone tell
            lambda: None,
            lambda: (world.job("RUNNING"), patch.undo()),
            lambda: world.log("two"),
            lambda: world.ends("finished", test_accuracy=90.0),
        ]
        assert main(["tail", "run"]) == 0
    assert capsys.readouterr().out == "one\ntwo\n" and world.then == []


def test_files_that_stay_unreadable_are_an_end(
    world: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    world.jobs = {}
    world.then = [lambda: None] * tail.STATE_FAILURES
    monkeypatch.setattr(run_state, "_busy", stale)
    assert main(["tail", "run"]) == 1
    assert len(world.then) == 1
    assert capsys.readouterr().err == "[unreadable: its files cannot be read now (Stale file handle)]\n"


def test_a_log_that_stays_unreadable_is_named(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    world.job("RUNNING")
    world.then = [lambda: None] * tail.LOG_FAILURES
    monkeypatch.setattr(tail.LogFollower, "poll", stale)
    assert main(["tail", "run"]) == 2
    assert "Stale file handle" in capsys.readouterr().err
    assert len(world.then) == 1


@pytest.mark.usefixtures("world")
def test_a_run_that_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tail", "rum"]) == 2
    assert "did you mean 'run'" in capsys.readouterr().err


def test_colours_are_for_terminals(
    world: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    world.log("== run run", PROGRESS, DONE)
    world.ends("failed", error="x")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    main(["tail", "run"])
    assert "\x1b" not in "".join(capsys.readouterr())
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    main(["tail", "run"])
    captured = capsys.readouterr()
    banner, progress, epoch = captured.out.splitlines()
    assert banner == "\x1b[1;36m== run run\x1b[0m" and progress == PROGRESS and epoch == f"\x1b[32m{DONE}\x1b[0m"
    assert "\x1b" not in captured.err  # which is no terminal
    monkeypatch.setenv("NO_COLOR", "1")
    main(["tail", "run"])
    assert "\x1b" not in capsys.readouterr().out


def test_following_begins_with_what_is_new(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    world.log("of an earlier start")
    begin = world.paths.train_log.stat().st_size
    world.log("SUBMITTED")
    world.ends("finished", test_accuracy=1.0)
    assert tail.follow(world.paths, "hint", begin) == 0
    assert capsys.readouterr().out == "SUBMITTED\n"


def interrupt() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("terminal", [False, True])
def test_ctrl_c_leaves_the_run_and_says_how_to_come_back(
    world: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    monkeypatch.setenv("TERM", "xterm")
    world.job("PENDING", "Priority")
    world.then = [interrupt]
    assert tail.follow(world.paths, "python -m cifar_hpc tail run\nscancel 7") == 0
    out = capsys.readouterr().out
    assert out.endswith("to come back or to cancel it:\npython -m cifar_hpc tail run\nscancel 7\n")
    assert "7" in world.jobs["run"].job_id

"""A sweep on this machine: how many points run at once, with stand-ins for them, and a real one that is stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import PROJECT, end_processes

from cifar_hpc.config.spec import Spec
from cifar_hpc.errors import SchedulerError
from cifar_hpc.launch import local as launch_local
from cifar_hpc.launch.local import run_points
from cifar_hpc.launch.preflight import start_of
from cifar_hpc.runs.events import Cancelled, Finished, append_event
from cifar_hpc.runs.frozen_spec import freeze
from cifar_hpc.runs.history import History
from cifar_hpc.runs.lock import RunLock, holder, waits_here
from cifar_hpc.runs.logs import append_line, read_jsonl
from cifar_hpc.runs.paths import RunPaths, SweepPaths
from cifar_hpc.training.process import StopFlag

PATIENCE_SECONDS = 180  # only bounds how long a hang lasts
ENDLESS = """
model: {width_multiplier: 0.0625, blocks: [1, 1, 1]}
train: {epochs: 100000, batch_size: 32, cpu_threads: 1, amp: fp32, device: cpu}
data: {source: synthetic, train_size: 64, test_size: 20}
lookahead: {bn_batches: 1}
resources: {gpus_per_node: 0}
sweep: {seeds: 3}
"""


class Job:
    """Stand-in for submitit's job."""

    def __init__(self, stand_ins: StandIns, name: str) -> None:
        self.job_id, self._stand_ins = str(1000 + len(stand_ins.started)), stand_ins
        stand_ins.alive[name] = int(self.job_id)

    def done(self) -> bool:
        return int(self.job_id) not in self._stand_ins.alive.values()


class StandIns:
    """Points that end by themselves a moment after their start, or when they get a signal."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.started: list[str] = []
        self.alive: dict[str, int] = {}
        self.most, self.told = 0, []  # type: int, list[int]
        self.endless = False
        monkeypatch.setattr(launch_local, "start_here", self.start)
        monkeypatch.setattr(launch_local.os, "kill", self.kill)
        monkeypatch.setattr(launch_local.time, "sleep", self.sleep)
        self.stop = StopFlag()
        monkeypatch.setattr(StopFlag, "install", lambda flag: self.stop)
        self.at_sleep: Callable[[], None] = lambda: None

    def start(self, run: RunPaths, spec: Spec, command: str, sweep: str | None) -> Job:
        self.started.append(run.name)
        job = Job(self, run.name)
        self.most = max(self.most, len(self.alive))
        return job

    def kill(self, pid: int, number: int) -> None:
        assert number == signal.SIGTERM
        self.told.append(pid)
        self.alive = {name: p for name, p in self.alive.items() if p != pid}

    def sleep(self, seconds: float) -> None:
        self.at_sleep()
        if not self.endless and self.alive:
            self.alive.pop(next(iter(self.alive)))


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> StandIns:
    return StandIns(monkeypatch)


@pytest.fixture
def locks(tmp_path: Path) -> dict[RunPaths, RunLock]:
    """Held locks of five frozen runs."""
    runs = [RunPaths(tmp_path, f"job-{i}") for i in range(5)]
    for run in runs:
        run.create()
        freeze(run, Spec())
    held = {run: RunLock(run.logs / "submit.lock") for run in runs}
    for lock in held.values():
        lock.acquire({})
    return held


@pytest.mark.parametrize("parallel", [1, 2, 9])
def test_at_most_so_many_at_once_and_all_in_the_end(
    locks: dict[RunPaths, RunLock], stand_ins: StandIns, parallel: int
) -> None:
    run_points(locks, parallel, "submit.py sweep.yaml")
    assert stand_ins.started == [f"job-{i}" for i in range(5)]
    assert stand_ins.most == min(parallel, 5)
    assert [holder(lock.path) for lock in locks.values()] == [None] * 5


def test_the_lock_of_a_point_is_held_until_it_has_started(locks: dict[RunPaths, RunLock], stand_ins: StandIns) -> None:
    seen: list[list[bool]] = []
    stand_ins.at_sleep = lambda: seen.append([holder(lock.path) is not None for lock in locks.values()])
    run_points(locks, 2, "submit.py sweep.yaml")
    assert seen[0] == [False, False, True, True, True]


def test_what_is_finished_busy_or_gone_meanwhile_is_left_out(
    locks: dict[RunPaths, RunLock], stand_ins: StandIns, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = list(locks)
    finished = Finished(step=0, epoch=Spec().train.epochs, test_accuracy=0.0, best={})
    append_event(runs[0].events, finished, job_id="1", restart=0, world_size=1)
    lock = RunLock(runs[1].lock)
    lock.acquire({"job_id": "7", "pid": 1, "host": "n1"})
    runs[2].spec.unlink()
    run_points(locks, 2, "submit.py sweep.yaml")
    lock.release()
    assert stand_ins.started == ["job-3", "job-4"]
    said = capsys.readouterr().err
    assert "job-1: not started: run job-1 is being trained by job 7" in said and "job-2: not started" in said


def test_a_stopped_controller_signals_its_points_once_and_starts_no_more(
    locks: dict[RunPaths, RunLock], stand_ins: StandIns
) -> None:
    stand_ins.endless = True
    stand_ins.at_sleep = stand_ins.stop.raise_flag
    run_points(locks, 2, "submit.py sweep.yaml")
    assert stand_ins.started == ["job-0", "job-1"] and sorted(stand_ins.told) == [1001, 1002]


def test_a_point_that_is_cancelled_while_it_waits_does_not_start(
    locks: dict[RunPaths, RunLock], stand_ins: StandIns
) -> None:
    runs = list(locks)
    for lock in locks.values():
        lock.sign({"controller": True})
    assert waits_here(runs[4], History())

    def cancel() -> None:
        if stand_ins.started == ["job-0"]:
            append_event(runs[2].events, Cancelled(by="me"), job_id=None, restart=None, world_size=None)
            assert not waits_here(runs[2], History.read(runs[2].events))

    append_line(runs[3].events, '{"event": "cancelled", "time": "2026-01-01T00:00:00Z", "by": "me"}')  # long ago
    stand_ins.at_sleep = cancel
    run_points(locks, 1, "submit.py sweep.yaml")
    assert stand_ins.started == ["job-0", "job-1", "job-3", "job-4"]
    assert [holder(lock.path) for lock in locks.values()] == [None] * 5


@pytest.mark.process
@pytest.mark.parametrize("number", [None, 1])
def test_a_controller_that_does_not_start_says_why(
    tmp_path: Path, locks: dict[RunPaths, RunLock], number: int | None
) -> None:
    folder = SweepPaths(tmp_path, "job", 1) if number else next(iter(locks))
    folder.create()
    with pytest.raises(SchedulerError, match=r"did not start: .*No module named .*cifar_hpc"):
        launch_local.start(folder, tmp_path, locks.values(), 1)  # where there is no snapshot


class Local:
    """A root of its own for a sweep of endless runs on this machine."""

    def __init__(self, root: Path) -> None:
        self.root, self.job = root, root / "endless.yaml"
        self.job.write_text(ENDLESS)
        outside = {k: v for k, v in os.environ.items() if not k.startswith("SLURM")}
        self.env = outside | {"CIFAR_HPC_ROOT": str(root)}

    def command(self, *arguments: str, expect: int = 0) -> str:
        done = subprocess.run(
            [sys.executable, *arguments], cwd=PROJECT, env=self.env, capture_output=True, text=True,
            timeout=PATIENCE_SECONDS, check=False,
        )  # fmt: skip
        assert done.returncode == expect, done.stdout + done.stderr
        return done.stdout

    def submit(self, expect: int = 0) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(
            self.command("submit.py", str(self.job), "--cluster", "local", "--json", expect=expect)
        )
        return answer

    def events(self, run: str) -> list[str]:
        return [e["event"] for e in read_jsonl(RunPaths(self.root, run).events)]

    def wait(self, what: str, condition: Callable[[], object]) -> None:
        end = time.monotonic() + PATIENCE_SECONDS
        while not condition():
            assert time.monotonic() < end, f"waited in vain for {what}"
            time.sleep(0.1)


@pytest.fixture
def local(tmp_path: Path) -> Iterator[Local]:
    try:
        yield Local(tmp_path)
    finally:
        end_processes(tmp_path)


@pytest.mark.process
def test_points_run_one_after_the_other_and_stop_with_the_sweep(local: Local) -> None:
    answer = local.submit()
    first, second, third = (p["run"] for p in answer["points"])
    assert answer["cancel"].endswith("-m cifar_hpc cancel 'endless-*'")
    local.wait("the first point", lambda: "started" in local.events(first))
    assert f"being run by process {answer['job_id']}" in local.submit(expect=4)["error"]

    assert local.events(second) == []
    alone = ["--set", "sweep=null", "train.seed=1", "--cluster", "local"]
    assert f"being run by process {answer['job_id']}" in local.command(
        "submit.py", str(local.job), *alone, "--json", expect=4
    )
    local.command("-m", "cifar_hpc", "cancel", first)
    local.wait("the second point", lambda: "started" in local.events(second))
    assert local.events(first)[-1] in ("left", "cancelled")
    (waiting,) = json.loads(local.command("-m", "cifar_hpc", "status", third, "--json"))
    assert (waiting["state"], waiting["detail"]) == ("queued", "waits for its turn on this machine")
    assert waiting["sweep"] == "endless"
    local.command("-m", "cifar_hpc", "requeue", third, expect=2)
    lines = local.command("-m", "cifar_hpc", "show", third).splitlines()
    assert lines[-2].startswith("follow ") and lines[-1].startswith("cancel ")  # there is nothing to requeue

    said = local.command("-m", "cifar_hpc", "cancel", "endless-*", "--yes")
    assert said.startswith(f"run {third} does not start") and f"run {second} saves a checkpoint" in said
    local.wait("the end of the second", lambda: "left" in local.events(second))
    local.wait("the end of the sweep", lambda: not Path(f"/proc/{answer['job_id']}/cmdline").exists())
    assert local.events(third) == ["cancelled"]
    submitted = read_jsonl(RunPaths(local.root, second).events)[0]
    (code,) = SweepPaths(local.root, "endless", 1).code.iterdir()
    assert (submitted["event"], submitted["scheduler"], submitted["code"]) == ("submitted", "local", code.name)
    assert submitted["sweep"] == "logs/sweeps/endless/1"
    assert submitted["command"] == f"submit.py {local.job} --cluster local --json"
    assert start_of(RunPaths(local.root, first)).finished_epochs == 0

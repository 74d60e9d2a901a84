"""A whole run through submitit's local executor and the public commands: submit, requeue, follow, resume, cancel."""

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
from processes import command

from cifar_hpc.training.checkpoints.store import newest_good

JOB = str(PROJECT / "jobs" / "improved_resnet.yaml")
PATIENCE_SECONDS = 180
# 450 steps, of which the commands that come after the first 25 meet a run that is far from its end.
SET = (
    "model.width_multiplier=0.0625 model.blocks=[1,1,1] train.epochs=3 train.batch_size=32 train.shards=2 "
    "train.cpu_threads=1 train.amp=fp32 train.device=cpu data.source=synthetic data.train_size=4800 data.test_size=100 "
    "lookahead.bn_batches=2 checkpoint.every_steps=25 resources.gpus_per_node=0 resources.tasks_per_node=2"
).split()


class Project:
    """The public commands, on a root of their own."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.logs = root / "logs" / "run"
        outside = {k: v for k, v in os.environ.items() if not k.startswith("SLURM")}
        self.env = outside | {"CIFAR_HPC_ROOT": str(root)}

    def command(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=PROJECT,
            env=self.env,
            capture_output=True,
            text=True,
            timeout=PATIENCE_SECONDS,
            check=False,
        )

    def submit(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return self.command("submit.py", JOB, "--cluster", "local", "--name", "run", "--set", *SET, *arguments)

    def cifar(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return self.command("-m", "cifar_hpc", *arguments)

    def events(self) -> list[dict[str, Any]]:
        path = self.logs / "events.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def wait(self, what: str, condition: Callable[[], bool]) -> None:
        end = time.monotonic() + PATIENCE_SECONDS
        while not condition():
            assert time.monotonic() < end, f"waited in vain for {what}: {self.events()}"
            time.sleep(0.05)

    def wait_for(self, event: str, count: int = 1) -> None:
        self.wait(f"{count} {event}", lambda: sum(e["event"] == event for e in self.events()) >= count)

    def state(self) -> dict[str, Any]:
        result: dict[str, Any] = json.loads(self.cifar("status", "run", "--json").stdout)[0]
        return result


@pytest.fixture
def project(tmp_path: Path) -> Iterator[Project]:
    yield Project(tmp_path)
    end_processes(tmp_path)


@pytest.mark.process
def test_requeue_cancel_and_resubmission_end_in_the_same_sums(project: Project) -> None:
    status, output = command(project.root, "train", JOB, "--name", "reference", "--set", *SET)
    assert status == 0, output

    submitted = project.submit("--json")
    assert submitted.returncode == 0, submitted.stderr
    answer = json.loads(submitted.stdout)
    project.wait_for("checkpoint")
    again = project.submit()
    assert again.returncode == 4 and answer["job_id"] in again.stderr
    assert project.state()["state"] == "running"

    assert project.cifar("requeue", "run").returncode == 0
    project.wait_for("resumed")
    project.wait_for("checkpoint", 3)
    assert project.cifar("cancel", "run").returncode == 0
    project.wait("the end of the job", lambda: project.state()["state"] == "cancelled")
    assert project.cifar("cancel", "run").returncode == 2

    followed = project.submit("--follow")
    assert followed.returncode == 0, followed.stdout + followed.stderr
    assert followed.stdout.count("FINISHED") == 1
    state = project.state()
    assert (state["state"], state["epoch"], state["restarts"], state["requeues"]) == (
        "finished",
        3,
        2,
        {"requested": 1},
    )

    rows = [json.loads(line) for line in (project.logs / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    found = [newest_good(project.root / "checkpoints" / run) for run in ("reference", "run")]
    assert found[0].state.digests() == found[1].state.digests()
    assert [e["step"] for e in project.events() if e["event"] == "signal"] == [
        e["step"] for e in project.events() if e["event"] == "resumed"
    ]

    done = project.submit()
    assert done.returncode == 0 and "nothing to do" in done.stdout
    tail = project.cifar("tail", "run", "--epochs")
    assert tail.returncode == 0 and tail.stdout.count("test loss") == 3
    plain = project.cifar("status").stdout
    assert "finished" in plain and "\x1b" not in plain


@pytest.mark.process
def test_a_failing_run_says_why_once_and_follow_returns_1(project: Project) -> None:
    result = project.submit("optimizer.lr=1e30", "--follow")
    assert result.returncode == 1
    assert "NaN or infinite at step" in result.stdout and "Traceback" not in result.stdout
    assert project.state()["state"] == "failed"
    assert [e["event"] for e in project.events()].count("failed") == 1


def tasks(project: Project, job_id: str) -> dict[int, int]:
    """Process ids of a local job's tasks, by rank."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            environment = dict(w.split("=", 1) for w in (entry / "environ").read_text().split("\0") if "=" in w)
            words = (entry / "cmdline").read_text().split("\0")
        except (OSError, UnicodeDecodeError):
            continue
        if "submitit.core._submit" in words and environment.get("SUBMITIT_LOCAL_JOB_ID") == job_id:
            found[int(environment["SUBMITIT_LOCAL_GLOBALID"])] = int(entry.name)
    return found


@pytest.mark.process
def test_a_stopped_rank_and_a_killed_rank_0_are_noticed_and_the_run_starts_again(project: Project) -> None:
    job_id = json.loads(project.submit("train.epochs=40", "train.watchdog_minutes=0.4", "--json").stdout)["job_id"]
    project.wait_for("checkpoint")
    os.kill(tasks(project, job_id)[1], signal.SIGSTOP)
    project.wait_for("resumed")
    hang = next(e for e in project.events() if e["event"] == "hang")
    assert "stopped or without a network: rank 1" in (project.logs / "train.log").read_text()

    project.wait("progress", lambda: project.events()[-1].get("step", 0) > hang["step"] + 5)
    os.kill(tasks(project, job_id)[0], signal.SIGKILL)
    project.wait_for("resumed", 2)
    assert [e["reason"] for e in project.events() if e["event"] == "requeued"] == ["failure", "failure"]
    lost = next(e for e in project.events() if e["event"] == "failed")
    assert (lost["cause"], lost["rank"]) == ("lost", 1)
    assert lost["error"].startswith("no word from rank 0")

    assert project.cifar("cancel", "run").returncode == 0
    project.wait("the end of the job", lambda: project.state()["state"] == "cancelled")

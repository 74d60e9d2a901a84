"""What status, tail and --follow say about jobs in each state that a real Slurm brings them into."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from lab import PATIENCE, Lab, until
from runs import Run, thaw

from cifar_hpc.runs import state as run_state
from cifar_hpc.runs.paths import RunPaths
from cifar_hpc.runs.queue import queue
from cifar_hpc.slurm import client as slurm

pytestmark = pytest.mark.slurm

ONE = ("--set", "resources.tasks_per_node=1", "--partition", "gpu")


def waits(run: Run, *options: str, reason: str) -> dict[str, Any]:
    """Submit a run that cannot start; its state, once Slurm has looked at it."""
    run.submit(options[0], *ONE, *options[1:])
    until(f"{run.name} waits: {reason}", lambda: run.state()["reason"] == reason, run.report)
    state = run.state()
    assert state["state"] == "queued" and state["job_id"] == run.job_id and state["detail"].startswith(reason), state
    return state


def test_why_jobs_wait_and_for_how_long(lab: Lab, short: str) -> None:
    held = Run(lab, "state-held")
    assert waits(held, short, "--sbatch", "hold=true", reason="JobHeldUser")["start_time"] is None
    later = waits(Run(lab, "state-later"), short, "--sbatch", "begin=now+3000", reason="BeginTime")
    start = datetime.fromisoformat(later["start_time"]) - datetime.now(UTC)
    assert timedelta(minutes=30) < start <= timedelta(seconds=3000)
    after = Run(lab, "state-after")
    state = waits(after, short, "--dependency", f"afterany:{held.job_id}", reason="Dependency")
    assert f"job {held.job_id} must end first" in state["detail"]

    with lab.urgent("-N2", "--exclusive", "--time=60") as urgent:
        lab.cluster.wait_for(urgent, JobState="RUNNING")
        first, second = Run(lab, "state-first"), Run(lab, "state-second")
        first.submit(short, *ONE, "--sbatch", "exclusive=true")
        second.submit(short, *ONE, "--sbatch", "exclusive=true")

        def expected() -> bool:
            states = [first.state(), second.state()]
            return all(s["state"] == "queued" and s["start_time"] and "starts in ~" in s["detail"] for s in states)

        until("both are expected to start", expected, lambda: first.report() + second.report())
        for run in (first, second, held, after):
            lab.command("cancel", run.name)
    until("the jobs are gone", lambda: not {first.job_id, held.job_id} & set(lab.queued()))
    assert {run.state()["state"] for run in (first, second, held, after)} == {"cancelled"}
    assert "CANCELLED by" in held.log() and "SUBMITTED as job" in held.log()


def test_running_suspended_hung_requeued_and_a_slurm_that_is_silent(
    lab: Lab, short: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(lab, "state-running")
    paths = RunPaths(lab.root, run.name)
    run.submit(short, *ONE, moments=["0/0:SIGSTOP@step:14", "0/0:SIGSTOP@step:24"])
    stopped = run.stopped("step:14")
    state = run.state()
    assert (state["state"], state["epoch"], state["world_size"]) == ("running", 1, 1)
    assert state["detail"].startswith("on node") and state["start_time"] is None

    os.utime(paths.train_log, (0, 0))  # silent for ages, but this start has only begun
    assert run.state()["state"] == "running"
    with monkeypatch.context() as patch:
        patch.setattr(run_state, "HUNG_SECONDS", 0)
        patch.setattr(run_state, "HUNG_INTERVALS", 0)
        hung = run_state.read_state(paths, queue(lab.root))
        assert hung.state == "hung" and hung.detail.startswith("no log line for ")

    assert lab.cluster.scontrol("suspend", run.job_id).returncode == 0
    assert run.state()["state"] == "suspended"
    assert lab.cluster.scontrol("resume", run.job_id).returncode == 0
    thaw(stopped)
    pid = run.stopped("step:24")

    lab.tool("stop", "slurmctld")
    try:
        done = lab.python("-m", "cifar_hpc", "status", run.name, "--json", expect=3)
        assert json.loads(done.stdout)[0]["state"] in ("unknown", "running")  # its lock may tell, on one machine
        assert "squeue" in done.stderr
    finally:
        lab.tool("start", "slurmctld")

    lab.cluster.run(["scancel", "--signal=USR2", run.job_id])
    thaw(pid)
    run.wait("requeued")
    run.wait_job(JobState="PENDING", Reason="BeginTime")
    state = run.state()
    assert state["state"] == "requeued" and state["detail"].startswith("until ") and "after a signal" in state["detail"]
    begin = datetime.fromisoformat(state["start_time"]) - datetime.now(UTC)
    assert timedelta(0) < begin <= timedelta(seconds=slurm.SLURM_DELAY_SECONDS)
    run.release()
    run.wait("finished")
    run.wait_gone()
    state = run.state()
    assert (state["state"], state["restart_causes"], state["reason"]) == ("finished", {"signal": 1}, None)
    assert state["lost_seconds"] > 0 and state["eta_seconds"] is None


def test_followers_wait_with_the_job_and_end_with_it(lab: Lab, short: str) -> None:
    """--follow through queue, requeue and end; tail sees the same, and ends as the run has ended."""
    run = Run(lab, "state-followed")
    command = [sys.executable, "submit.py", short, *ONE, "--name", run.name, "--sbatch", "hold=true", "--follow"]
    follower = subprocess.Popen(
        command, cwd=lab.project, env=lab.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        run.wait("submitted")
        run.job_id = run.events("submitted")[0]["job_id"]
        tail = subprocess.Popen(
            [sys.executable, "-m", "cifar_hpc", "tail", run.name, "--epochs"],
            cwd=lab.project, env=lab.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert tail.stderr is not None
        assert "[queued: JobHeldUser" in tail.stderr.readline()
        lab.command("requeue", run.name)
        run.wait("finished")
        out, err = follower.communicate(timeout=PATIENCE)
        rows, _ = tail.communicate(timeout=PATIENCE)
    finally:
        follower.kill()
        follower.wait()
    assert follower.returncode == 0, out + err
    assert "SUBMITTED as job" in out and out.count(" DONE ") == 3 and out.count("FINISHED") == 1 and "\x1b" not in out
    assert "[queued: JobHeldUser: held by its owner" in err
    assert tail.returncode == 0 and rows.count("test loss") == 3

    failing = Run(lab, "state-failing")
    failing.submit(short, *ONE, "--set", "optimizer.lr=1e30")
    done = lab.python("-m", "cifar_hpc", "tail", failing.name, expect=1)
    assert "FAILED on rank 0" in done.stdout and "[failed: the training loss was NaN" in done.stderr
    assert failing.state()["detail"].startswith("the training loss was NaN")

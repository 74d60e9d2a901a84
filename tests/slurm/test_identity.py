"""A run and its job find each other: an sbatch that does not tell, deleted locks, a folder that two runs share."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from lab import Lab, until
from runs import Run

pytestmark = pytest.mark.slurm

TIMED_OUT = "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation"


def test_the_job_of_an_sbatch_that_timed_out_trains_and_keeps_its_folders(lab: Lab, short: str, tmp_path: Path) -> None:
    (tmp_path / "sbatch").write_text(
        f'#!/bin/sh\nPATH={os.environ["PATH"]} sbatch "$@" > /dev/null\necho "{TIMED_OUT}" >&2\nexit 1\n'
    )
    (tmp_path / "sbatch").chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    run, options = Run(lab, "not-told"), ("--partition", "gpu", "--set", "resources.tasks_per_node=1")
    lab.env["PATH"] = path
    run.submit(short, *options, moments=["0/0:SIGSTOP@step:14"])
    lab.env["PATH"] = os.environ["PATH"]
    pid = run.stopped("step:14")
    assert run.events("submitted")[0]["job_id"] == run.job_id == run.state()["job_id"]

    # Whoever takes the lock for a stale one.
    (run.logs / "run.lock").unlink()
    assert f"trained by job {run.job_id}" in run.submit(short, *options, expect=4)["error"]
    second = lab.python("-m", "cifar_hpc", "train", short, "--name", run.name, expect=4)
    assert f"trained by job {run.job_id}" in second.stderr

    # Another run with its folder of checkpoints, refused here, and on the node if the link is made later.
    linked, late = Run(lab, "linked"), Run(lab, "linked-later")
    linked.checkpoints.symlink_to(run.name)
    assert linked.submit(short, *options, expect=4)["exit_code"] == 4
    late.submit(short, *options, "--sbatch", "hold=true")
    for file in late.checkpoints.iterdir():
        file.unlink()
    late.checkpoints.rmdir()
    late.checkpoints.symlink_to(run.name)
    run.lab.frozen.remove(pid)
    os.kill(pid, signal.SIGURG)
    os.kill(pid, signal.SIGCONT)
    until("the lock is made again", (run.logs / "run.lock").exists, run.report)
    run.wait("finished")
    run.wait_gone()
    assert "run.lock was deleted or replaced" in run.log()
    names = {path.name for path in run.checkpoints.iterdir()}

    assert f"job {late.job_id} may start" in lab.command("requeue", late.name)
    assert f"holds the checkpoints of run {run.name}" in late.wait("failed")["error"]
    late.wait_gone()
    assert late.events("started", "requeued") == [] and {path.name for path in run.checkpoints.iterdir()} == names
    assert linked.submit(short, *options, expect=2)["error"].startswith(str(linked.checkpoints))

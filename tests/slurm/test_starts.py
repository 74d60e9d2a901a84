"""Starts that fail before training: each is counted, said, and tried again within the limits, elsewhere if need be."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from lab import Lab, together, until
from runs import Run

pytestmark = pytest.mark.slurm

ONE = ("--set", "resources.tasks_per_node=1", "--partition", "gpu")  # process
AT_A_RESTART = '[ -z "${SLURM_RESTART_COUNT:-}" ] || '


@pytest.fixture
def bad(lab: Lab) -> str:
    """Shell words that bring a srun which cannot launch anything."""
    srun = lab.root / "bad" / "srun"
    srun.parent.mkdir(exist_ok=True)
    srun.write_text("#!/bin/sh\necho 'srun: error: Task launch failed: Communication connection failure' >&2\nexit 1\n")
    srun.chmod(0o755)
    return f"export PATH={shlex.quote(str(srun.parent))}:$PATH"


def test_starts_that_fail(lab: Lab, short: str, reference: Callable[[], Run], bad: str) -> None:
    together(
        partial(_requeued_by_hand, Run(lab, "by-hand"), short, bad),
        partial(_the_first_start, Run(lab, "first-start"), short, bad, reference),
        partial(_code_that_comes_late, Run(lab, "late-code"), short),
        partial(_no_usable_gpu, Run(lab, "no-gpu"), short),
        partial(_no_python, Run(lab, "no-python"), short),
    )


def test_a_sweep_keeps_away_from_a_broken_node(lab: Lab, short: str, bad: str) -> None:
    """The node of the first start is broken: that point goes on elsewhere, and the next one never goes there."""
    job, profile, broken = lab.root / "broken.yaml", lab.root / "broken-profile.yaml", lab.root / "broken"
    job.write_text(Path(short).read_text() + "sweep: {grid: {train.seed: [1, 2]}, parallel: 1}\n")
    setup = f"""setup:
  - '[ -e {broken} ] || echo $SLURMD_NODENAME > {broken}'
  - '[ "$(cat {broken})" != "$SLURMD_NODENAME" ] || {bad}'
"""
    profile.write_text(setup)
    answer = json.loads(lab.python("submit.py", str(job), "--json", *ONE, "--profile", str(profile)).stdout)
    first, second = runs = [Run(lab, point["run"]) for point in answer["points"]]
    for index, run in enumerate(runs):
        run.job_id = f"{answer['job_id']}_{index}"
    assert first.wait("failed")["bad_node"] == broken.read_text().strip()
    assert "which looks broken" in first.log() and "Communication connection failure" in first.log()
    until("the second starts", lambda: second.events("attempt"), second.report)
    assert second.job()["ExcNodeList"] == broken.read_text().strip() != second.job()["NodeList"]
    second.wait("finished")
    first.release()
    first.wait("finished")
    assert first.job()["ExcNodeList"] == broken.read_text().strip() != first.job()["NodeList"]
    assert second.events("failed") == [] and first.state()["restart_causes"] == {"failure": 1}


def _requeued_by_hand(run: Run, short: str, bad: str) -> None:
    """From its second start on srun does not work, and a person requeues it again and again."""
    limits = ("--set", "failures.max=1")
    run.submit(short, *ONE, *limits, setup=[AT_A_RESTART + bad], moments=["0/0:SIGSTOP@step:14"])
    run.stopped("step:14")
    assert run.lab.cluster.scontrol("requeue", run.job_id).returncode == 0
    run.release()
    assert run.wait("failed")["again"] is True
    run.release()
    assert run.wait("failed", count=2)["again"] is False
    assert run.wait_gone()["JobState"] == "FAILED"
    assert "failures.max (1) is used up" in run.log() and run.log().count("Communication connection failure") == 2
    assert run.lab.cluster.scontrol("requeue", run.job_id).returncode == 0
    run.release()
    assert run.wait("failed", count=3)["again"] is False
    run.wait_gone()
    state = run.state()
    assert (state["state"], state["restarts"], state["requeues"]["failure"]) == ("failed", 3, 1)
    assert [row["restart_count"] for row in run.events("attempt")] == [0, 1, 2, 3]


def _the_first_start(run: Run, short: str, bad: str, reference: Callable[[], Run]) -> None:
    """What it fails of has passed by the second one. The site's setup is a strict script."""
    setup = ["set -euo pipefail", f'[ -n "${{SLURM_RESTART_COUNT:-}}" ] || {bad}']
    run.submit(short, *ONE, setup=setup)
    failed = run.wait("failed")
    assert failed["cause"] == "start" and "Communication connection failure" in failed["error"]
    until("it is requeued", lambda: run.state()["state"] == "requeued", run.report)  # once Slurm has looked at it
    assert run.reasons() == ["failure"]
    run.release()
    run.check_kept(reference(), failures=1)
    assert run.state()["restarts"] == 1 and [row["restart"] for row in run.events("started")] == [1]


def _code_that_comes_late(run: Run, short: str) -> None:
    """Slurm goes to /tmp, and the script waits for the folder."""
    run.submit(short, *ONE, "--sbatch", "hold=true")
    code, away = run.logs / "code", run.logs / "away"
    code.rename(away)
    assert run.lab.cluster.scontrol("release", run.job_id).returncode == 0
    output = run.logs / "slurm" / f"{run.job_id}_0_log.out"
    until("it started", lambda: output.exists() and "going to /tmp instead" in output.read_text(), run.report)
    away.rename(code)
    run.wait("finished")
    assert len(run.events("attempt")) == 1 and run.events("failed") == []


def _no_usable_gpu(run: Run, short: str) -> None:
    """The cluster's GPUs are no GPUs, on any of its nodes."""
    run.submit(short, *ONE, "--gpus-per-node", "1", "--set", "train.device=auto", "failures.max=1")
    failed = run.wait("failed")
    if torch.version.cuda is None:  # no node can help this PyTorch
        assert failed["again"] is False
        return
    assert failed["again"] is True and failed["bad_node"] == run.job()["BatchHost"]
    run.wait_job(ExcNodeList=failed["bad_node"])  # said right after the requeue
    run.release()
    assert run.wait("failed", count=2)["bad_node"] not in ("", failed["bad_node"])
    assert run.wait_gone()["JobState"] == "FAILED" and "failures.max (1) is used up" in run.log()


def _no_python(run: Run, short: str) -> None:
    """Neither the tasks nor the epilog can start Python: the shell asks for another start, and then holds the job."""
    profile = run.lab.root / "no-python.yaml"
    profile.write_text("python: /nowhere/python\n")
    run.submit(short, *ONE, "--set", "failures.max=1", "--profile", str(profile))
    assert run.wait("failed")["again"] is True
    run.release()
    assert run.wait("failed", count=2)["again"] is False
    until("it is held", lambda: run.state()["state"] == "queued" and "held" in run.state()["detail"], run.report)
    assert run.log().count("/nowhere/python") >= 2 and run.reasons() == ["failure"]
    assert "is cancelled" in run.lab.command("cancel", run.name)

"""Slurm itself is in trouble: daemons that are down or restarted, programs that are missing."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from lab import Lab, together, until
from runs import Run, thaw

pytestmark = pytest.mark.slurm

ONE = ("--set", "resources.tasks_per_node=1")


def test_slurm_in_trouble(lab: Lab, short_lab: Lab, short: str, reference: Callable[[], Run], tmp_path: Path) -> None:
    together(
        partial(_daemons_go_down_and_come_back, lab, short, reference),
        partial(_without_scontrol, short_lab, short, reference, tmp_path / "bin"),
    )


def _daemons_go_down_and_come_back(lab: Lab, short: str, reference: Callable[[], Run]) -> None:
    """slurmdbd is down meanwhile; slurmd is restarted under a running job; slurmctld is gone just when rank 0 has
    saved and would ask it what to do, and comes back later."""
    runs = [Run(lab, "slurmd-restarted"), Run(lab, "slurmctld-gone")]
    lab.tool("stop", "slurmdbd")
    try:
        for run, node in zip(runs, ("node1", "node2"), strict=True):
            moments = ["0/0:SIGSTOP@step:14", "0/0:SIGSTOP@rename:15"]
            run.submit(short, *ONE, "--partition", "gpu", "--nodelist", node, moments=moments)
        for run in runs:
            run.stopped("step:14")
        lab.tool("stop", "slurmd-node1")
        assert runs[0].task_processes() != []
        lab.tool("start", "slurmd-node1")
        with lab.urgent("-N2", "--exclusive"):
            saving = [run.stopped("rename:15") for run in runs]
            _state_saved(lab, runs[0].job_id)
            lab.tool("stop", "slurmctld", "--kill")
            thaw(*saving)
            for run in runs:
                holding = run.wait("holding")
                assert "asking again" in holding["explanation"] or "waiting" in holding["explanation"], holding
                assert run.task_processes() != []
            lab.tool("start", "slurmdbd")  # without it slurmctld does not start, unless it has ended in good order
            lab.tool("start", "slurmctld")
            for run in runs:
                assert run.wait_job(JobState="PENDING")["Restarts"] == "1"
    finally:
        lab.tool("start", "slurmdbd")
        lab.tool("start", "slurmctld")

    def goes_on(run: Run) -> None:
        assert run.check_saved_where_it_stopped() == 15
        run.release()
        run.check_resumed_at(15)
        run.check_kept(reference())

    together(*(partial(goes_on, run) for run in runs))
    _killed_while_slurmctld_is_gone(Run(lab, "killed-meanwhile"), short, reference)


def _killed_while_slurmctld_is_gone(run: Run, short: str, reference: Callable[[], Run]) -> None:
    run.submit(short, *ONE, "--partition", "gpu", moments=["0/0:SIGSTOP@step:14"])
    training = run.stopped("step:14")
    _state_saved(run.lab, run.job_id)
    run.lab.tool("stop", "slurmctld", "--kill")
    os.kill(training, signal.SIGKILL)
    until("the epilog has asked", lambda: "WARNING scontrol show job" in run.log(), run.report)
    run.lab.tool("start", "slurmctld")
    assert run.wait("failed")["again"] is True
    run.wait_job(JobState="PENDING")
    run.release()
    run.check_kept(reference(), failures=1)


def _state_saved(lab: Lab, job_id: str) -> None:
    """slurmctld writes changes to disk only after some seconds; killed before, it forgets them."""
    now = time.time()
    assert lab.cluster.scontrol("update", f"jobid={job_id}", "comment=x").returncode == 0
    file = Path(lab.cluster.dir) / "state" / "job_state"
    until("slurmctld has saved its state", lambda: file.exists() and file.stat().st_mtime > now)


def _without_scontrol(lab: Lab, short: str, reference: Callable[[], Run], programs: Path) -> None:
    """Requeueing is left to Slurm, at the end of the grace time. And this cluster has no accounting."""
    programs.mkdir()
    for folder in os.environ["PATH"].split(os.pathsep):
        for program in Path(folder).iterdir() if Path(folder).is_dir() else ():
            link = programs / program.name
            if program.name != "scontrol" and not link.is_symlink():
                link.symlink_to(program)
    run = Run(lab, "no-scontrol")
    run.submit(short, "--partition", "gpu", moments=["0/0:SIGSTOP@step:14"], setup=[f"export PATH={programs}"])
    run.stopped("step:14")
    with lab.urgent("-N2", "--exclusive"):
        assert "requeueing is left to Slurm" in run.wait("holding")["explanation"]
        assert run.wait_job(JobState="PENDING", Reason="BeginTime")["Restarts"] == "1"
    assert run.events("requeued", "requeue_failed", "left") == []
    assert "scontrol is not on PATH" in run.log() and "requeueing is left to Slurm" in run.log()
    assert run.check_saved_where_it_stopped() == 15
    run.release()
    run.check_resumed_at(15)
    run.check_kept(reference())

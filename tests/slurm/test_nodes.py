"""Nodes that are lost, and other numbers of nodes and of processes at each start."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
from lab import Lab, together, until
from runs import Run

pytestmark = pytest.mark.slurm


def test_a_node_is_lost_and_the_runs_go_on_elsewhere(lab: Lab, short: str, reference: Callable[[], Run]) -> None:
    training, saving, both = (Run(lab, name) for name in ("lost-training", "lost-saving", "lost-one-of-two"))
    one = ("--set", "resources.tasks_per_node=1", "--partition", "gpu")
    training.submit(short, *one, "--nodelist", "node1", moments=["0/0:SIGSTOP@step:14"])
    saving.submit(short, *one, "--nodelist", "node1", moments=["0/0:SIGSTOP@rename:16"])
    # Four processes. Slurm starts it again on as many nodes as there are: two processes, then three.
    both.submit(short, "--partition", "gpu", "--nodes", "1-2", moments=["0/0:SIGSTOP@step:14", "1/0:SIGSTOP@step:16"])
    training.stopped("step:14")
    saving.stopped("rename:16")
    both.stopped("step:14")
    assert both.job()["NodeList"] == "node[1-2]"
    assert [path for path in saving.checkpoints.iterdir() if path.suffix == ".tmp"] != []

    lab.tool("lose", "node1")
    for run in (training, saving):
        assert run.task_processes() == []
    # Long before Slurm finds out (after SlurmdTimeout, 300 s) the processes on the other node have noticed.
    assert both.wait("requeued")["reason"] == "failure"
    both.wait_job(JobState="COMPLETING", Restarts="1")
    assert lab.cluster.scontrol("update", "nodename=node1", "state=down", "reason=lost").returncode == 0
    for run in (training, saving, both):
        assert run.wait_job(JobState="PENDING")["Restarts"] == "1"
    for run in (training, saving):  # they asked for that node
        assert lab.cluster.scontrol("update", f"jobid={run.job_id}", "ReqNodeList=node2").returncode == 0
    for run in (training, saving, both):
        run.release()

    def goes_on(run: Run) -> None:
        run.check_resumed_from_newest()
        assert run.job()["NodeList"] == "node2"
        run.check_kept(reference())
        assert run.reasons() == [] and run.job()["Restarts"] == "1"

    def changes_its_size(run: Run) -> None:
        run.check_resumed_from_newest()
        run.stopped("step:16", restart=1)
        assert run.job()["NodeList"] == "node2"
        assert "is cancelled" in lab.command("cancel", run.name)
        run.wait_gone()
        assert run.check_saved_where_it_stopped(len(run.events("signal"))) == 17
        lab.tool("start", "slurmd-node1")
        lab.cluster.scontrol("update", "nodename=node1", "state=resume")
        until("node1 is back", lambda: lab.nodes()["node1"] in ("idle", "mixed", "allocated"), lambda: str(lab.nodes()))
        run.submit(short, "--partition", "gpu", "--nodes", "2", srun=["--ntasks=3"])
        run.check_resumed_at(17, count=2)
        assert run.job()["NodeList"] == "node[1-2]"
        run.check_kept(reference(), failures=1)
        starts = run.events("started", "resumed")
        assert [start["world_size"] for start in starts] == [4, 2, 3]

    together(partial(goes_on, training), partial(goes_on, saving), partial(changes_its_size, both))


def test_the_node_without_the_batch_script_is_lost(lab: Lab, short: str, reference: Callable[[], Run]) -> None:
    run = Run(lab, "second-of-two")
    one = ("--set", "resources.tasks_per_node=1")
    run.submit(short, *one, "--partition", "gpu", "--nodes", "2", moments=["0/1:SIGSTOP@step:14"])
    run.stopped("step:14", rank=1)
    assert run.job()["BatchHost"] == "node1"
    lab.tool("lose", "node2")
    assert run.wait("requeued")["reason"] == "failure"
    run.wait_job(JobState="COMPLETING", Restarts="1")  # until the node is back, or down
    lab.tool("start", "slurmd-node2")
    # The first start's srun waits for the lost node's task for KillWait and 2 s, and then cancels step 0 of the job,
    # whichever start that is of by now.
    until("the first start's srun has gone", lambda: run.srun_processes() == [], run.report)
    run.release()
    run.check_resumed_from_newest()
    run.check_kept(reference(), failures=1)
    assert run.reasons() == ["failure"]

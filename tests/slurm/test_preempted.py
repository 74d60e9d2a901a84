"""Preemption by a job of higher priority, whenever and however it comes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from lab import Lab, together, until
from runs import MOMENTS, Run, thaw

pytestmark = pytest.mark.slurm

STOP = "0/0:SIGSTOP@step:14"  # in the middle of the second epoch
ONE = ("--set", "resources.tasks_per_node=1")  # process; the weights do not depend on it


def ended_for_good(run: Run) -> None:
    """The job will not come back. Since Slurm 24.05 a job that was warned of a preemption ends as PREEMPTED."""
    job = run.job()
    assert job["JobState"] in ("COMPLETED", "PREEMPTED") and (job["Requeue"], job["ExitCode"]) == ("0", "0:0"), job


def test_partitions_with_grace_without_grace_and_those_that_cancel(
    lab: Lab, short: str, reference: Callable[[], Run]
) -> None:
    grace, cancelable, nograce = runs = [Run(lab, name) for name in ("gpu", "cancelable", "nograce")]
    for run in runs:
        run.submit(short, *(() if run is grace else ONE), "--partition", run.name, moments=[STOP])
    late = Run(lab, "at-its-end")
    late.submit(short, *ONE, "--partition", "gpu", moments=["0/0:SIGSTOP@rename:30"])
    for run in runs:
        run.stopped("step:14")
    late.stopped("rename:30")
    with lab.urgent("-N2", "--exclusive"):
        late.check_kept(reference())
        ended_for_good(late)
        for run in runs:
            assert run.wait_job(JobState="PENDING", Reason="BeginTime")["Restarts"] == "1"
            assert run.state()["state"] == "requeued"
    # Where Slurm would have forgotten the job, its own requeue has saved it.
    assert grace.reasons() == cancelable.reasons() == ["preemption"]
    # Where Slurm requeues by itself, the run must not do it again.
    assert nograce.reasons() == []
    assert [e["reason"] for e in nograce.events("left")] == ["requeued"]

    def goes_on(run: Run) -> None:
        assert run.check_saved_where_it_stopped() == 15
        run.release()
        run.check_resumed_at(15)
        run.check_kept(reference())
        assert run.job()["Restarts"] == "1" and run.state()["restarts"] == 1
        ended_for_good(run)

    together(*(partial(goes_on, run) for run in runs))


def test_while_starting_up(lab: Lab, short: str, reference: Callable[[], Run]) -> None:
    """SIGTERM comes before Python runs, before torch is there, while the ranks meet, while the data is loaded."""
    moments = {"python": "*", "torch": "0", "connect": "1", "data": "0"}
    runs = [(Run(lab, f"at-{place}"), place, rank) for place, rank in moments.items()]
    killed = Run(lab, "at-python-nograce")
    for run, place, rank in [*runs, (killed, "python", "*")]:
        processes = ONE if place in ("torch", "data") or run is killed else ()
        partition = "nograce" if run is killed else "gpu"
        run.submit(short, *processes, "--partition", partition, moments=[f"0/{rank}:SIGSTOP@{place}"])
    for run, place, rank in [*runs, (killed, "python", "*")]:
        for number in (0, 1) if rank == "*" and run is not killed else (int(rank.replace("*", "0")),):
            run.stopped(place, rank=number)

    def goes_on(run: Run) -> None:
        run.wait_job(JobState="PENDING", Reason="BeginTime")
        assert run.events("checkpoint", "failed", "hang") == []
        assert run.reasons() == ([] if run is killed else ["preemption"]), run.report()

    with lab.urgent("-N2", "--exclusive"):
        together(*(partial(goes_on, run) for run in (*(r for r, *_ in runs), killed)))

    def ends(run: Run) -> None:
        run.release()
        run.check_kept(reference())
        assert run.job()["Restarts"] == "1"

    together(*(partial(ends, run) for run in (*(r for r, *_ in runs), killed)))


def test_three_times_within_one_epoch_and_one_task_of_an_array(
    lab: Lab, short: str, reference: Callable[[], Run]
) -> None:
    together(partial(_three_times, lab, short, reference), partial(_one_task_of_an_array, lab, short, reference))


def _three_times(lab: Lab, short: str, reference: Callable[[], Run]) -> None:
    run = Run(lab, "three-times")
    steps = (12, 14, 16)
    moments = [f"{restart}/0:SIGSTOP@step:{step}" for restart, step in enumerate(steps)]
    run.submit(short, *ONE, "--partition", "gpu", "--nodelist", "node1", moments=moments)
    for restart, step in enumerate(steps):
        run.stopped(f"step:{step}", restart)
        with lab.urgent("--nodelist=node1", "--exclusive"):
            run.wait("requeued", count=restart + 1)
            run.wait_job(JobState="PENDING", Reason="BeginTime")
        assert run.check_saved_where_it_stopped(restart + 1) == step + 1
        run.release()
        run.check_resumed_at(step + 1, restart + 1)
    run.check_kept(reference())
    assert run.reasons() == ["preemption"] * 3 and run.job()["Restarts"] == "3"
    ended_for_good(run)


def _one_task_of_an_array(lab: Lab, short: str, reference: Callable[[], Run]) -> None:
    runs = [Run(lab, "array-0"), Run(lab, "array-1")]
    moments = lab.root / "moments" / "array"
    profile = lab.root / "array.yaml"
    profile.write_text(f"""setup:
  - export "PYTHONPATH={MOMENTS}" CIFAR_HPC_MOMENTS=0/0:SIGSTOP@step:14
  - export CIFAR_HPC_MOMENTS_SEEN={moments}/$SLURM_ARRAY_TASK_ID
""")
    script = Path(__file__).with_name("submit_array.py")
    code = f"import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path({str(script)!r})"  # imports the lab's project
    ids = lab.python("-c", code, str(script), str(profile), short, *(run.name for run in runs)).stdout.split()
    for number, run in enumerate(runs):
        run.job_id, run.moments = ids[number], moments / str(number)
    assert [run.job_id.partition("_")[2] for run in runs] == ["0", "1"]
    pids = {run: run.stopped("step:14") for run in runs}

    def preempted() -> list[Run]:
        return [run for run in runs if run.events("requeued")]

    with lab.urgent("--nodelist=node2", "--cpus-per-task=4"):  # has room beside one of them
        (moved,) = until("one of them is preempted", preempted, lambda: "".join(run.report() for run in runs))
        moved.wait_job(JobState="PENDING", Reason="BeginTime")
        (stays,) = (run for run in runs if run is not moved)
        assert stays.job()["JobState"] == "RUNNING" and stays.events("signal") == []
        assert moved.check_saved_where_it_stopped() == 15

    assert lab.cluster.scontrol("update", f"jobid={moved.job_id}", "StartTime=now+2").returncode == 0
    moved.check_resumed_at(15)
    moved.check_kept(reference())
    assert moved.job()["Restarts"] == "1"
    ended_for_good(moved)
    thaw(pids[stays])
    stays.check_kept(reference())
    assert stays.job()["Restarts"] == "0" and stays.events("requeued", "signal", "resumed") == []

"""A sweep on a real Slurm: an array whose tasks are runs, preempted, cancelled and submitted again one by one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lab import Lab, until
from runs import MOMENTS, Run, thaw

pytestmark = pytest.mark.slurm

# Runs of other names, of which two and two compute the same on a CPU: the first two what the reference does.
SWEEP = "sweep: {grid: {train.amp: [auto, fp32], train.deterministic: [true, false]}, parallel: 2}\n"
ROOM_FOR_TWO = "--partition gpu --nodelist node2 --cpus-per-task 4 --set resources.tasks_per_node=1".split()


def _submit(lab: Lab, job: Path, *arguments: str, expect: int = 0) -> dict[str, Any]:
    done = lab.python("submit.py", str(job), "--json", *ROOM_FOR_TWO, *arguments, expect=expect)
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def test_points_are_preempted_cancelled_and_submitted_again_one_by_one(
    lab: Lab, short: str, reference: Callable[[], Run]
) -> None:
    job, profile, moments = lab.root / "points.yaml", lab.root / "points-profile.yaml", lab.root / "moments" / "points"
    job.write_text(Path(short).read_text() + SWEEP)
    profile.write_text(f"""setup:
  - export "PYTHONPATH={MOMENTS}" CIFAR_HPC_MOMENTS=0/0:SIGSTOP@step:14
  - export CIFAR_HPC_MOMENTS_SEEN={moments}/$SLURM_ARRAY_TASK_ID
""")
    assert "to start at" in lab.python("submit.py", str(job), "--test-only", *ROOM_FOR_TWO).stdout
    answer = _submit(lab, job, "--profile", str(profile))
    runs = [Run(lab, point["run"]) for point in answer["points"]]
    for index, run in enumerate(runs):
        run.job_id, run.moments = f"{answer['job_id']}_{index}", moments / str(index)
    assert [point["job_id"] for point in answer["points"]] == [run.job_id for run in runs]
    pids = {run: run.stopped("step:14") for run in runs[:2]}

    third, fourth = runs[2:]  # wait for room: the array runs two at a time
    assert (third.state()["state"], third.state()["job_id"]) == ("queued", third.job_id)
    assert "JobArrayTaskLimit" in third.state()["detail"]
    refused = _submit(lab, job, "--set", "sweep=null", "train.amp=fp32", expect=4)
    assert f"run {third.name} is already in the queue as job {third.job_id} (PENDING)" in refused["error"]
    assert {point["state"] for point in _submit(lab, job)["points"]} == {"left out"}
    assert f"job {fourth.job_id} is cancelled" in lab.command("cancel", fourth.name)
    until("the fourth is gone", lambda: fourth.job_id not in lab.queued())
    assert fourth.state()["state"] == "cancelled" and third.job_id in lab.queued()

    with lab.urgent("--nodelist=node2", "--cpus-per-task=4"):  # has room beside one of them
        report = lambda: "".join(run.report() for run in runs[:2])  # noqa: E731
        until("one of them is preempted", lambda: any(run.events("requeued") for run in runs[:2]), report)
        (moved,) = (run for run in runs[:2] if run.events("requeued"))
        (stays,) = (run for run in runs[:2] if run is not moved)
        moved.wait_job(JobState="PENDING", Reason="BeginTime")
        assert stays.job()["JobState"] == "RUNNING" and stays.events("signal") == []
        assert moved.check_saved_where_it_stopped() == 15

    third.stopped("step:14")  # it has the room meanwhile
    assert f"job {third.job_id} is cancelled" in lab.command("cancel", third.name)
    assert third.wait_gone()["JobState"] == "CANCELLED"
    assert third.check_saved_where_it_stopped() == 15 and third.state()["state"] == "cancelled"

    moved.release()
    moved.check_resumed_at(15)
    moved.check_kept(reference())
    assert moved.job()["Restarts"] == "1" and moved.reasons() == ["preemption"]
    thaw(pids[stays])
    stays.check_kept(reference())
    assert stays.job()["Restarts"] == "0" and stays.events("requeued", "signal", "resumed") == []

    again = _submit(lab, job)
    assert [point["state"] for point in again["points"]] == ["finished", "finished", "submitted", "submitted"]
    for index, run in enumerate((third, fourth)):
        run.job_id = f"{again['job_id']}_{index}"
    fourth.wait("finished")  # which nobody disturbs
    third.check_resumed_at(15)
    third.check_kept(fourth)
    fourth.check_kept(third)
    assert {point["state"] for point in _submit(lab, job)["points"]} == {"finished"}
    assert lab.queued() == []

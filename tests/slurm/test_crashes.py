"""Tasks that die, stop or fail by themselves: the job is started again, and goes on to the same weights."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable
from functools import partial

import pytest
from lab import Lab, together
from runs import Run, seconds

pytestmark = pytest.mark.slurm


def test_a_rank_dies_stops_or_fails(lab: Lab, short: str, reference: Callable[[], Run]) -> None:
    stopped = [Run(lab, "rank-0-stopped"), Run(lab, "rank-1-stopped")]
    for rank, run in enumerate(stopped):
        limit = ("--set", "train.watchdog_minutes=0.5")
        run.submit(short, *limit, "--partition", "gpu", moments=[f"0/{rank}:SIGSTOP@step:14"])
    for rank, run in enumerate(stopped):
        run.stopped("step:14", rank=rank)
    together(  # the others crash while these two hang
        *(partial(_stopped_for_good, run, reference, rank) for rank, run in enumerate(stopped)),
        partial(_killed, Run(lab, "rank-0-killed"), short, reference, 0),
        partial(_killed, Run(lab, "rank-1-killed"), short, reference, 1),
        partial(_failing, Run(lab, "rank-1-failing"), short, reference),
        partial(_all_killed, Run(lab, "all-killed"), short, reference),
        partial(_all_killed_for_good, Run(lab, "all-killed-for-good"), short, reference),
        partial(_step_cancelled, Run(lab, "step-cancelled"), short, reference),
        partial(_srun_killed, Run(lab, "srun-killed"), short, reference),
    )


def _goes_on(run: Run, reference: Callable[[], Run]) -> None:
    assert run.reasons() == ["failure"], run.report()
    run.release()
    run.check_resumed_from_newest()
    run.check_kept(reference(), failures=1)
    assert run.job()["Restarts"] == "1" and run.state()["requeues"] == {"failure": 1}


def _killed(run: Run, short: str, reference: Callable[[], Run], rank: int) -> None:
    """The survivor ends by itself and has the job requeued."""
    run.submit(short, "--partition", "gpu", moments=[f"0/{rank}:SIGKILL@step:14"])
    run.reached("step:14", rank=rank)
    run.wait_job(JobState="PENDING", Reason="BeginTime")
    (failed,) = run.events("failed")
    assert failed["cause"] == "lost" and failed["rank"] == 1 - rank, run.report()
    assert re.search(rf"FAILED on rank {1 - rank} .*\n?.*", run.log()) and f"rank {rank}" in run.log()
    _goes_on(run, reference)


def _stopped_for_good(run: Run, reference: Callable[[], Run], rank: int) -> None:
    """Nothing moves any more, and no connection breaks: the watchdog of another rank notices."""
    hang = run.wait("hang")
    assert hang["cause"] == "hang" and hang["rank"] == 1 - rank, run.report()
    run.wait_job(JobState="PENDING", Reason="BeginTime")
    stacks = run.log().partition("---- stacks of rank")[2]
    assert "trainer.py" in stacks and "in _train_epoch" in stacks, run.report()
    _goes_on(run, reference)


def _failing(run: Run, short: str, reference: Callable[[], Run]) -> None:
    """An exception in one rank: said once, by its own traceback and not by what the others notice of it."""
    run.submit(short, "--partition", "gpu", moments=["0/1:raise@step:14"])
    run.wait_job(JobState="PENDING", Reason="BeginTime")
    (failed,) = run.events("failed", "hang")
    assert failed["rank"] == 1 and failed["error"] == "RuntimeError: on purpose, at step:14", run.report()
    assert run.log().count("RuntimeError: on purpose") == 1 and run.log().count("FAILED on rank") == 1
    _goes_on(run, reference)


def _all_killed(run: Run, short: str, reference: Callable[[], Run]) -> None:
    """No task is left to say or to ask for anything: the batch script does."""
    run.submit(short, "--partition", "gpu", moments=["0/*:SIGKILL@step:14"])
    run.wait_job(JobState="PENDING", Reason="BeginTime")
    (failed,) = run.events("failed")
    assert failed["cause"] == "killed" and failed["step"] == run.events("checkpoint")[-1]["step"], run.report()
    assert run.log().count("FAILED: all processes were killed (exit status 137)") == 1
    _goes_on(run, reference)


def _all_killed_for_good(run: Run, short: str, reference: Callable[[], Run]) -> None:
    """The same where the job may not be requeued: it fails, says so, and submitting again goes on."""
    run.submit(short, "--partition", "gpu", "--no-requeue", moments=["0/*:SIGKILL@step:14"])
    assert run.wait_gone()["JobState"] == "FAILED"
    state = run.state()
    assert state["state"] == "failed" and "all processes were killed" in state["detail"], run.report()
    _submitted_again(run, short, reference)


def _step_cancelled(run: Run, short: str, reference: Callable[[], Run]) -> None:
    """scancel JOB.STEP is SIGKILL at once, to every task, as an accident would be; who means the job cancels that."""
    one = ("--set", "resources.tasks_per_node=1")
    run.submit(short, *one, "--partition", "gpu", moments=["0/0:SIGSTOP@step:14"])
    run.stopped("step:14")
    shown = run.lab.cluster.run(["squeue", "--steps", "--noheader", f"--jobs={run.job_id}", "--format=%i"]).stdout
    (step,) = [word for word in shown.split() if word.rpartition(".")[2].isdigit()]  # 0, unless srun had to ask twice
    done = run.lab.cluster.run(["scancel", step])
    assert done.returncode == 0, (done.stderr, shown, run.report())
    run.wait_job(JobState="PENDING", Reason="BeginTime")
    _goes_on(run, reference)


def _srun_killed(run: Run, short: str, reference: Callable[[], Run]) -> None:
    """Its shepherd, a process that outlives it, kills every task at once."""
    run.submit(short, "--partition", "gpu", moments=["0/0:SIGSTOP@step:14"])
    run.stopped("step:14")
    os.kill(run.srun_processes()[0], signal.SIGKILL)
    run.wait_job(JobState="PENDING", Reason="BeginTime")
    _goes_on(run, reference)


def _submitted_again(run: Run, short: str, reference: Callable[[], Run]) -> None:
    first = run.job_id
    assert run.inspect()["step"] == run.events("checkpoint")[-1]["step"]
    run.submit(short, "--partition", "gpu")
    assert run.job_id != first
    run.check_resumed_from_newest()
    run.check_kept(reference(), failures=1)
    assert run.events("requeued", "signal", "left") == []
    assert seconds(run.events("submitted")[1]) < seconds(run.wait("resumed"))

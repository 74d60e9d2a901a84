"""What people do to jobs: cancel, requeue and hold them, let them run into their time limit, choose odd folders."""

from __future__ import annotations

import re
import shlex
import shutil
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
from lab import Lab, together, until
from runs import Run, thaw

from cifar_hpc.slurm.client import release_job, requeue_job, user_name

pytestmark = pytest.mark.slurm

STOP = "0/0:SIGSTOP@step:14"
ONE = ("--set", "resources.tasks_per_node=1")


def test_what_people_do_to_a_running_job(
    lab: Lab, short: str, reference: Callable[[], Run], root: Path, project: Path
) -> None:
    odd = Lab(root / """it's a "root" dir $ `id` & 'x'""", project, lab.cluster)
    odd.root.mkdir()
    together(
        partial(_scancel, Run(lab, "scancelled"), short, reference),
        partial(_scontrol_requeue, Run(lab, "requeued"), short, reference),
        partial(_scontrol_requeuehold, Run(lab, "requeued-held"), short, reference),
        partial(_our_requeue, Run(odd, "requeued-by-us"), short, reference),
        partial(_time_limit, Run(lab, "timeout"), short, reference),
        partial(_last_time_limit, Run(lab, "last-timeout"), short, reference),
        partial(_time_limit_without_a_warning, Run(lab, "timeout-unheard"), short, reference),
        partial(_requeue_after_the_end, Run(lab, "requeued-after-its-end"), short, reference),
    )


def _begin(run: Run, short: str, *options: str) -> int:
    run.submit(short, *options, "--partition", "gpu", moments=[STOP])
    return run.stopped("step:14")


def _scancel(run: Run, short: str, reference: Callable[[], Run]) -> None:
    """It is final, with a checkpoint; submitting again goes on."""
    _begin(run, short)
    first = run.job_id
    run.lab.cluster.run(["scancel", first])
    assert run.wait_gone()["JobState"] == "CANCELLED"
    assert run.check_saved_where_it_stopped() == 15 == run.inspect()["step"]
    assert run.state()["state"] == "cancelled"
    run.submit(short, "--partition", "gpu")
    assert run.job_id != first
    run.check_resumed_at(15)
    run.check_kept(reference())
    # Nothing has brought the first job back in the meantime.
    assert run.events("requeued") == []
    job = run.lab.cluster.job(first)
    assert (job["JobState"], job["Restarts"]) == ("CANCELLED", "0")


def _scontrol_requeue(run: Run, short: str, reference: Callable[[], Run]) -> None:
    """Slurm has requeued the job when its tasks get to know: they save, and leave it at that."""
    _begin(run, short, *ONE)
    assert run.lab.cluster.scontrol("requeue", run.job_id).returncode == 0
    assert run.wait("left")["reason"] == "requeued"
    assert run.check_saved_where_it_stopped() == 15
    run.release()
    run.check_resumed_at(15)
    run.check_kept(reference())
    assert run.reasons() == [] and run.job()["Restarts"] == "1"
    assert "requeued by Slurm or a person" in run.log()
    assert run.state()["restart_causes"] == {"requeued": 1}


def _scontrol_requeuehold(run: Run, short: str, reference: Callable[[], Run]) -> None:
    """The same, and it waits until somebody releases it."""
    _begin(run, short, *ONE)
    assert run.lab.cluster.scontrol("requeuehold", run.job_id).returncode == 0
    assert run.wait("left")["explanation"].endswith(": requeued and held by a person")
    assert run.check_saved_where_it_stopped() == 15
    assert run.wait_job(JobState="PENDING", Priority="0")["Restarts"] == "1"
    assert run.state()["state"] == "queued" and "held" in run.state()["detail"].lower(), run.state()
    assert f"job {run.job_id} may start" in run.lab.command("requeue", run.name)
    run.check_resumed_at(15)
    run.check_kept(reference())
    assert run.reasons() == []


def _our_requeue(run: Run, short: str, reference: Callable[[], Run]) -> None:
    """One command has it save, go back into the queue and start again. Its folder has an odd name."""
    pid = _begin(run, short, *ONE)
    with ThreadPoolExecutor(1) as pool:
        command = pool.submit(run.lab.command, "requeue", run.name)
        assert run.wait("requeue_requested")["by"] == user_name()
        until("it has its signal", lambda: _is_pending(signal.SIGUSR2, pid), run.report)
        thaw(pid)  # here Slurm sends no SIGCONT along
        said = command.result()
    assert f"job {run.job_id}: waiting for the checkpoint" in said
    assert f"job {run.job_id} may start as soon as there is room" in said
    assert run.events("signal")[0]["signal"] == "SIGUSR2" and run.reasons() == ["requested"]
    assert f"{user_name()} asked for a requeue; requeueing" in run.log()
    assert run.check_saved_where_it_stopped() == 15
    run.check_resumed_at(15)
    run.check_kept(reference())
    assert run.job()["Restarts"] == "1" and run.state()["restart_causes"] == {"requested": 1}
    assert {path.name for path in run.lab.root.iterdir()} == {"checkpoints", "logs", "moments", "profiles"}


def _is_pending(number: signal.Signals, pid: int) -> bool:
    """True if a process that is stopped has been sent a signal."""
    fields = re.findall("^(?:SigPnd|ShdPnd):(.*)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return any(int(field, 16) >> (number - 1) & 1 for field in fields)


# Slurm looks at time limits every 30 s, so its warning comes with 30 to 60 s left.
LIMITED = ("--time", "30", "--set", "resources.warning_seconds=30", "resources.tasks_per_node=1")


def _time_limit(run: Run, short: str, reference: Callable[[], Run]) -> None:
    """Near it the run saves and requeues itself."""
    _begin(run, short, *LIMITED)
    run.lab.cluster.scontrol("update", f"jobid={run.job_id}", "EndTime=now+60")
    assert run.wait_job(JobState="PENDING", Reason="BeginTime")["Restarts"] == "1"
    assert run.reasons() == ["timeout"] and run.events("signal")[0]["signal"] == "SIGUSR2"
    assert run.check_saved_where_it_stopped() == 15
    run.lab.cluster.scontrol("update", f"jobid={run.job_id}", "TimeLimit=30")  # it had become a minute or two
    run.release()
    run.check_resumed_at(15)
    run.check_kept(reference())
    assert run.state()["requeues"] == {"timeout": 1}


def _time_limit_without_a_warning(run: Run, short: str, reference: Callable[[], Run]) -> None:
    """The warning comes while the site's setup runs, which does not hear it."""
    run.submit(short, "--time", "1", *ONE, "--partition", "gpu", moments=[STOP], setup=["sleep 48"])
    run.stopped("step:14")
    assert run.wait("requeued")["reason"] == "timeout" and run.events("signal")[0]["signal"] == "SIGTERM"
    assert run.check_saved_where_it_stopped() == 15
    run.wait_job(JobState="PENDING", Restarts="1")
    run.lab.cluster.scontrol("update", f"jobid={run.job_id}", "TimeLimit=30")
    run.release()
    run.check_resumed_at(15)
    run.check_kept(reference())


def _last_time_limit(run: Run, short: str, reference: Callable[[], Run]) -> None:
    """The same with timeouts.max used up: it saves and ends, and submitting again goes on."""
    _begin(run, short, *LIMITED, "timeouts.max=0")
    run.lab.cluster.scontrol("update", f"jobid={run.job_id}", "EndTime=now+60")
    run.wait("left")
    run.wait_gone()
    assert run.reasons() == [] and run.events("signal")[0]["signal"] == "SIGUSR2"
    assert run.check_saved_where_it_stopped() == 15
    assert (state := run.state())["state"] == "stopped" and "timeouts.max" in state["detail"]
    run.submit(short, *ONE, "--partition", "gpu")
    run.check_resumed_at(15)
    run.check_kept(reference())


def _requeue_after_the_end(run: Run, short: str, reference: Callable[[], Run]) -> None:
    """A finished run is over. Where its job could not say so to Slurm, the start that comes finds nothing to do."""
    run.submit(short, *ONE, "--partition", "gpu")
    run.check_kept(reference())
    refused = run.lab.cluster.scontrol("requeue", run.job_id)
    assert refused.returncode != 0 and "disabled" in refused.stderr, refused

    programs = run.lab.root / "deaf"
    programs.mkdir()
    real = shutil.which("scontrol", path=run.lab.env["PATH"])
    (programs / "scontrol").write_text(f"""#!/bin/sh
case "$*" in *Requeue=0*) exit 1;; esac
exec {real} "$@"
""")
    (programs / "scontrol").chmod(0o755)
    again = Run(run.lab, "requeued-after-its-end-again")
    again.submit(short, *ONE, "--partition", "gpu", setup=[f'export PATH={shlex.quote(str(programs))}:"$PATH"'])
    again.check_kept(reference())
    before = [event for event in again.events() if event["event"] != "attempt"]
    assert again.lab.cluster.scontrol("requeue", again.job_id).returncode == 0
    again.release()
    until("the second start has ended", lambda: "finished before: nothing to do" in again.log(), again.report)
    assert (job := again.wait_gone())["JobState"] == "COMPLETED" and job["Restarts"] == "1"
    # Only the batch script has written that it began.
    assert [event for event in again.events() if event["event"] != "attempt"] == before
    assert again.state()["restarts"] == 0
    again.check_kept(reference())


def test_a_job_released_right_after_its_requeue_starts(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slurm gives a job up that starts again on a node within the second in which its last start was killed there."""
    monkeypatch.setenv("SLURM_CONF", lab.env["SLURM_CONF"])
    jobs = [lab.cluster.sbatch("-p", "gpu", "-w", "node1", "--wrap=sleep 600") for _ in range(6)]
    for job in jobs:
        lab.cluster.wait_for(job, JobState="RUNNING")
    for job in jobs:
        requeue_job(job)
        lab.cluster.wait_for(job, JobState="PENDING")
        release_job(job)
        time.sleep(0.15)  # other jobs, other fractions of a second

    def started() -> bool:
        fields = [lab.cluster.job(job) for job in jobs]
        assert not [f for f in fields if f["JobState"] == "FAILED"], fields
        return all((f["JobState"], f["Restarts"]) == ("RUNNING", "1") for f in fields)

    until("all are running again", started)

"""launch/worker: signals before and after the handlers, array tasks, exit statuses of a task."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cifar_hpc.errors import SchedulerError
from cifar_hpc.launch import worker
from cifar_hpc.launch.batch_script import IGNORE_SIGNALS
from cifar_hpc.runs.logs import append_line
from cifar_hpc.runs.paths import RunPaths, SweepPaths, write_points
from cifar_hpc.slurm import client as slurm
from cifar_hpc.training.process import StopFlag

PROJECT = Path(__file__).resolve().parents[2]
LOCAL = {"SUBMITIT_EXECUTOR": "local", "SUBMITIT_LOCAL_JOB_ID": "7", "SUBMITIT_LOCAL_GLOBALID": "0"} | {
    "SUBMITIT_LOCAL_LOCALID": "0", "SUBMITIT_LOCAL_NTASKS": "1", "SUBMITIT_LOCAL_NODEID": "0",
}  # fmt: skip

# A task that gets one signal before its handlers exist and one after.
EARLY_AND_LATE = """
import os, signal, sys
from cifar_hpc.launch import worker
os.kill(os.getpid(), getattr(signal, sys.argv[1]))
def train(paths, stop):
    assert not stop.requested
    os.kill(os.getpid(), getattr(signal, sys.argv[1]))
    return f"{paths.name}: {stop.signal.name}"
worker.train = train
print(worker.Task("/root", "run")())
"""

# A task whose attempt ends with a status; `finished` after the last epoch.
ENDING = """
import atexit, os, signal, sys
from cifar_hpc.launch.worker import Task
from cifar_hpc.training import attempt
class Ending:
    def __init__(self, context):
        self.finished = sys.argv[2] == "finished"
        assert (context.launch.rank, context.launch.world_size, context.launch.job_id) == (0, 1, "7")
        assert context.launch.rendezvous == context.paths.slurm / "rendezvous" / "7-0.json"
    def run(self):
        return int(sys.argv[3])
attempt.Attempt = Ending
atexit.register(print, "interpreter ended")
print(Task(sys.argv[1], "run")())
os.kill(os.getpid(), signal.SIGTERM)
"""


def python(*words: str, before: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    outside = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM", "SUBMITIT"))}
    return subprocess.run(
        [*shlex.split(before), sys.executable, "-c", *words], cwd=PROJECT, env=outside | environment,
        capture_output=True, text=True, timeout=180, check=False,
    )  # fmt: skip


@pytest.mark.process
@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGUSR2"])  # those that Slurm sends by itself
def test_ignore_signals_lets_a_task_live_until_its_handlers_take_over(name: str) -> None:
    done = python(EARLY_AND_LATE, name, before=IGNORE_SIGNALS)
    assert (done.returncode, done.stdout) == (0, f"run: {name}\n"), done.stderr
    assert python(EARLY_AND_LATE, name).returncode == -signal.Signals[name]


@pytest.mark.parametrize(
    ("fields", "requested"),
    [
        ({"JobState": "RUNNING"}, False),
        ({"JobState": "SIGNALING"}, False),
        ({"JobState": "COMPLETING"}, True),
        ({"JobState": "RUNNING", "PreemptTime": "1767225600"}, True),
        (None, False),  # scontrol does not answer
    ],
)
def test_ask_slurm_raises_the_flag_of_a_job_that_already_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fields: dict[str, str] | None, requested: bool
) -> None:
    def job_fields(job_id: str) -> dict[str, str]:
        if fields is None:
            raise SchedulerError("timed out")
        return fields

    monkeypatch.setattr(slurm, "job_fields", job_fields)
    stop, run = StopFlag(), RunPaths(tmp_path, "run")
    worker._ask_slurm("7", run, stop)
    assert stop.requested is requested
    append_line(run.events, '{"event": "attempt", "job_id": "7"}')
    append_line(run.events, '{"event": "requeue_requested", "job_id": "7", "by": "alice"}')
    worker._ask_slurm("7", run, stop := StopFlag())
    assert stop.signal is signal.SIGUSR2  # whose own was ignored by the batch script
    append_line(run.events, '{"event": "attempt", "job_id": "7"}')
    worker._ask_slurm("7", run, stop := StopFlag())
    assert stop.requested is requested  # that was for the start before


def test_array_task_trains_the_run_of_its_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = SweepPaths(tmp_path, "job", 1)
    sweep.create()
    write_points(sweep, ["job-a", "job-b"])
    trained: list[Any] = []
    monkeypatch.setattr(worker, "train", lambda paths, stop: trained.append((paths, slurm.own_job_id())))
    task = worker.Task(str(tmp_path), str(sweep.points))
    monkeypatch.setenv("SLURM_JOB_ID", "5")  # the last task of an array to start has the array's own number
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "5")
    for index in ("0", "1"):
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", index)
        task()
    assert trained == [(RunPaths(tmp_path, "job-a"), "5_0"), (RunPaths(tmp_path, "job-b"), "5_1")]
    for wrong in ("2", "", "-1", "²"):
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", wrong)
        with pytest.raises(SystemExit, match="has 2 points and none of index"):
            task()
    monkeypatch.delenv("SLURM_ARRAY_JOB_ID")
    assert slurm.own_job_id() == "5"


@pytest.mark.process
@pytest.mark.parametrize("status", [0, 1, 143])
def test_train_ends_the_process_at_once_with_the_status_of_an_unfinished_attempt(tmp_path: Path, status: int) -> None:
    frozen(tmp_path)
    done = python(ENDING, str(tmp_path), "left", str(status), **LOCAL)
    assert (done.returncode, done.stdout) == (status, ""), done.stderr


@pytest.mark.process
def test_train_returns_after_the_last_epoch_and_ignores_later_signals(tmp_path: Path) -> None:
    frozen(tmp_path)
    done = python(ENDING, str(tmp_path), "finished", "0", **LOCAL)
    assert (done.returncode, done.stdout) == (0, "run run finished\ninterpreter ended\n"), done.stderr


@pytest.mark.process
@pytest.mark.parametrize(("choice", "seen"), [(None, "0,1"), ("", "None"), ("3", "3"), ("GPU-0123,5", "GPU-0123,5")])
def test_a_local_run_sees_the_gpus_that_its_user_has_chosen(choice: str | None, seen: str) -> None:
    code = "import os\nfrom cifar_hpc.launch import worker\nworker.train = lambda paths, stop: os.environ.get('{}')\n"
    code = code.format(worker.VISIBLE) + "print(worker.Task('/root', 'run')())"
    environment = {} if choice is None else {worker.USERS_CHOICE: choice}
    done = python(code, **environment, **{worker.VISIBLE: "0,1"})  # as submitit sets it
    assert done.stdout == f"{seen}\n", done.stderr


# A task whose attempt ends with the signal that has stopped it.
STOPPED = """
import sys
from cifar_hpc.launch.worker import Task
from cifar_hpc.training import attempt
class Stopped:
    finished = False
    def __init__(self, context):
        self.stop = context.stop
    def run(self):
        return int(self.stop.signal or 0)
attempt.Attempt = Stopped
Task(sys.argv[1], "run")()
"""


@pytest.mark.process
def test_a_local_run_that_was_cancelled_between_two_starts_stops(tmp_path: Path) -> None:
    frozen(tmp_path)
    run = RunPaths(tmp_path, "run")
    for event, job_id, status in (
        ("cancelled", None, 0),  # before this submission
        ("submitted", "7", 0),
        ("started", "7", 0),
        ("cancelled", None, signal.SIGTERM),
        ("submitted", "8", 0),
    ):
        append_line(run.events, json.dumps({"event": event, "job_id": job_id}))
        done = python(STOPPED, str(tmp_path), **LOCAL)
        assert done.returncode == status, done.stderr


@pytest.mark.process
@pytest.mark.parametrize(("spec", "words"), [(None, "spec.yaml is missing"), ("train: [", "not readable as YAML")])
def test_train_refuses_a_run_without_a_readable_spec(tmp_path: Path, spec: str | None, words: str) -> None:
    if spec is not None:
        frozen(tmp_path, spec)
    done = python(ENDING, str(tmp_path), "left", "0", **LOCAL)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and words in done.stderr and "Traceback" not in done.stderr


def frozen(root: Path, text: str = "train: {epochs: 1}") -> None:
    paths = RunPaths(root, "run")
    paths.create()
    paths.spec.write_text(text)

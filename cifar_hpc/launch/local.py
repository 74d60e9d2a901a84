"""Jobs on this machine: a controller process starts runs, a few at a time, through submitit's local executor.

The controller runs from the code snapshot and outlives the terminal and Ctrl-C. It inherits the locks of the
submission, and so holds them even if submit.py is killed. That of a single run ends when the run has started; that of
a sweep stays until all points have ended.
"""

import contextlib
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from cifar_hpc.config.spec import Spec
from cifar_hpc.errors import SchedulerError, UserError
from cifar_hpc.launch.batch_script import record_submitted, warning_seconds
from cifar_hpc.launch.preflight import start_of, why_busy
from cifar_hpc.launch.worker import USERS_CHOICE, VISIBLE, Task
from cifar_hpc.runs.events import Cancelled
from cifar_hpc.runs.frozen_spec import require_frozen
from cifar_hpc.runs.history import History, time_of
from cifar_hpc.runs.lock import RunLock
from cifar_hpc.runs.paths import RunPaths, SweepPaths, read_points
from cifar_hpc.slurm.options import left_out, parse_time
from cifar_hpc.text import printable
from cifar_hpc.training.process import StopFlag, open_streams

POLL_SECONDS = 1.0


def start(folder: RunPaths | SweepPaths, code: Path, locks: Iterable[RunLock], parallel: int) -> str:
    """Start the controller of frozen runs; returns the job id of a run, or for a sweep the controller's process id.

    Args:
        folder: of the run, or of the submission of the sweep.
        locks: those of the submission: the sweep's, if it is one, and that of each run.
        parallel: how many points train at the same time.

    Raises:
        SchedulerError: if the controller ends without an answer; holds the last line of its output.
    """
    log = folder.slurm / "controller.log"
    number = folder.number if isinstance(folder, SweepPaths) else 0
    descriptors = [lock.descriptor for lock in locks if lock.descriptor is not None]
    arguments = [folder.root, folder.name, number, parallel, shlex.join(sys.argv), ",".join(map(str, descriptors))]
    out = left_out(os.environ, here=True)
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "cifar_hpc.launch.local", *map(str, arguments)],
            cwd=code,
            env={name: value for name, value in os.environ.items() if name not in out},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=output,
            pass_fds=descriptors,
            start_new_session=True,
            text=True,
        )
    assert process.stdout is not None
    with process.stdout as answer:
        job_id = answer.read()
    if not job_id:
        process.wait()
        last = log.read_text(errors="replace").strip().splitlines()[-1:]
        raise SchedulerError("the controller of the job did not start: " + " ".join(last))
    process.returncode = 0  # it is not waited for
    return job_id


def run_points(locks: dict[RunPaths, RunLock], parallel: int, command: str, sweep: str | None = None) -> None:
    """Start the points of a sweep while there is room; on SIGTERM stop those that run, and wait until they have ended.

    Args:
        locks: the inherited locks of the runs' submissions; each is released when its run has started.
        command, sweep: command line and folder of the submission, for the event `submitted`.
    """
    stop = StopFlag().install()
    waiting, running, began = list(locks), list[Any](), time.time()
    while (waiting or running) and not stop.requested:
        for run in list(waiting):
            if (time_of(History.read(run.events).last_of(Cancelled)) or 0.0) < began:
                continue
            waiting.remove(run)
            locks[run].release()
        if waiting and len(running) < parallel:
            run = waiting.pop(0)
            running += _start_point(run, command, sweep)
            locks[run].release()
        else:
            running = _poll(running)
    for job in running:
        os.kill(int(job.job_id), signal.SIGTERM)  # submitit passes it to every task: the run saves and ends
    while running:
        running = _poll(running)


def _poll(running: list[Any]) -> list[Any]:
    time.sleep(POLL_SECONDS)
    return [job for job in running if not job.done()]


def _start_point(run: RunPaths, command: str, sweep: str | None) -> list[Any]:
    """[submitit's job] of a point; nothing if it need not or cannot start."""
    try:
        if (reason := why_busy(run, {})) is not None:
            raise UserError(reason)
        spec = require_frozen(run)
        if start_of(run).finished_epochs >= spec.train.epochs:
            return []
        job = start_here(run, spec, command, sweep)
    except (UserError, OSError) as error:
        print(printable(f"{run.name}: not started: {error}"), file=sys.stderr, flush=True)
        return []
    print(f"{run.name}: started as job {job.job_id}", file=sys.stderr, flush=True)
    return [job]


def start_here(run: RunPaths, spec: Spec, command: str, sweep: str | None = None) -> Any:
    """Start a run on this machine from the code snapshot, the current folder, and record it; returns submitit's job.

    Args:
        command, sweep: command line and, of a point, folder of the submission.
    """
    import submitit

    resources = spec.resources
    gpus = 0 if spec.train.device == "cpu" else resources.gpus
    os.environ |= {USERS_CHOICE: os.environ.get(VISIBLE, "")} if gpus else {}
    executor = submitit.LocalExecutor(folder=run.slurm)
    executor.update_parameters(
        timeout_min=parse_time(resources.time) / 60,
        tasks_per_node=resources.ntasks_per_node,
        gpus_per_node=gpus,
        signal_delay_s=warning_seconds(spec),
        stderr_to_stdout=True,
    )
    job = executor.submit(Task(str(run.root), run.name))
    record_submitted(run, job.job_id, "local", Path.cwd(), command, sweep=sweep)
    return job


def main(arguments: Sequence[str]) -> None:
    """Run a controller: ROOT NAME NUMBER PARALLEL COMMAND DESCRIPTORS, as `start` passes them.

    NUMBER is that of a sweep's submission, or 0 for a single run. The answer, a job id, goes to standard output.
    """
    root, name, number, parallel, command, descriptors = arguments
    pipe = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # jobs inherit the log, not the pipe to submit.py
    if number == "0":
        run = RunPaths(Path(root), name)
        return _answer(pipe, start_here(run, require_frozen(run), command).job_id)
    sweep = SweepPaths(Path(root), name, int(number))
    runs = [RunPaths(Path(root), run) for run in read_points(sweep.points)]
    folders = [sweep.sweep, *(run.logs for run in runs)]
    locks = [RunLock(logs / "submit.lock", int(fd)) for logs, fd in zip(folders, descriptors.split(","), strict=True)]
    for lock in locks:
        lock.sign({"pid": os.getpid(), "host": socket.gethostname(), "controller": True})
    _answer(pipe, str(os.getpid()))
    where = str(sweep.logs.relative_to(root))
    run_points(dict(zip(runs, locks[1:], strict=True)), int(parallel), command, where)


def _answer(pipe: int, job_id: str) -> None:
    with contextlib.suppress(BrokenPipeError):  # submit.py was killed; its job runs nevertheless
        os.write(pipe, job_id.encode())
    os.close(pipe)


if __name__ == "__main__":
    open_streams(lossy=True)
    main(sys.argv[1:])

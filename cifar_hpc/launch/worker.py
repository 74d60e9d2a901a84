"""Tasks of a job: the callables that submitit unpickles and calls in every process.

Importing this module is cheap on purpose: signals are handled before anything slow, such as the import of torch. Until
then the batch script ignores them (batch_script.IGNORE_SIGNALS), because Python would die of them and end the job. A
signal that was ignored is found by asking Slurm.
"""

import contextlib
import os
import signal
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

from cifar_hpc.errors import SchedulerError, UserError
from cifar_hpc.runs.events import Cancelled, RequeueRequested
from cifar_hpc.runs.history import History
from cifar_hpc.runs.logs import TrainLog, soon
from cifar_hpc.runs.paths import RunPaths, keep_others_out, run_of_task
from cifar_hpc.runs.requeue import is_stopping
from cifar_hpc.slurm import client
from cifar_hpc.training.process import StopFlag, Stopwatch, open_streams

VISIBLE = "CUDA_VISIBLE_DEVICES"
# What a user has set it to on this machine; empty where it is not set. submitit's local executor counts GPUs from 0.
USERS_CHOICE = "CIFAR_HPC_VISIBLE_DEVICES"


@dataclass(frozen=True)
class Task:
    """Train the run `target` under `root`, or that of this task's index in the sweep's points.json `target`."""

    root: str
    target: str

    def __call__(self) -> str:
        """Train as `train` does."""
        stop = StopFlag().install()
        open_streams(lossy=True)
        if (choice := os.environ.pop(USERS_CHOICE, None)) is not None:
            os.environ.pop(VISIBLE, None)
            os.environ |= {VISIBLE: choice} if choice else {}
        try:
            return train(run_of_task(Path(self.root), self.target), stop)
        except UserError as error:
            sys.exit(f"error: {error}")


def train(paths: RunPaths, stop: StopFlag) -> str:
    """Run one attempt; returns after the last epoch, and otherwise ends the process with the attempt's exit status."""
    startup = Stopwatch()
    keep_others_out()
    job_id = client.own_job_id()
    if job_id and os.environ.get("SLURM_PROCID") == "0":
        threading.Thread(target=_ask_slurm, args=(job_id, paths, stop), name="ask Slurm", daemon=True).start()
    import submitit

    environment = submitit.JobEnvironment()
    loading = soon(TrainLog(paths.train_log, environment.global_rank == 0).line, "loading PyTorch")
    from cifar_hpc.runs.frozen_spec import require_frozen
    from cifar_hpc.training.attempt import Attempt
    from cifar_hpc.training.context import Context
    from cifar_hpc.training.process import Launch

    loading.cancel()
    if environment.cluster != "slurm":
        history = History.read(paths.events)
        if history.last_of(Cancelled) and history.job_id == environment.job_id:
            stop.raise_flag()  # cancelled while submitit's controller was about to start the run again
    spec = require_frozen(paths)
    restart = os.environ.get("SLURM_RESTART_COUNT") or "0"
    launch = Launch(
        rank=environment.global_rank,
        world_size=environment.num_tasks,
        local_rank=environment.local_rank,
        scheduler="slurm" if environment.cluster == "slurm" else "local",
        job_id=environment.job_id,
        rendezvous=paths.slurm / "rendezvous" / f"{environment.job_id}-{restart}.json",
    )
    attempt = Attempt(Context(paths, spec, launch, stop, startup))
    status = attempt.run()
    if not attempt.finished:
        os._exit(status)  # at once: closing process groups can take longer than a grace time
    stop.ignore()
    return f"run {paths.name} finished"


def _ask_slurm(job_id: str, paths: RunPaths, stop: StopFlag) -> None:
    """Raise the flag if a user or Slurm wanted the job to stop before the signal handlers existed."""
    if History.read(paths.events).last_of(RequeueRequested):
        stop.raise_flag(signal.SIGUSR2)
    with contextlib.suppress(SchedulerError):
        if is_stopping(client.job_fields(job_id)):
            stop.raise_flag()

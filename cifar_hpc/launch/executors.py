"""Start jobs: sbatch, and submitit's Slurm and local executors."""

from __future__ import annotations

import contextlib
import io
import shlex
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cifar_hpc.config.site import Site
from cifar_hpc.config.spec import Spec
from cifar_hpc.errors import SchedulerError
from cifar_hpc.launch.batch_script import ARRAY_PICKLE, slurm_executor, warning_seconds
from cifar_hpc.launch.worker import ArrayTask, Task
from cifar_hpc.runs.events import Submitted
from cifar_hpc.runs.logs import TrainLog
from cifar_hpc.runs.paths import RunPaths, SweepPaths
from cifar_hpc.runs.progress import record_event
from cifar_hpc.slurm import client
from cifar_hpc.slurm.options import parse_time

ARRAY_HINT = " HINT: an array has at most MaxArraySize tasks (scontrol show config); submit a larger sweep in parts."


def submit_slurm(
    folder: RunPaths | SweepPaths, spec: Spec, site: Site, code: Path, points: int, parallel: int | None
) -> str:
    """Submit a run, or a sweep's points as one job array, from inside the code snapshot; returns the job id.

    submitit's map_array writes a pickle for each task of an array, under names that it knows only after sbatch. Here
    all tasks share one that exists before: a job whose submission was killed finds all it needs.

    Args:
        spec: for the resources, which all points share.
        parallel: how many points may run at the same time; None is no limit.

    Raises:
        SchedulerError: with sbatch's own words.
    """
    from submitit.core.utils import DelayedSubmission, FailedJobError, FailedSubmissionError

    executor = slurm_executor(folder, spec, site, points, parallel)
    try:
        # submitit prints what it then raises.
        with contextlib.chdir(code), contextlib.redirect_stderr(io.StringIO()):
            if isinstance(folder, RunPaths):
                return str(executor.submit(Task(str(folder.root), folder.name)).job_id)
            DelayedSubmission(ArrayTask(str(folder.root), str(folder.points))).dump(folder.slurm / ARRAY_PICKLE)
            return str(executor._submit_command(executor._submitit_command_str).job_id)
    except (FailedJobError, FailedSubmissionError) as error:
        words = " ".join(str(error).split()) or type(error).__name__
        hint = ARRAY_HINT if isinstance(folder, SweepPaths) and "job array" in words else ""
        raise SchedulerError(f"sbatch refused the job: {words}{hint}") from None


def test_only(script: str) -> str:
    """Answer of `sbatch --test-only` to a batch script: when and where its job would start.

    Raises:
        SchedulerError: with sbatch's own words.
    """
    with _script_file(script) as file:
        return client.command(["sbatch", "--test-only", file], stderr_too=True).strip()


def submit_script(script: str, code: Path) -> str:
    """Submit a batch script from inside `code`; returns the job id.

    Raises:
        SchedulerError: with sbatch's own words.
    """
    with _script_file(script) as file, contextlib.chdir(code):
        try:
            return client.command(["sbatch", "--parsable", file]).strip().partition(";")[0]
        except SchedulerError as error:
            raise SchedulerError(
                f"sbatch refused the job: {str(error).partition(' was refused: ')[2] or error}"
            ) from None


def start_here(run: RunPaths, spec: Spec, command: str) -> Any:
    """Start a run on this machine from the code snapshot, the current folder, and record it; returns submitit's job.

    Args:
        command: command line of the submission.
    """
    import submitit

    resources = spec.resources
    executor = submitit.LocalExecutor(folder=run.slurm)
    executor.update_parameters(
        timeout_min=parse_time(resources.time) / 60,
        tasks_per_node=resources.ntasks_per_node,
        gpus_per_node=0 if spec.train.device == "cpu" else resources.gpus_per_node,
        signal_delay_s=warning_seconds(spec),
        stderr_to_stdout=True,
    )
    job = executor.submit(Task(str(run.root), run.name))
    record_submitted(run, job.job_id, "local", Path.cwd(), command)
    return job


def record_submitted(
    run: RunPaths, job_id: str, scheduler: str, code: Path, command: str | None = None, sweep: str | None = None
) -> None:
    """Append the event `submitted`, and a line to train.log for readers who wait for the start.

    Args:
        code: the code snapshot.
        command: command line of the submission; None is that of this process.
    """
    event = Submitted(scheduler=scheduler, code=code.name, command=command or shlex.join(sys.argv), sweep=sweep)
    record_event(run, event, job_id=job_id, restart=None, world_size=None)
    where = "waits in Slurm's queue; status says why" if scheduler == "slurm" else "starts on this machine"
    TrainLog(run.train_log, enabled=True).line(f"SUBMITTED as job {job_id}: it {where}")


@contextlib.contextmanager
def _script_file(script: str) -> Iterator[str]:
    with tempfile.NamedTemporaryFile("w", suffix=".sh") as file:
        file.write(script)
        file.flush()
        yield file.name

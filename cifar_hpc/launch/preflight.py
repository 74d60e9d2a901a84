"""What is checked on the submitting machine, before anything is queued."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from cifar_hpc.config.spec import Spec
from cifar_hpc.data.image_folder import list_folder
from cifar_hpc.errors import RunBusyError, SchedulerError, SpecError
from cifar_hpc.runs import lock as runlock
from cifar_hpc.runs import queue as run_queue
from cifar_hpc.runs.lock import local_controller
from cifar_hpc.runs.paths import PROJECT, RunPaths
from cifar_hpc.slurm import client as slurm

NVIDIA_DEVICE = Path("/dev/nvidia0")


def check_data(spec: Spec, root: Path) -> None:
    """Make sure that the images are there, so that no job waits for days only to find that they are not.

    Raises:
        SpecError: names what is missing.
    """
    folder = root / spec.data.root
    if spec.data.source == "folder":
        list_folder(folder)
    elif spec.data.source == "cifar10":
        result = subprocess.run(
            [sys.executable, "-m", "cifar_hpc.data.cifar10", str(folder)],
            cwd=PROJECT,
            stderr=subprocess.PIPE,
            stdout=2,  # to standard error: torchvision's download messages; standard output is for the answer
            text=True,
            check=False,
        )
        if result.returncode != 0:
            raise SpecError(result.stderr.strip().splitlines()[-1] if result.stderr.strip() else "data check failed")


def check_local_gpus(spec: Spec) -> None:
    """Refuse a local run that asks for GPUs on a machine that has none.

    Raises:
        SpecError: with the way to ask for the CPU.
    """
    wants_gpu = spec.train.device != "cpu" and (spec.resources.gpus_per_node > 0 or spec.train.device != "auto")
    if wants_gpu and shutil.which("nvidia-smi") is None and not NVIDIA_DEVICE.exists():
        raise SpecError(
            f"train.device: {spec.train.device} with resources.gpus_per_node: {spec.resources.gpus_per_node} asks for "
            "GPUs, and this machine has none. HINT: --set train.device=cpu trains on the CPU; --cluster slurm submits."
        )


def check_free(paths: RunPaths, on_slurm: bool) -> None:
    """At most one writer a run.

    Raises:
        RunBusyError: names the job that is queued for the run or trains it.
    """
    check_free_beside(paths, run_queue.queue(paths.root) if on_slurm else {})


def check_free_beside(paths: RunPaths, jobs: Mapping[str, slurm.QueuedJob]) -> None:
    """`check_free`, where the queue is known.

    Args:
        jobs: as `slurm.queue` returns them.
    """
    owner = runlock.holder(paths.lock)
    if owner is not None:
        raise RunBusyError(f"run {paths.name} is being trained by {runlock.describe(owner)}.")
    job = jobs.get(paths.name)
    if job is not None:
        raise RunBusyError(
            f"run {paths.name} is already in the queue as job {job.job_id} ({job.state}). "
            f"HINT: python -m cifar_hpc cancel {paths.name}"
        )
    controller = local_controller(paths)
    if controller is not None:
        raise RunBusyError(f"run {paths.name} is already running on this machine as job {controller}.")


def on_slurm(cluster: str) -> bool:
    """What --cluster means here.

    Raises:
        SchedulerError: where Slurm was asked for and is not here.
    """
    if cluster == "local":
        return False
    if slurm.answers():
        return True
    if cluster == "slurm":
        reason = "sbatch is not on PATH" if shutil.which("sbatch") is None else "squeue does not answer"
        raise SchedulerError(f"--cluster slurm: {reason}. HINT: is this a login node, is Slurm's module loaded?")
    return False

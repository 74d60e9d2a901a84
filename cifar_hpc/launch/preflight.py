"""Checks on the submitting machine, before anything is queued."""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cifar_hpc.config.spec import DataSpec, Spec
from cifar_hpc.data.sources import check_sizes, source_of, with_size
from cifar_hpc.errors import SchedulerError, SpecError
from cifar_hpc.files import read_regular
from cifar_hpc.runs.events import Finished
from cifar_hpc.runs.history import History
from cifar_hpc.runs.lock import controller_of, describe, holder
from cifar_hpc.runs.paths import RunPaths
from cifar_hpc.runs.progress import DAMAGE
from cifar_hpc.slurm import client
from cifar_hpc.slurm.client import HIDDEN, QueuedJob
from cifar_hpc.text import shown

# Keys of `resources` that mean nothing without Slurm: a job that has them is not trained on a machine without.
SLURM_ONLY = (
    "partition", "account", "qos", "reservation", "constraint", "nodelist", "exclude", "dependency", "sbatch",
)  # fmt: skip
# These, too, but a job that has them may be tried on any machine: only the flags are refused there.
WITHOUT_EFFECT_HERE = ("profile", *SLURM_ONLY, "mem", "comment")
LARGE_BYTES = 4 * 10**9  # of images, about which a submission says how much memory they take
DEVICES = Path("/dev")


def check_data(spec: Spec, root: Path) -> tuple[DataSpec, str | None]:
    """Check that the images exist and fit into the memory, so that no job waits for days and then fails.

    Returns:
        The section data with data.image_size filled in; number and size of the images where they take much memory.

    Raises:
        SpecError: names the missing folder or file, or how much is too much.
    """
    source, resources = source_of(spec.data), spec.resources
    source.fetch(spec.data, root)
    counts = source.check(spec.data, root)
    data = with_size(spec.data, root)
    if counts is None:
        return data, None
    count = sum(check_sizes(data, *counts))
    need = count * 3 * data.size**2
    words = f"{count:,} images of {data.size}x{data.size} pixels, {need / 1e9:,.1f} GB in the memory of each process"
    memory, tasks = _bytes(resources.mem), resources.ntasks_per_node
    if memory is not None and need * tasks > memory:
        each = f", of which a node has {tasks}" if tasks > 1 else ""
        raise SpecError(
            f"resources.mem: {resources.mem} is too little for {words}{each}. HINT: a smaller data.image_size or "
            "data.train_size, or more memory."
        )
    return data, words if need > LARGE_BYTES else None


def _bytes(mem: str | None) -> int | None:
    """Memory as sbatch's --mem gives it; None where that gives all of a node, or cannot be told."""
    found = re.fullmatch(r"([0-9]+)([KMGT]?)B?", (mem or "").upper())
    return int(found[1]) * 1024 ** (1 + "KMGT".index(found[2] or "M")) or None if found else None


def check_this_machine(spec: Spec) -> None:
    """Refuse a run on this machine that asks for several nodes, or for GPUs where there are none.

    Raises:
        SpecError: names the key.
    """
    resources = spec.resources
    if resources.max_nodes > 1:
        raise SpecError(f"resources.nodes: {resources.nodes} needs Slurm; allowed with --cluster local: 1.")
    wants_gpu = spec.train.device != "cpu" and (resources.gpus > 0 or spec.train.device != "auto")
    has_gpu = shutil.which("nvidia-smi") or [*DEVICES.glob("nvidia[0-9]*"), *DEVICES.glob("kfd")]  # kfd: of AMD
    if wants_gpu and not has_gpu:
        raise SpecError(
            f"train.device: {spec.train.device} with resources.gpus_per_node: {resources.gpus_per_node} asks for "
            "GPUs, and this machine has none. HINT: --set train.device=cpu trains on the CPU; --cluster slurm submits."
        )


@dataclass(frozen=True)
class Start:
    """Place from which a run goes on: the newest checkpoint by index.json and the files' sizes; no file is read.

    epoch: epochs before it; None if index.json does not tell.
    processes_before: of the last attempt; None before the first.
    damaged: name of a newer checkpoint that is not what index.json says; None if there is none.
    finished_epochs: of a finished run; 0 for any other.
    """

    step: int = 0
    epoch: int | None = 0
    processes_before: int | None = None
    damaged: str | None = None
    finished_epochs: int = 0


def start_of(paths: RunPaths) -> Start:
    """Find out whether a run is new, goes on, or has finished."""
    try:
        history = History.read(paths.events)
        finished = int(history.last_of(Finished).get("epoch", 0))
    except DAMAGE:
        history, finished = History(), 0
    processes = next((attempt.world_size for attempt in reversed(history.attempts) if attempt.world_size), None)
    folder, damaged = paths.checkpoints, None
    files: list[tuple[int, int | None, int | None, str]]
    try:
        index = json.loads(read_regular(folder / "index.json"))
        listed = {**index["checkpoints"], **({"best.pt": index["best"]} if index["best"] else {})}
        files = [(int(e["step"]), int(e["epoch"]), int(e["bytes"]), name) for name, e in listed.items()]
    except DAMAGE:  # a new run has none; where it is lost or damaged, the names of files tell the step
        files = [(int(path.stem[-8:]), None, None, path.name) for path in folder.glob(f"step_{'[0-9]' * 8}.pt")]
    for step, epoch, size, name in sorted(files, key=lambda file: file[0], reverse=True):
        with contextlib.suppress(OSError):
            if os.access(folder / name, os.R_OK) and size in (None, (folder / name).stat().st_size):
                return Start(step, epoch, processes, damaged, finished)
        damaged = damaged or name
    return Start(0, 0, processes, damaged, finished)


def why_busy(paths: RunPaths, jobs: Mapping[str, QueuedJob | None]) -> str | None:
    """Reason why a run must not be submitted now, since a run has at most one writer; None if there is none.

    Args:
        jobs: by run, as `runs.queue.jobs_of` returns them.
    """
    run = f"run {paths.name} is"
    if owner := holder(paths.lock) or holder(paths.owner):
        return f"{run} being trained by {describe(owner)}."
    job, cancel = jobs.get(paths.name), f"python -m cifar_hpc cancel {paths.name}"
    if job is not None and job.state == HIDDEN:
        hint = f"HINT: ask {job.user}; {cancel} --gone says that it has ended"
        return f"{run} maybe in the queue as job {job.job_id} of {job.user}, which Slurm does not show. {hint}"
    if job is not None:
        whose = f"{job.user}'s job" if job.user else "job"
        hint = f"HINT: {cancel}" if not job.user else f"HINT: ask {job.user} to run {cancel}"
        where = "" if Path(job.directory).is_relative_to(paths.root) else f", which works in {job.directory}"
        return f"{run} already in the queue as {whose} {job.job_id} ({job.state}){where}. {hint}"
    if controller := controller_of(paths, History.read(paths.events)):
        return f"{run} already running on this machine as job {controller}."
    return None


def on_slurm(cluster: str, spec: Spec, flags: dict[str, str]) -> bool:
    """Meaning of --cluster on this machine.

    Args:
        flags: keys of `resources`, and `profile`, that were given for this submission, with the words that gave them.

    Raises:
        SchedulerError: if Slurm is asked for, also by what has a meaning only there, and does not answer.
        SpecError: if a variable would send the job to another cluster, or a flag has no effect without Slurm.
    """
    if cluster == "local" and (unused := [key for key in WITHOUT_EFFECT_HERE if key in flags]):
        raise SpecError(f"{flags[unused[0]]}: has no effect with --cluster local. HINT: leave one of them out.")
    answers = cluster != "local" and client.answers()
    for name in ("SLURM_CLUSTERS", "SBATCH_CLUSTERS") if answers else ():
        value = os.environ.get(name)
        if value and value != client.config().get("ClusterName"):  # some sites name their only cluster
            hint = "HINT: unset it, or submit on a login node of that cluster"
            raise SpecError(f"{name}: {shown(value)} would hide the job from status and cancel. {hint}.")
    meant = {key: f"resources.{key}" for key in SLURM_ONLY if getattr(spec.resources, key)} | flags
    given = [meant[key] for key in WITHOUT_EFFECT_HERE if key in meant]
    if not answers and (cluster == "slurm" or (cluster == "auto" and given)):
        reason = "sbatch is not on PATH" if shutil.which("sbatch") is None else "squeue does not answer"
        what = "--cluster slurm" if cluster == "slurm" else f"{given[0]} needs Slurm"
        hint = "HINT: is this a login node, is Slurm's module loaded? --cluster local trains on this machine."
        raise SchedulerError(f"{what}: {reason}. {hint}")
    return answers

"""The act of submitting: what is checked, frozen and copied before a job exists, and how it is recorded."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cifar_hpc.config.site import Site
from cifar_hpc.config.spec import Spec
from cifar_hpc.errors import RunBusyError
from cifar_hpc.files import read_regular, remove_leftovers, write_atomic
from cifar_hpc.launch import executors as launcher
from cifar_hpc.launch import preflight as checks
from cifar_hpc.launch.snapshot import take_snapshot
from cifar_hpc.runs.events import append_event
from cifar_hpc.runs.frozen_spec import freeze
from cifar_hpc.runs.lock import RunLock
from cifar_hpc.runs.logs import TrainLog, parse_jsonl
from cifar_hpc.runs.paths import RunPaths


def processes(spec: Spec, local: bool) -> tuple[int, int]:
    """(processes at most, threads of each where the spec leaves them open) of a start with these resources."""
    tasks = spec.resources.max_nodes * spec.resources.ntasks_per_node
    share = (os.cpu_count() or 1) // tasks if local else 1
    return tasks, spec.resources.cpus_per_task or max(1, share)


def finished_epochs(paths: RunPaths) -> int:
    """The epochs that a finished run has; 0 for any other."""
    try:
        lines = read_regular(paths.events).split(b"\n")
    except OSError:
        return 0
    # A long run has thousands of events, and a sweep thousands of runs: only lines that may tell are parsed.
    finished = [
        e
        for e in parse_jsonl(b"\n".join(line for line in lines if b"finished" in line))
        if e.get("event") == "finished"
    ]
    return int(finished[-1]["epoch"]) if finished else 0


def send(paths: RunPaths, resolved: Callable[[], Spec], site: Site, on_slurm: bool) -> dict[str, Any]:
    """Check, freeze, snapshot, submit. Nothing of an earlier start is touched before the checks have passed.

    Args:
        resolved: the run's spec as it stands (`freeze.resolve`).

    Returns:
        what submit.py prints.
    """
    spec = resolved()
    if not on_slurm:
        checks.check_local_gpus(spec)
    checks.check_data(spec, paths.root)
    paths.create()
    with one_submission(paths.logs, f"run {paths.name}"):
        checks.check_free(paths, on_slurm)
        remove_leftovers(paths.logs)  # of a submission that was killed
        spec = resolved()  # once more, since another submission may have come before this one
        code = take_snapshot(paths)
        with frozen(paths, spec):
            if on_slurm:
                job_id = launcher.submit_slurm(paths, spec, site, code)
                record(paths, job_id, "slurm", code.name)
            else:
                job_id = launcher.submit_local(paths, spec, code, lambda job: record(paths, job, "local", code.name))
    return {
        "run": paths.name,
        "job_id": job_id,
        "cluster": "slurm" if on_slurm else "local",
        "logs": str(paths.logs),
        "checkpoints": str(paths.checkpoints),
        "tail": f"tail -F {shlex.quote(str(paths.train_log))}",
        "status": f"{python()} status {paths.name}",
        "cancel": f"scancel {job_id}" if on_slurm else f"{python()} cancel {paths.name}",
    }


def record(paths: RunPaths, job_id: str, scheduler: str, code: str, command: str | None = None, **details: Any) -> None:
    """Write the event `submitted`, and a line for whoever watches train.log while nothing runs yet.

    Args:
        command: what the user called; None is this process's own command line.
    """
    append_event(
        paths.events,
        "submitted",
        job_id=job_id,
        restart=None,
        world_size=None,
        scheduler=scheduler,
        code=code,
        command=command or shlex.join(sys.argv),
        **details,
    )
    where = "waits in Slurm's queue; status says why" if scheduler == "slurm" else "starts on this machine"
    TrainLog(paths.train_log, enabled=True).line(f"SUBMITTED as job {job_id}: it {where}")


def python() -> str:
    """The beginning of a command line for people, such as `python -m cifar_hpc`."""
    return f"{shlex.quote(sys.executable)} -m cifar_hpc"


def print_answer(answer: dict[str, Any], as_json: bool, text: str) -> None:
    """Print the answer for programs, or the text for people."""
    print(json.dumps(answer) if as_json else text, flush=True)


@contextlib.contextmanager
def one_submission(logs: Path, what: str, patience_seconds: float = 0.0) -> Iterator[None]:
    """At most one submission at a time of what has its logs there; the kernel ends one that is killed.

    Args:
        patience_seconds: how long to wait for another one.

    Raises:
        RunBusyError: where another process submits `what`.
    """
    lock = RunLock(logs / "submit.lock")
    try:
        lock.acquire({"pid": os.getpid(), "host": socket.gethostname()}, patience_seconds)
    except RunBusyError:
        raise RunBusyError(f"{what} is being submitted by another process right now.") from None
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def frozen(paths: RunPaths, spec: Spec) -> Iterator[None]:
    """Freeze `spec`, since the job may start at once; a refused submission puts back what was frozen before."""
    before = paths.spec.read_bytes() if paths.spec.exists() else None
    freeze(paths, spec)
    try:
        yield
    except Exception:
        put_back(paths, before)
        raise


def put_back(paths: RunPaths, before: bytes | None) -> None:
    """Make logs/<run>/spec.yaml what it was before it was frozen."""
    if before is None:
        paths.spec.unlink(missing_ok=True)
    else:
        write_atomic(paths.spec, before)

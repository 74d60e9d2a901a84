"""The bridge: what submitit unpickles and calls in every task of a job.

Importing this module is cheap on purpose. Signals are taken over before anything slow, such as importing torch, so
that a job that is preempted while it is starting up does not miss it.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from cifar_hpc.errors import UserError
from cifar_hpc.paths import RunPaths
from cifar_hpc.preemption import StopFlag


@dataclass(frozen=True)
class Task:
    """Train the run `name` under `root`; the spec is read from logs/<run>/spec.yaml at every start."""

    root: str
    name: str

    def __call__(self) -> str:
        """Run one task. Returns only after the last epoch; otherwise the process ends with the run's exit status."""
        stop = StopFlag().install()
        import submitit

        from cifar_hpc.context import Context
        from cifar_hpc.distributed import Launch
        from cifar_hpc.freeze import read_frozen
        from cifar_hpc.job import Job

        environment = submitit.JobEnvironment()
        paths = RunPaths(Path(self.root), self.name)
        try:
            spec = read_frozen(paths)
        except UserError as error:
            sys.exit(f"error: {error}")
        if spec is None:
            sys.exit(f"error: {paths.spec} is missing. HINT: submit the run again.")
        attempt = os.environ.get("SLURM_RESTART_COUNT") or "0"
        launch = Launch(
            rank=environment.global_rank,
            world_size=environment.num_tasks,
            local_rank=environment.local_rank,
            scheduler="slurm" if environment.cluster == "slurm" else "local",
            job_id=environment.job_id,
            rendezvous=paths.slurm / "rendezvous" / f"{environment.job_id}-{attempt}.json",
        )
        status = Job(Context(paths, spec, launch, stop)).run()
        if status != 0 or stop.requested:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)  # at once: tearing down process groups can take longer than a grace time
        return f"run {self.name} finished"

"""The spec's resources and the site's wishes as parameters of submitit's executors, and so as options of sbatch."""

from __future__ import annotations

import re
from typing import Any

from cifar_hpc.paths import RunPaths, SweepPaths
from cifar_hpc.sites import Site
from cifar_hpc.slurm_time import parse_time
from cifar_hpc.spec import Spec

# A site may have srun kill the other tasks when one fails; they have yet to say why and to requeue the job (srun(1)).
SRUN_PATIENCE = ("--kill-on-bad-exit=0", "--wait=0")
# Parts of GPUs, asked for in place of whole ones (https://slurm.schedmd.com/gres.html).
INSTEAD_OF_GPUS = {"mps", "shard"}


def slurm_parameters(paths: RunPaths | SweepPaths, spec: Spec, site: Site) -> dict[str, Any]:
    """The spec's resources, but for dependencies, as submitit's parameters; what it has no word for goes as it is."""
    resources = spec.resources
    gpus = 0 if spec.train.device == "cpu" else resources.gpus_per_node
    further = {key: True if value == "true" else value for key, value in resources.sbatch.items() if value != "false"}
    gpu_option = dict([site.gpu_option(gpus)]) if gpus else {}
    given = further.get("gres")
    if isinstance(given, str) and "gres" in gpu_option:
        further["gres"] = _joined_gres(gpu_option["gres"], given)
    plain = {
        **gpu_option,
        "nodes": resources.nodes,
        "time": resources.time,
        "mem": resources.mem,
        "reservation": resources.reservation,
        "requeue" if resources.requeue else "no-requeue": True,
        **further,
    }
    srun = [*SRUN_PATIENCE, *site.srun]
    if resources.cpus_per_task is not None:
        # Since Slurm 22.05 srun no longer takes this over from sbatch (srun(1), --cpus-per-task).
        srun.append(f"--cpus-per-task={resources.cpus_per_task}")
    named = {
        "job_name": paths.job_name,
        "time": -(-parse_time(resources.time) // 60),
        "nodes": resources.max_nodes,
        "ntasks_per_node": resources.ntasks_per_node,
        "cpus_per_task": resources.cpus_per_task,
        "partition": resources.partition,
        "account": resources.account,
        "qos": resources.qos,
        "constraint": resources.constraint,
        "exclude": resources.exclude,
        "nodelist": resources.nodelist,
        "comment": resources.comment,
    }
    return {
        "wckey": None,  # submitit would set its own name
        **{k: in_script(v) for k, v in named.items() if k.replace("_", "-") not in further},
        "signal_delay_s": warning_seconds(spec),
        "stderr_to_stdout": True,
        "setup": list(site.setup) or None,
        "srun_args": srun,
        "additional_parameters": {k: in_script(v) for k, v in plain.items() if v is not None},
    }


def _joined_gres(site: str, given: str) -> str:
    """Both lists of sbatch's --gres as one; what is given takes the place of what the site calls by the same name."""
    names = {_gres_name(item) for item in given.split(",")}
    if names & INSTEAD_OF_GPUS:
        names.add("gpu")
    kept = [] if "none" in names else [item for item in site.split(",") if _gres_name(item) not in names]
    return ",".join([*kept, given])


def _gres_name(item: str) -> str:
    return re.split("[:=]", item.strip().removeprefix("gres/").removeprefix("gres:"))[0]


def in_script(value: Any) -> Any:
    """A value for a line of `#SBATCH`, where sbatch, unlike a shell, takes a backslash within quotes as an escape."""
    return value.replace("\\", "\\\\") if isinstance(value, str) else value


def warning_seconds(spec: Spec) -> int:
    """resources.warning_seconds, or less under a time limit so short that the warning would come at the start."""
    return min(spec.resources.warning_seconds, max(10, parse_time(spec.resources.time) // 4))

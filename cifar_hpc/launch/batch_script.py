"""The batch script of a job: options of sbatch, set-up, the task, the epilog."""

from __future__ import annotations

import re
import shlex
import sys
import uuid
from collections.abc import Sequence
from typing import Any

from cifar_hpc.config.site import Site
from cifar_hpc.config.spec import Spec
from cifar_hpc.runs.paths import RunPaths, SweepPaths
from cifar_hpc.slurm.options import parse_time

# Between a task's first instruction and its handlers, Python would die of a preemption's SIGTERM. See worker.
IGNORE_SIGNALS = """sh -c 'trap "" TERM USR1 USR2; exec "$@"' sh """

ARRAY_PICKLE = "task.pkl"  # what all tasks of an array call


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


def batch_script(paths: RunPaths, spec: Spec, site: Site) -> str:
    """The very text that `submit_slurm` hands to sbatch."""
    executor = _slurm_executor(paths, spec, site)
    text: str = executor._make_submission_file_text(executor._submitit_command_str, uuid.uuid4().hex)
    return text


def array_script(paths: SweepPaths, spec: Spec, site: Site, points: int, parallel: int | None) -> str:
    """The very text that `submit_array` hands to sbatch."""
    executor = _array_executor(paths, spec, site, points, parallel)
    text: str = executor._make_submission_file_text(executor._submitit_command_str, uuid.uuid4().hex)
    return text


def module_script(paths: RunPaths, spec: Spec, site: Site, arguments: Sequence[str]) -> str:
    """A batch script whose tasks run `python -m` with these arguments, started as a run's tasks are."""
    executor = _bare_executor(paths, site)
    executor.update_parameters(**slurm_parameters(paths, spec, site))
    text: str = executor._make_submission_file_text(f"{_python(site)} -u -m {shlex.join(arguments)}", uuid.uuid4().hex)
    return text


def _slurm_executor(paths: RunPaths, spec: Spec, site: Site) -> Any:
    return _executor(paths, site, slurm_parameters(paths, spec, site) | _dependency("singleton", spec))


def _array_executor(paths: SweepPaths, spec: Spec, site: Site, points: int, parallel: int | None) -> Any:
    """A singleton would be of the array, not of the runs: these are held apart by their locks and by `checks`."""
    pickle = f'{shlex.quote(str(paths.slurm))}/"${{SLURM_ARRAY_JOB_ID}}_${{SLURM_ARRAY_TASK_ID}}_submitted.pkl"'
    further = {
        "array_parallelism": parallel or points,
        "setup": [*site.setup, f"ln -sf {ARRAY_PICKLE} {pickle}"],  # where submitit looks for it
    }
    executor = _executor(paths, site, slurm_parameters(paths, spec, site) | _dependency("", spec) | further)
    executor.parameters["map_count"] = points
    return executor


def _dependency(own: str, spec: Spec) -> dict[str, Any]:
    return {"dependency": in_script(",".join(filter(None, (own, spec.resources.dependency))) or None)}


def _executor(paths: RunPaths | SweepPaths, site: Site, parameters: dict[str, Any]) -> Any:
    executor = _bare_executor(paths, site)
    what = paths.name if isinstance(paths, RunPaths) else str(paths.points)
    last = f"{_python(site)} -m cifar_hpc.launch.epilog {shlex.quote(str(paths.root))} {shlex.quote(what)}"
    teardown = [
        "# Where all tasks were killed at once, somebody else has to ask for another try.",
        "status=$?",
        f'[ "$status" -eq 0 ] || {last} "$status"',
        'exit "$status"',
    ]
    executor.update_parameters(**parameters, teardown=teardown)
    return executor


def _bare_executor(paths: RunPaths | SweepPaths, site: Site) -> Any:
    import submitit

    class AnywhereSlurmExecutor(submitit.SlurmExecutor):
        """Builds its script also where there is no srun: a dry run works on a laptop."""

        @classmethod
        def affinity(cls) -> int:
            return 2

    return AnywhereSlurmExecutor(folder=paths.slurm, python=_python(site))


def _python(site: Site) -> str:
    return IGNORE_SIGNALS + (site.python or shlex.quote(sys.executable))

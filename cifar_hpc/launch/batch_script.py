"""Batch script of a job: options of sbatch, set-up, the tasks, the epilog."""

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

# Before a task has installed its handlers, Python would die of a preemption's SIGTERM. See worker.
IGNORE_SIGNALS = """sh -c 'trap "" TERM USR1 USR2; exec "$@"' sh """

ARRAY_PICKLE = "task.pkl"  # callable of all tasks of an array

# By default srun may kill the other tasks when one fails; they still have to log why and to requeue the job (srun(1)).
SRUN_PATIENCE = ("--kill-on-bad-exit=0", "--wait=0")
# Parts of GPUs, requested instead of whole ones (https://slurm.schedmd.com/gres.html).
INSTEAD_OF_GPUS = {"mps", "shard"}
# Resources that submitit has a parameter of the same name for.
SUBMITIT_NAMES = (
    "ntasks_per_node", "cpus_per_task", "partition", "account", "qos", "constraint", "exclude", "nodelist", "comment",
)  # fmt: skip


def slurm_parameters(paths: RunPaths | SweepPaths, spec: Spec, site: Site) -> dict[str, Any]:
    """Convert the spec's resources, except dependencies, to submitit's parameters; other options pass unchanged."""
    resources = spec.resources
    gpus = 0 if spec.train.device == "cpu" else resources.gpus_per_node
    further = {key: True if value == "true" else value for key, value in resources.sbatch.items() if value != "false"}
    gpu_option = dict([site.gpu_option(gpus)]) if gpus else {}
    given = further.get("gres")
    if isinstance(given, str) and "gres" in gpu_option:
        further["gres"] = _joined_gres(gpu_option["gres"], given)
    plain = {
        **gpu_option,
        **{key: getattr(resources, key) for key in ("nodes", "time", "mem", "reservation")},
        "requeue" if resources.requeue else "no-requeue": True,
        **further,
    }
    srun = [*SRUN_PATIENCE, *site.srun]
    if resources.cpus_per_task is not None:
        # Since Slurm 22.05 srun no longer takes this over from sbatch (srun(1), --cpus-per-task).
        srun.append(f"--cpus-per-task={resources.cpus_per_task}")
    named = {
        # The name of an array is no run's: no singleton waits for it.
        "job_name": paths.name if isinstance(paths, RunPaths) else f"{paths.name}:sweep",
        "time": -(-parse_time(resources.time) // 60),
        "nodes": resources.max_nodes,
        **{key: getattr(resources, key) for key in SUBMITIT_NAMES},
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
    """Join two lists of sbatch's --gres; an item of `given` replaces that of the site with the same name."""
    names = {_gres_name(item) for item in given.split(",")}
    if names & INSTEAD_OF_GPUS:
        names.add("gpu")
    kept = [] if "none" in names else [item for item in site.split(",") if _gres_name(item) not in names]
    return ",".join([*kept, given])


def _gres_name(item: str) -> str:
    return re.split("[:=]", item.strip().removeprefix("gres/").removeprefix("gres:"))[0]


def in_script(value: Any) -> Any:
    """Escape backslashes for a line of `#SBATCH`: unlike a shell, sbatch reads them as escapes within quotes."""
    return value.replace("\\", "\\\\") if isinstance(value, str) else value


def warning_seconds(spec: Spec) -> int:
    """resources.warning_seconds, or less if the time limit is so short that the warning would come at the start."""
    return min(spec.resources.warning_seconds, max(10, parse_time(spec.resources.time) // 4))


def batch_script(
    paths: RunPaths | SweepPaths, spec: Spec, site: Site, points: int = 1, parallel: int | None = None
) -> str:
    """Text that `submit_slurm` passes to sbatch."""
    executor = slurm_executor(paths, spec, site, points, parallel)
    return _text(executor, executor._submitit_command_str)


def module_script(paths: RunPaths, spec: Spec, site: Site, arguments: Sequence[str]) -> str:
    """Batch script whose tasks run `python -m` with these arguments, started as a run's tasks are."""
    executor = _bare_executor(paths, site)
    executor.update_parameters(**slurm_parameters(paths, spec, site))
    return _text(executor, f"{_python(site)} -u -m {shlex.join(arguments)}")


def _text(executor: Any, command: str) -> str:
    return str(executor._make_submission_file_text(command, uuid.uuid4().hex))


def slurm_executor(
    paths: RunPaths | SweepPaths, spec: Spec, site: Site, points: int = 1, parallel: int | None = None
) -> Any:
    """submitit's executor of a run, or of a sweep's job array.

    A run's job is a singleton under its name. That of an array would hold back the sweep's next array, not a second
    job of the same run: only the locks and the check of the queue keep a point to one writer.

    Args:
        points: tasks of the array.
        parallel: how many may run at the same time; None is no limit.
    """
    array = isinstance(paths, SweepPaths)
    target = str(paths.points) if isinstance(paths, SweepPaths) else paths.name
    epilog = f"{_python(site)} -m cifar_hpc.launch.epilog {shlex.quote(str(paths.root))} {shlex.quote(target)}"
    dependency = ",".join(filter(None, (None if array else "singleton", spec.resources.dependency)))
    parameters = slurm_parameters(paths, spec, site) | {
        "dependency": in_script(dependency or None),
        "teardown": [
            "# Where all tasks were killed at once, somebody else has to ask for another try.",
            "status=$?",
            f'[ "$status" -eq 0 ] || {epilog} "$status"',
            'exit "$status"',
        ],
    }
    if array:
        pickle = f'{shlex.quote(str(paths.slurm))}/"${{SLURM_ARRAY_JOB_ID}}_${{SLURM_ARRAY_TASK_ID}}_submitted.pkl"'
        parameters["array_parallelism"] = parallel or points
        parameters["setup"] = [*site.setup, f"ln -sf {ARRAY_PICKLE} {pickle}"]  # where submitit looks for it
    executor = _bare_executor(paths, site)
    executor.update_parameters(**parameters)
    if array:
        executor.parameters["map_count"] = points
    return executor


def _bare_executor(paths: RunPaths | SweepPaths, site: Site) -> Any:
    import submitit

    class AnywhereSlurmExecutor(submitit.SlurmExecutor):
        """Executor that needs no srun for its script: a dry run works on a laptop."""

        @classmethod
        def affinity(cls) -> int:
            return 2

    return AnywhereSlurmExecutor(folder=paths.slurm, python=_python(site))


def _python(site: Site) -> str:
    return IGNORE_SIGNALS + (site.python or shlex.quote(sys.executable))

"""Batch script of a job (options of sbatch, set-up, the tasks, the epilog), its submission, and the record of that."""

import contextlib
import io
import os
import re
import shlex
import sys
import tempfile
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cifar_hpc.config.io import Site
from cifar_hpc.config.spec import Spec
from cifar_hpc.errors import SchedulerError
from cifar_hpc.launch.worker import Task
from cifar_hpc.runs.events import Submitted
from cifar_hpc.runs.logs import TrainLog
from cifar_hpc.runs.paths import RunPaths, SweepPaths
from cifar_hpc.runs.progress import record_event
from cifar_hpc.slurm import client
from cifar_hpc.slurm.options import left_out, parse_time

# Before a task has installed its handlers, Python would die of a preemption's SIGTERM. See worker.
IGNORE_SIGNALS = """sh -c 'trap "" TERM USR1 USR2; exec "$@"' sh """

ARRAY_PICKLE = "task.pkl"  # callable of all tasks of an array
ARRAY_HINT = " HINT: an array has at most MaxArraySize tasks (scontrol show config); submit a larger sweep in parts."

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
    further = {key: True if value == "true" else value for key, value in resources.sbatch.items() if value != "false"}
    plain = {
        **site.gpu_option(0 if spec.train.device == "cpu" else resources.gpus_per_node),
        **{key: getattr(resources, key) for key in ("nodes", "time", "mem", "reservation")},
        "requeue" if resources.requeue else "no-requeue": True,
        "signal": f"USR2@{warning_seconds(spec)}",  # submitit's own may be another signal by its variable
        "propagate": "NONE",  # limits are those of the compute nodes, not of this shell (ulimit -S)
    }
    if "gres" in plain and isinstance(further.get("gres"), str):
        further["gres"] = _joined_gres(plain["gres"], str(further["gres"]))
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
        "stderr_to_stdout": True,
        "setup": [*_note_of_left_out(), *site.setup] or None,
        "srun_args": srun,
        "additional_parameters": {k: in_script(v) for k, v in (plain | further).items() if v is not None},
    }


def _note_of_left_out() -> list[str]:
    names = left_out(os.environ)
    return [f"# Not handed on from the environment of the submission: {' '.join(names)}"] if names else []


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
    executor = _executor(paths, site, slurm_parameters(paths, spec, site))
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
    epilog = f"{_python(site)} -m cifar_hpc.launch.epilog {shlex.quote(str(paths.root))} {shlex.quote(_target(paths))}"
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
        parameters["setup"] = [
            *(parameters["setup"] or ()),
            f"ln -sf {ARRAY_PICKLE} {pickle}",
        ]  # where submitit looks for it
    executor = _executor(paths, site, parameters)
    if array:
        executor.parameters["map_count"] = points
    return executor


def _executor(paths: RunPaths | SweepPaths, site: Site, parameters: dict[str, Any]) -> Any:
    import submitit

    class AnywhereSlurmExecutor(submitit.SlurmExecutor):
        """Executor that needs no srun for its script: a dry run works on a laptop."""

        @classmethod
        def affinity(cls) -> int:
            return 2

        def _make_submission_command(self, submission_file_path: Path) -> list[str]:
            command: list[str] = super()._make_submission_command(submission_file_path)
            return ["env", *(f"-u{name}" for name in left_out(os.environ)), *command]

    executor = AnywhereSlurmExecutor(folder=paths.slurm, python=_python(site))
    executor.update_parameters(**parameters)
    return executor


def _python(site: Site) -> str:
    return IGNORE_SIGNALS + (site.python or shlex.quote(sys.executable))


def _target(paths: RunPaths | SweepPaths) -> str:
    """Name of the run, or the path of the sweep's points.json, as `paths.run_of_task` takes them."""
    return paths.name if isinstance(paths, RunPaths) else str(paths.points)


def submit_slurm(
    paths: RunPaths | SweepPaths, spec: Spec, site: Site, code: Path, points: int, parallel: int | None
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

    executor = slurm_executor(paths, spec, site, points, parallel)
    task = Task(str(paths.root), _target(paths))
    try:
        # submitit prints what it then raises.
        with contextlib.chdir(code), contextlib.redirect_stderr(io.StringIO()):
            if isinstance(paths, RunPaths):
                return str(executor.submit(task).job_id)
            DelayedSubmission(task).dump(paths.slurm / ARRAY_PICKLE)
            return str(executor._submit_command(executor._submitit_command_str).job_id)
    except (FailedJobError, FailedSubmissionError) as error:
        words = " ".join(str(error).split()) or type(error).__name__
        hint = ARRAY_HINT if isinstance(paths, SweepPaths) and "job array" in words else ""
        raise SchedulerError(f"sbatch refused the job: {words}{hint}{_unused_hint()}") from None


def sbatch(option: str, script: str) -> str:
    """Pass a batch script to sbatch; returns its answer.

    Args:
        option: --parsable (submit it), or --test-only (when and where would it start?).

    Raises:
        SchedulerError: with sbatch's own words.
    """
    with tempfile.NamedTemporaryFile("w", suffix=".sh") as file:
        file.write(script)
        file.flush()
        try:
            return client.command(["sbatch", option, file.name], stderr_too=option == "--test-only").strip()
        except SchedulerError as error:
            words = str(error).partition(" was refused: ")[2] or error
            raise SchedulerError(f"sbatch refused the job: {words}{_unused_hint()}") from None


def _unused_hint() -> str:
    names = [name for name in left_out(os.environ) if name.startswith("SBATCH_")]
    return f" HINT: {', '.join(names)} of the environment is not used: say it by a flag or in the profile." * bool(
        names
    )


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

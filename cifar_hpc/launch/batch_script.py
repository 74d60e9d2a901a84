"""Batch script of a job (options of sbatch, set-up, the tasks, the epilog), its submission, and the record of that."""

import os
import re
import shlex
import shutil
import sys
import tempfile
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cifar_hpc.config.io import Site
from cifar_hpc.config.spec import CORES_BESIDE_GPU, Spec
from cifar_hpc.errors import DoubtError, SchedulerError
from cifar_hpc.launch.worker import Task
from cifar_hpc.runs.events import Submitted
from cifar_hpc.runs.logs import START_MARK, TrainLog, complain
from cifar_hpc.runs.paths import RunPaths, SweepPaths, read_points
from cifar_hpc.runs.progress import record_event
from cifar_hpc.runs.queue import ANSWER_SECONDS, queue
from cifar_hpc.slurm import client
from cifar_hpc.slurm.options import left_out, parse_time

# A file system may be mounted late. Slurm has gone to /tmp then, where Python finds no package.
FIND_CODE = 'n=180; until cd "$SLURM_SUBMIT_DIR" 2>/dev/null || [ $((n-=1)) -lt 0 ]; do sleep 1; done'
# Before a task has installed its handlers, Python would die of a preemption's SIGTERM. See worker.
IGNORE_SIGNALS = f"""sh -c 'trap "" TERM USR1 USR2; {FIND_CODE}; cd "$SLURM_SUBMIT_DIR" && exec "$@"' sh """
# The begin of a batch script: the start is recorded before anything can fail, as `runs.events.Attempted`. The site's
# setup and the tasks run in a subshell, which may end as it likes: whoever has not called hpc_end calls it at the exit.
BEGIN = Path(__file__).with_suffix(".sh")

PICKLE, SCRIPT = "task.pkl", "submission.sh"  # the callable of all tasks, and the last batch script
LINK = f'ln -s {PICKLE} "$hpc_slurm/${{hpc_job}}_submitted.pkl" 2> /dev/null'  # where submitit looks for it
ARRAY_HINT = " HINT: an array has at most MaxArraySize tasks (scontrol show config); submit a larger sweep in parts."

SBATCH_SECONDS = 180  # sbatch itself tries again for two minutes while slurmctld is busy
# Slurm's own words for a job that it has not taken; after other ones, such as a timeout, the job may exist.
_REFUSED = re.compile(r"sbatch: (error|fatal): ")
LOOK_SECONDS = (0, 2, 4, 8)  # before each look for a job that sbatch may have submitted

# By default srun may kill the other tasks when one fails; they still have to log why and to requeue the job (srun(1)).
SRUN_PATIENCE = ("--kill-on-bad-exit=0", "--wait=0")
# Parts of GPUs, requested instead of whole ones (https://slurm.schedmd.com/gres.html).
INSTEAD_OF_GPUS = {"mps", "shard"}
# Resources that submitit has a parameter of the same name for.
SUBMITIT_NAMES = (
    "ntasks_per_node", "partition", "account", "qos", "constraint", "exclude", "nodelist", "comment",
)  # fmt: skip


def slurm_parameters(paths: RunPaths | SweepPaths, spec: Spec, site: Site) -> dict[str, Any]:
    """Convert the spec's resources, except dependencies, to submitit's parameters; other options pass unchanged."""
    resources = spec.resources
    further = {key: True if value == "true" else value for key, value in resources.sbatch.items() if value != "false"}
    gpus = 0 if spec.train.device == "cpu" else resources.gpus_per_node
    cores = resources.cpus_per_task
    if cores is None and gpus and resources.gpus and "cpus-per-gpu" not in further:
        cores = CORES_BESIDE_GPU  # not in the spec, where train.cpu_threads would follow it
    plain = {
        **site.gpu_option(gpus),
        **{key: getattr(resources, key) for key in ("nodes", "time", "mem", "reservation")},
        "requeue" if resources.requeue else "no-requeue": True,
        "signal": f"USR2@{warning_seconds(spec)}",  # submitit's own may be another signal by its variable
        "propagate": "NONE",  # limits are those of the compute nodes, not of this shell (ulimit -S)
    }
    if "gres" in plain and isinstance(further.get("gres"), str):
        further["gres"] = _joined_gres(plain["gres"], str(further["gres"]))
    srun = [*SRUN_PATIENCE, *site.srun]
    if cores is not None:
        # Since Slurm 22.05 srun no longer takes this over from sbatch (srun(1), --cpus-per-task).
        srun.append(f"--cpus-per-task={cores}")
    named = {
        # The name of an array is no run's: no singleton waits for it.
        "job_name": paths.name if isinstance(paths, RunPaths) else f"{paths.name}:sweep",
        "time": -(-parse_time(resources.time) // 60),
        "nodes": resources.max_nodes,
        **{key: getattr(resources, key) for key in SUBMITIT_NAMES},
        "cpus_per_task": cores,
        # With a '/' the name of a file that lists nodes; sbatch runs in the code snapshot.
        **{k: str(Path(v).absolute()) for k in ("exclude", "nodelist") if "/" in (v := getattr(resources, k) or "")},
    }
    return {
        "wckey": None,  # submitit would set its own name
        **{k: in_script(v) for k, v in named.items() if k.replace("_", "-") not in further},
        "stderr_to_stdout": True,
        "setup": list(site.setup) or None,
        "srun_args": srun,
        "additional_parameters": {k: in_script(v) for k, v in (plain | further).items() if v is not None},
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
    dependency = ",".join(filter(None, (None if array else "singleton", spec.resources.dependency)))
    parameters = slurm_parameters(paths, spec, site)
    parameters |= {
        "dependency": in_script(dependency or None),
        "setup": [
            *_begin(paths, spec, site),
            *(parameters["setup"] or ()),
            "set +eu; trap - ERR DEBUG; unset IFS PYTHONSAFEPATH",
            LINK,
        ],
        "teardown": ["hpc_end $?", ")"],
    }
    if array:
        parameters["array_parallelism"] = parallel or points
    executor = _executor(paths, site, parameters)
    if array:
        executor.parameters["map_count"] = points
    return executor


def _begin(paths: RunPaths | SweepPaths, spec: Spec, site: Site) -> list[str]:
    root, target = shlex.quote(str(paths.root)), shlex.quote(_target(paths))
    run = target
    if isinstance(paths, SweepPaths):  # a line for each name, as write_points writes them
        run = f"""$(sed -n "$((SLURM_ARRAY_TASK_ID + 2))s/[\\",]//gp" {target})"""
    python = site.python or shlex.quote(sys.executable)
    return [
        f"hpc_logs={shlex.quote(str(paths.root / 'logs'))} hpc_slurm={shlex.quote(str(paths.slurm))}",
        f"hpc_limit={spec.failures.max if spec.resources.requeue else 0}",
        f'hpc_epilog() {{ exec {python} -m cifar_hpc.launch.epilog {root} {target} "$1"; }}',
        BEGIN.read_text()
        .strip()
        .replace("FIND_CODE", FIND_CODE)
        .replace("MARK", START_MARK)
        .replace("hpc_run=RUN", f"hpc_run={run}"),  # last, since names may hold the other words
    ]


def _executor(paths: RunPaths | SweepPaths, site: Site, parameters: dict[str, Any]) -> Any:
    import submitit

    class AnywhereSlurmExecutor(submitit.SlurmExecutor):
        """Executor that needs no srun for its script: a dry run works on a laptop."""

        @classmethod
        def affinity(cls) -> int:
            return 2

        def _make_submission_file_text(self, command: str, uid: str) -> str:
            names = left_out(os.environ)
            note = f"# Not handed on from the environment of the submission: {' '.join(names)}\n" if names else ""
            return str(super()._make_submission_file_text(command, uid)).replace("\n", f"\n{note}", 1)

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

    submitit writes the pickle of a task under a name that it knows only after sbatch. Here one exists before: a job
    whose submission was killed, or of which sbatch did not tell, finds all it needs.

    Args:
        spec: for the resources, which all points share.
        parallel: how many points may run at the same time; None is no limit.

    Raises:
        SchedulerError: with sbatch's own words; DoubtError if the job may exist.
    """
    from submitit.core.utils import DelayedSubmission

    DelayedSubmission(Task(str(paths.root), _target(paths))).dump(paths.slurm / PICKLE)
    script = paths.slurm / SCRIPT
    script.write_text(batch_script(paths, spec, site, points, parallel))
    job_id = _job_id(paths, script, code)
    script.rename(script.with_name(f"{job_id}_{SCRIPT}"))
    return job_id


def _job_id(paths: RunPaths | SweepPaths, script: Path, code: Path) -> str:
    """Call sbatch; returns the id of the job, which is looked for in the queue if sbatch does not tell."""
    try:
        answer = client.command(["sbatch", str(script)], SBATCH_SECONDS, folder=code)
    except SchedulerError as error:
        words = "; ".join(str(error).partition(" was refused: ")[2].splitlines()) or str(error)
        if shutil.which("sbatch") is None or (_REFUSED.search(words) and not client.NO_CONTACT.search(words)):
            hint = ARRAY_HINT if isinstance(paths, SweepPaths) and "job array" in words else ""
            raise SchedulerError(f"sbatch refused the job: {words}{hint}{_unused_hint()}") from None
    else:
        # Sites print lines of their own around it. A job "on cluster X" may be out of sight.
        ids = set(re.findall(r"^Submitted batch job ([0-9]+)\s*$", answer, re.MULTILINE))
        if len(ids) == 1:
            return str(ids.pop())
        words = f"it printed {' '.join(answer.split())[:500] or 'nothing'}"
    names = {paths.name} if isinstance(paths, RunPaths) else set(read_points(paths.points))
    for seconds in LOOK_SECONDS:
        time.sleep(seconds)
        try:
            jobs, silent = queue(paths.root, ANSWER_SECONDS), ""
        except SchedulerError as error:
            jobs, silent = {}, f"{error} "
        if found := [int(jobs[name].job_id.partition("_")[0]) for name in names & jobs.keys()]:
            complain(f"sbatch did not tell the job's number ({words}); by the queue it is {max(found)}")
            return str(max(found))
    if silent or " on cluster " in words:
        hint = f"HINT: see squeue later, and leave {paths.logs} as it is. The same submission looks for the job first."
        raise DoubtError(f"maybe submitted: sbatch did not tell the job's number ({words}). {silent}{hint}")
    raise SchedulerError(f"sbatch submitted no job, by the queue: {words}")


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
    names = ", ".join(name for name in left_out(os.environ) if name.startswith("SBATCH_"))
    return f" HINT: {names} of the environment is not used: say it by a flag or in the profile." if names else ""


def record_submitted(
    run: RunPaths, job_id: str, scheduler: str, code: Path, command: str | None = None, sweep: str | None = None
) -> None:
    """Append the event `submitted`, and a line to train.log for readers who wait for the start.

    Args:
        code: the code snapshot.
        command: command line of the submission; None is that of this process.
    """
    command = command or shlex.join(sys.argv)
    cluster = (client.cluster_name() or None) if scheduler == "slurm" else None
    event = Submitted(
        scheduler=scheduler, code=code.name, command=command, sweep=sweep, user=client.user_name(), cluster=cluster
    )
    record_event(run, event, job_id=job_id, restart=None, world_size=None)
    where = "waits in Slurm's queue; status says why" if scheduler == "slurm" else "starts on this machine"
    TrainLog(run.train_log, enabled=True).line(f"SUBMITTED as job {job_id}: it {where}")

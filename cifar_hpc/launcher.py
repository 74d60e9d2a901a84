"""From a frozen spec to a job, through submitit's Slurm and local executors."""

from __future__ import annotations

import contextlib
import io
import os
import shlex
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cifar_hpc import slurm
from cifar_hpc.errors import SchedulerError, SpecError
from cifar_hpc.paths import RunPaths
from cifar_hpc.sites import Site
from cifar_hpc.slurm_time import parse_time
from cifar_hpc.spec import Spec
from cifar_hpc.worker import Task

# Between a task's first instruction and its handlers, Python would die of a preemption's SIGTERM. See worker.
IGNORE_SIGNALS = """sh -c 'trap "" TERM USR1 USR2; exec "$@"' sh """
# A site may have srun kill the other tasks when one fails; they have yet to say why and to requeue the job (srun(1)).
SRUN_PATIENCE = ("--kill-on-bad-exit=0", "--wait=0")


def batch_script(paths: RunPaths, spec: Spec, site: Site) -> str:
    """The very text that `submit_slurm` hands to sbatch."""
    executor = _slurm_executor(paths, spec, site)
    text: str = executor._make_submission_file_text(executor._submitit_command_str, uuid.uuid4().hex)
    return text


def submit_slurm(paths: RunPaths, spec: Spec, site: Site, code: Path) -> str:
    """Submit to Slurm from inside the code snapshot; returns the job id.

    Raises:
        SchedulerError: with sbatch's own words.
    """
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    executor = _slurm_executor(paths, spec, site)
    with contextlib.chdir(code), _tidy_on_failure(paths.slurm):
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # submitit prints what it then raises
                job_id: str = executor.submit(Task(str(paths.root), paths.name)).job_id
        except (FailedJobError, FailedSubmissionError) as error:
            raise SchedulerError(f"sbatch refused the job: {_words(error)}") from None
    return job_id


def test_only(paths: RunPaths, spec: Spec, site: Site) -> str:
    """What `sbatch --test-only` says about the job: when and where it would start.

    Raises:
        SchedulerError: with sbatch's own words.
    """
    with tempfile.NamedTemporaryFile("w", suffix=".sh") as script:
        script.write(batch_script(paths, spec, site))
        script.flush()
        return slurm.command(["sbatch", "--test-only", script.name], stderr_too=True).strip()


def submit_local(paths: RunPaths, spec: Spec, code: Path, record: Callable[[str], None]) -> str:
    """Start the run on this machine through submitit's local executor; returns its controller's process id.

    The controller is started from a session of its own and writes to a file, so that neither Ctrl-C nor a closed
    terminal or pipe reaches it.

    Args:
        record: told that id in the new session, so that also a start whose submission was killed is recorded.

    Raises:
        SpecError: where more than one node was asked for.
    """
    if spec.resources.max_nodes > 1:
        raise SpecError(f"resources.nodes: {spec.resources.nodes} needs Slurm; allowed with --cluster local: 1.")
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.setsid()
            _redirect(paths.slurm / "controller.log")
            job_id = _start_local(paths, spec, code)
            record(job_id)
            os.write(writer, job_id.encode())
            status = 0
        finally:
            os._exit(status)
    os.close(writer)
    with os.fdopen(reader) as answer:
        job_id = answer.read()
    os.waitpid(pid, 0)
    if not job_id:
        raise SchedulerError(f"submitit's local executor did not start; see {paths.slurm / 'controller.log'}.")
    return job_id


def _start_local(paths: RunPaths, spec: Spec, code: Path) -> str:
    import submitit

    resources = spec.resources
    executor = submitit.LocalExecutor(folder=paths.slurm)
    executor.update_parameters(
        timeout_min=parse_time(resources.time) / 60,
        tasks_per_node=resources.ntasks_per_node,
        gpus_per_node=0 if spec.train.device == "cpu" else resources.gpus_per_node,
        signal_delay_s=_warning_seconds(spec),
        stderr_to_stdout=True,
    )
    with contextlib.chdir(code):
        job_id: str = executor.submit(Task(str(paths.root), paths.name)).job_id
    return job_id


def _slurm_executor(paths: RunPaths, spec: Spec, site: Site) -> Any:
    import submitit

    class AnywhereSlurmExecutor(submitit.SlurmExecutor):
        """Builds its script also where there is no srun: a dry run works on a laptop."""

        @classmethod
        def affinity(cls) -> int:
            return 2

    executor = AnywhereSlurmExecutor(
        folder=paths.slurm, python=IGNORE_SIGNALS + (site.python or shlex.quote(sys.executable))
    )
    executor.update_parameters(**slurm_parameters(paths, spec, site))
    return executor


def slurm_parameters(paths: RunPaths, spec: Spec, site: Site) -> dict[str, Any]:
    """The spec's resources as submitit's parameters. What submitit has no word for goes through as it is."""
    resources = spec.resources
    gpus = 0 if spec.train.device == "cpu" else resources.gpus_per_node
    others = [resources.dependency] if resources.dependency else []
    further = {key: True if value == "true" else value for key, value in resources.sbatch.items() if value != "false"}
    plain = {
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
        "job_name": paths.name,
        "time": -(-parse_time(resources.time) // 60),
        "nodes": resources.max_nodes,
        "ntasks_per_node": resources.ntasks_per_node,
        "gpus_per_node": gpus or None,
        "cpus_per_task": resources.cpus_per_task,
        "partition": resources.partition,
        "account": resources.account,
        "qos": resources.qos,
        "constraint": resources.constraint,
        "exclude": resources.exclude,
        "nodelist": resources.nodelist,
        "comment": resources.comment,
        "dependency": ",".join(["singleton", *others]),
    }
    return {
        "wckey": None,  # submitit would set its own name
        **{k: _in_script(v) for k, v in named.items() if k.replace("_", "-") not in further},
        "signal_delay_s": _warning_seconds(spec),
        "stderr_to_stdout": True,
        "setup": list(site.setup) or None,
        "srun_args": srun,
        "additional_parameters": {k: _in_script(v) for k, v in plain.items() if v is not None},
    }


def _in_script(value: Any) -> Any:
    """A value for a line of `#SBATCH`, where sbatch, unlike a shell, takes a backslash within quotes as an escape."""
    return value.replace("\\", "\\\\") if isinstance(value, str) else value


def _warning_seconds(spec: Spec) -> int:
    """resources.warning_seconds, or less under a time limit so short that the warning would come at the start."""
    return min(spec.resources.warning_seconds, max(10, parse_time(spec.resources.time) // 4))


@contextlib.contextmanager
def _tidy_on_failure(folder: Path) -> Iterator[None]:
    """Remove what a refused submission has left in submitit's folder."""
    before = set(folder.iterdir()) if folder.exists() else set()
    try:
        yield
    except BaseException:
        for path in set(folder.iterdir()) - before:
            path.unlink(missing_ok=True)
        raise


def _redirect(path: Path) -> None:
    nothing = os.open(os.devnull, os.O_RDONLY)
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for source, target in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    sys.stdout.flush()


def _words(error: Exception) -> str:
    """sbatch's own message, on one line."""
    return " ".join(str(error).split()) or type(error).__name__

"""From a frozen spec to a job, through submitit's Slurm and local executors."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

from cifar_hpc.config.site import Site
from cifar_hpc.config.spec import Spec
from cifar_hpc.errors import SchedulerError, SpecError
from cifar_hpc.launch.batch_script import ARRAY_PICKLE, _array_executor, _slurm_executor, warning_seconds
from cifar_hpc.launch.worker import ArrayTask, Task
from cifar_hpc.runs.paths import RunPaths, SweepPaths
from cifar_hpc.slurm import client as slurm
from cifar_hpc.slurm.options import parse_time

ARRAY_HINT = " HINT: an array has at most MaxArraySize tasks (scontrol show config); submit a larger sweep in parts."


def submit_slurm(paths: RunPaths, spec: Spec, site: Site, code: Path) -> str:
    """Submit to Slurm from inside the code snapshot; returns the job id.

    Raises:
        SchedulerError: with sbatch's own words.
    """
    executor = _slurm_executor(paths, spec, site)
    with contextlib.chdir(code), _tidy_on_failure(paths.slurm), _refusals():
        job_id: str = executor.submit(Task(str(paths.root), paths.name)).job_id
    return job_id


def submit_array(paths: SweepPaths, spec: Spec, site: Site, code: Path, points: int, parallel: int | None) -> str:
    """Submit a sweep's points as one job array from inside the code snapshot; returns the array's job id.

    submitit's map_array writes a pickle for each task, under names that it knows only after sbatch. Here all tasks
    share one, which is there before: a job whose submission was killed finds all it needs.

    Args:
        spec: of any of the points, for the resources that they share.
        parallel: how many points may run at the same time; None is no limit.

    Raises:
        SchedulerError: with sbatch's own words.
    """
    from submitit.core.utils import DelayedSubmission

    executor = _array_executor(paths, spec, site, points, parallel)
    DelayedSubmission(ArrayTask(str(paths.root), str(paths.points))).dump(paths.slurm / ARRAY_PICKLE)
    with contextlib.chdir(code), _refusals(ARRAY_HINT):
        job_id: str = executor._submit_command(executor._submitit_command_str).job_id
    return job_id


def test_only(script: str) -> str:
    """What `sbatch --test-only` says about a batch script: when and where its job would start.

    Raises:
        SchedulerError: with sbatch's own words.
    """
    with tempfile.NamedTemporaryFile("w", suffix=".sh") as file:
        file.write(script)
        file.flush()
        return slurm.command(["sbatch", "--test-only", file.name], stderr_too=True).strip()


def submit_script(script: str, code: Path) -> str:
    """Submit a batch script from inside `code`; returns the job id.

    Raises:
        SchedulerError: with sbatch's own words.
    """
    with tempfile.NamedTemporaryFile("w", suffix=".sh") as file, contextlib.chdir(code):
        file.write(script)
        file.flush()
        try:
            return slurm.command(["sbatch", "--parsable", file.name]).strip().partition(";")[0]
        except SchedulerError as error:
            raise SchedulerError(
                f"sbatch refused the job: {str(error).partition(' was refused: ')[2] or error}"
            ) from None


def submit_local(paths: RunPaths, spec: Spec, code: Path, record: Callable[[str], None]) -> str:
    """Start the run on this machine through submitit's local executor; returns its controller's process id.

    The controller is started from a session of its own and writes to a file, so that neither Ctrl-C nor a closed
    terminal or pipe reaches it.

    Args:
        record: told that id in the new session, so that also a start whose submission was killed is recorded.

    Raises:
        SpecError: where more than one node was asked for.
    """
    check_one_node(spec)
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
        except BaseException:
            os.write(2, traceback.format_exc().encode(errors="backslashreplace"))  # controller.log
        finally:
            os._exit(status)
    os.close(writer)
    with os.fdopen(reader) as answer:
        job_id = answer.read()
    os.waitpid(pid, 0)
    if not job_id:
        raise SchedulerError(f"submitit's local executor did not start; see {paths.slurm / 'controller.log'}.")
    return job_id


def check_one_node(spec: Spec) -> None:
    """Refuse a local run on several nodes.

    Raises:
        SpecError: names the key.
    """
    if spec.resources.max_nodes > 1:
        raise SpecError(f"resources.nodes: {spec.resources.nodes} needs Slurm; allowed with --cluster local: 1.")


def _start_local(paths: RunPaths, spec: Spec, code: Path) -> str:
    import submitit

    resources = spec.resources
    executor = submitit.LocalExecutor(folder=paths.slurm)
    executor.update_parameters(
        timeout_min=parse_time(resources.time) / 60,
        tasks_per_node=resources.ntasks_per_node,
        gpus_per_node=0 if spec.train.device == "cpu" else resources.gpus_per_node,
        signal_delay_s=warning_seconds(spec),
        stderr_to_stdout=True,
    )
    with contextlib.chdir(code):
        job_id: str = executor.submit(Task(str(paths.root), paths.name)).job_id
    return job_id


@contextlib.contextmanager
def _refusals(array_hint: str = "") -> Iterator[None]:
    """What sbatch has refused, in its own words."""
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    try:
        with contextlib.redirect_stderr(io.StringIO()):  # submitit prints what it then raises
            yield
    except (FailedJobError, FailedSubmissionError) as error:
        words = _words(error)
        hint = array_hint if "job array" in words else ""
        raise SchedulerError(f"sbatch refused the job: {words}{hint}") from None


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

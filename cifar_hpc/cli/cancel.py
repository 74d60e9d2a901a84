"""python -m cifar_hpc cancel: cancel the jobs of runs.

The job gets SIGTERM, saves, and is not requeued; a waiting one is taken out of
the queue, also out of a sweep's job array. The same submission again goes on
from the checkpoint. One run that cannot be cancelled does not keep the others
from it; the exit status is the worst one.
"""

import argparse
import contextlib
import signal
import sys
from collections.abc import Callable, Mapping, Sequence

from cifar_hpc.errors import DoubtError, SchedulerError, SpecError, UserError, explain
from cifar_hpc.runs.events import Cancelled
from cifar_hpc.runs.history import History
from cifar_hpc.runs.lock import controller_of, holder, signal_local, waits_here
from cifar_hpc.runs.logs import TrainLog
from cifar_hpc.runs.paths import RunPaths, find_run, find_runs, is_pattern, project_root
from cifar_hpc.runs.progress import record_event
from cifar_hpc.runs.queue import jobs_of
from cifar_hpc.runs.requeue import ALIVE
from cifar_hpc.slurm import client
from cifar_hpc.slurm.client import HIDDEN, ON_CLUSTER, QueuedJob
from cifar_hpc.text import counted, printable

EXAMPLES = ("improved_resnet-1a2b3c4d", "improved_resnet-1a", "'dropout-*' --yes")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_runs(parser)
    text = "only record that its job has ended: of another user, whose jobs Slurm does not show"
    parser.add_argument("--gone", action="store_true", help=text)


def add_runs(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that `choose` reads."""
    text = "names, their unique beginnings, or patterns such as 'dropout-*'"
    parser.add_argument("runs", metavar="RUN", nargs="+", help=text)
    parser.add_argument("--yes", action="store_true", help="do not ask where a pattern means several runs")


def choose(arguments: argparse.Namespace, verb: str) -> tuple[list[RunPaths], Mapping[str, QueuedJob | None]]:
    """Runs that `arguments` name, and their jobs; of those that match a pattern only the ones that are under way.

    Raises:
        SpecError: no run is meant, or several by a pattern and the user does not agree.
    """
    root, texts = project_root(), arguments.runs
    found = find_runs(root, texts)
    jobs = jobs_of(found)
    named = {find_run(root, text).name for text in texts if not is_pattern(text)}
    others = [run for run in found if run.name not in named]
    past = {run: History.read(run.events) for run in found}
    waiting = [run for run in found if verb == "cancel" and waits_here(run, past[run])]
    matching = [r for r in others if jobs.get(r.name) or holder(r.lock) or controller_of(r, past[r]) or r in waiting]
    patterns = ", ".join(filter(is_pattern, texts))
    if not named and not matching:
        raise SpecError(
            f"{patterns}: {counted(len(found), 'run')}, of which none has a job in the queue or a process here."
        )
    if len(matching) > 1 and not arguments.yes:
        question = f"{patterns} means {len(matching)} runs:" + "".join(f"\n  {run.name}" for run in matching)
        if asks := sys.stdin.isatty():
            print(f"{question}\n{verb} all of them? [y/N] ", end="", flush=True)
        if not asks or sys.stdin.readline().strip().lower() not in ("y", "yes"):
            raise SpecError(
                f"{'' if asks else question}\nnothing was changed. HINT: --yes, to {verb} all of them.".strip()
            )
    chosen = [run for run in found if run.name in named or run in matching]
    return sorted(chosen, key=lambda run: run not in waiting), jobs  # else one could begin as another one ends


def each(runs: Sequence[RunPaths], act: Callable[[RunPaths], None]) -> int:
    """Act on every run, whatever becomes of the others; returns the worst exit status."""
    worst = 0
    for run in runs:
        try:
            act(run)
        except (UserError, OSError) as error:
            message, status = explain(error)
            whose = f"{run.name}: " * (run.name not in message and len(runs) > 1)
            print(printable(f"error: {whose}{message}"), file=sys.stderr)
            worst = max(worst, status)
    return worst


def main(arguments: argparse.Namespace) -> int:
    """Cancel the jobs of runs. A running one saves a checkpoint first, from which its run goes on when resubmitted."""
    runs, jobs = choose(arguments, "cancel")
    own = [job.job_id for run in runs if (job := jobs.get(run.name)) and not job.user]
    sent = False
    if len(own) > 1 and not arguments.gone:
        with contextlib.suppress(SchedulerError):  # one by one then, which tells whose job it was
            client.cancel_job(*own)
            sent = True
    status = each(runs, lambda run: _cancel(run, jobs.get(run.name), arguments.gone, sent))
    with contextlib.suppress(SchedulerError):
        _cancel_second_jobs(runs, jobs)
    return status


def _cancel_second_jobs(runs: Sequence[RunPaths], jobs: Mapping[str, QueuedJob | None]) -> None:
    """Cancel the jobs that runs had beside `jobs`: older ones, which somebody has requeued by hand."""
    known = {run.name: job.job_id for run in runs if (job := jobs.get(run.name)) and not job.user}
    for name, job in jobs_of([run for run in runs if run.name in known]).items():
        if name in known and job and job.job_id != known[name] and (job.waits or job.state in ALIVE):
            client.cancel_job(job.job_id)
            print(f"job {job.job_id} of the same run is cancelled, too")


def _cancel(paths: RunPaths, job: QueuedJob | None, gone: bool, sent: bool) -> None:
    """Cancel one run.

    Args:
        gone: only record it.
        sent: Slurm has taken the request for all of this user's jobs already.
    """
    run, user = paths.name, client.user_name()
    if gone:
        if job is None or job.state != HIDDEN:
            what = f"job {job.job_id} is in the queue" if job else "nothing is unknown about its job"
            raise SpecError(f"--gone: {run}: {what}. HINT: leave --gone out.")
        print(f"job {job.job_id} is recorded as ended; submit again to go on")
    elif job is not None:
        if job.user or not sent:
            _cancel_job(paths, job)
        print(f"job {job.job_id} is cancelled; submit again to go on")
    elif signal_local(paths, signal.SIGTERM):
        print(f"run {run} saves a checkpoint and stops; submit again to go on")
    elif waits_here(paths, History.read(paths.events)):
        print(f"run {run} does not start; submit again to train it")
    else:
        raise SpecError(f"{run}: has no job in the queue and no process here; there is nothing to cancel.")
    TrainLog(paths.train_log, enabled=True).line(f"CANCELLED by {user}; submit again to go on")
    record_event(paths, Cancelled(by=user), job_id=job.job_id if job else None, restart=None, world_size=None)


def _cancel_job(paths: RunPaths, job: QueuedJob) -> None:
    """Cancel a job; scancel's word that it failed is checked with the queue.

    Raises:
        SchedulerError: Slurm refused; DoubtError if that is not known.
    """
    try:
        if ON_CLUSTER in job.user:  # here its number may be another job's
            raise SchedulerError(f"job {job.job_id} is not this cluster's.")
        return client.cancel_job(job.job_id)
    except SchedulerError as refusal:
        if job.user:
            hint = f"HINT: ask {job.user}, whose job it is"
            hint += "; with --gone it is recorded as ended" if job.state == HIDDEN else ""
            raise SchedulerError(f"{refusal} {hint}.") from None
        try:
            now = jobs_of([paths]).get(paths.name)
        except SchedulerError:
            hint = "HINT: see status, and cancel again if it is still there."
            raise DoubtError(f"maybe cancelled: {refusal} {hint}") from None
        if now is not None and (now.waits or now.state in ALIVE):
            raise  # else it is gone or about to end

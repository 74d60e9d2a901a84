"""Submit a preemptible, resumable training run to Slurm, or start it on this
machine. Prints the job id, the run's name and folders, and the commands that
watch and cancel it.

JOB.yaml says what to train, the site profile where it runs; --set and the
flags below come last. The run's name is made from what differs from the
defaults, so the same submission continues the same run, which has one job at a
time. The code is copied: editing it does not change a queued job.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import shlex
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cifar_hpc.cli.parser import SEVERAL, Parser, job_file, note, run_command
from cifar_hpc.errors import RunBusyError, SchedulerError, SpecError, UserError

if TYPE_CHECKING:
    from cifar_hpc.config.spec import Spec
    from cifar_hpc.config.sweep import Point
    from cifar_hpc.launch.preflight import Start
    from cifar_hpc.launch.submit import Order, Submission
    from cifar_hpc.runs.paths import RunPaths

DEFAULT_JOB = Path(__file__).resolve().parents[2] / "jobs" / "improved_resnet.yaml"
SHOWN_REASONS = 3
Answer = dict[str, Any]  # for --json

# Keys of `resources` that have a flag: (key, metavar, help).
RESOURCE_FLAGS = (
    ("partition", "P", "partition (leave out where a site's router chooses)"),
    ("account", "A", "account to charge"),
    ("qos", "Q", "quality of service"),
    ("time", "T", "time limit: minutes, MM:SS, HH:MM:SS, D-HH, D-HH:MM, D-HH:MM:SS or UNLIMITED"),
    ("nodes", "N|MIN-MAX", "nodes; a range or a list such as 1,2,4 lets Slurm choose, the weights do not depend on it"),
    ("gpus_per_node", "[TYPE:]G", "GPUs, and so ranks, on each node"),
    ("tasks_per_node", "N", "ranks (processes that train together) on each node; default: one a GPU, or 1"),
    ("cpus_per_task", "C", "CPU cores of each rank (default: 4 with GPUs)"),
    ("mem", "M", "memory of a node, such as 32G"),
    ("constraint", "F", "node features"),
    ("exclude", "L", "nodes to avoid"),
    ("nodelist", "L", "nodes to use"),
    ("reservation", "R", "reservation"),
    ("dependency", "D", "further dependencies, beside singleton"),
    ("comment", "S", "comment; some sites read wishes from it, such as preemption=yes;requeue=true"),
)

EPILOG = """examples:
  python submit.py --partition gpu              train jobs/improved_resnet.yaml
  python submit.py --partition gpu --nodes 1-2 --gpus-per-node 4 --time 1-00
  python submit.py jobs/demo.yaml --cluster local         train on this machine
  python submit.py --set train.seed=1 optimizer.lr=0.1 --dry-run
  python submit.py --partition gpu --test-only            when would it start?
  python submit.py --partition cpu --set train.device=cpu --ntasks-per-node 8
  python submit.py --profile nyu-torch --account mine     a site's own settings
  python submit.py --partition gpu --sbatch mail-type=END mail-user=me@uni.edu
  python submit.py jobs/sweeps/dropout.yaml     all its runs, as one job array
Submitting the same again continues the run from its last checkpoint; of a
sweep, the runs that have not finished.

exit status: 0 submitted (with --follow: finished), 1 run failed, 2 bad spec or
arguments, 3 the scheduler refused, 4 the run is already queued or running
"""


def build_parser() -> argparse.ArgumentParser:
    """The arguments of submit.py."""
    form = argparse.RawDescriptionHelpFormatter
    parser = Parser("submit.py", description=__doc__, epilog=EPILOG, formatter_class=form)
    parser.set_defaults(main=_named_by_flags)
    parser.add_argument("job", metavar="JOB.yaml", nargs="?", help="what to train (default: jobs/improved_resnet.yaml)")
    text = "override keys of the job, such as train.epochs=10"
    parser.add_argument("--set", metavar="KEY.PATH=VALUE", dest="overrides", help=text, **SEVERAL)
    text = "the run's name (default: JOB and a hash of what it changes); of a sweep, in place of JOB"
    parser.add_argument("--name", metavar="RUN", help=text)
    where = parser.add_argument_group("where")
    where.add_argument("--cluster", choices=("auto", "slurm", "local"), default="auto", help="auto: Slurm where it is")
    where.add_argument("--profile", metavar="NAME", help="site profile in slurm/clusters (default: default)")
    for key, metavar, text in RESOURCE_FLAGS:
        where.add_argument(_flag(key), dest=key, metavar=metavar, help=text)
    text = "any other options of sbatch, by their long names"
    where.add_argument("--sbatch", metavar="KEY=VALUE", help=text, **SEVERAL)
    where.add_argument("--no-requeue", action="store_true", help="never requeue the job; submit again to go on")
    how = parser.add_argument_group("how")
    one = how.add_mutually_exclusive_group()
    one.add_argument("--dry-run", action="store_true", help="print the batch script that would be sent; change nothing")
    one.add_argument("--test-only", action="store_true", help="ask Slurm when the job would start; submit nothing")
    text = "follow train.log until the run ends; Ctrl-C leaves it running"
    one.add_argument("--follow", action="store_true", help=text)
    text = "print the answer as one JSON object; of --follow, the log goes to standard error"
    how.add_argument("--json", action="store_true", help=text)
    return parser


def _flag(key: str) -> str:
    return "--ntasks-per-node" if key == "tasks_per_node" else f"--{key.replace('_', '-')}"


def main(argv: list[str] | None = None) -> int:
    """Submit; returns the exit status."""
    interrupted = "interrupted; python -m cifar_hpc status shows whether a job was submitted before"
    return run_command(lambda _: build_parser(), sys.argv[1:] if argv is None else argv, interrupted)


def _named_by_flags(arguments: argparse.Namespace) -> int:
    """Submit. Errors name the flags that were given, not the keys of the spec that these set."""
    flags = {key: _flag(key) for key, *_ in RESOURCE_FLAGS if getattr(arguments, key) is not None}
    flags |= {"sbatch": "--sbatch"} if arguments.sbatch else {}
    try:
        return _submit(arguments)
    except UserError as error:
        key = rf"(?<!--set )\bresources\.({'|'.join(flags)})\b(\.(?=\w))?"
        words = re.sub(key, lambda found: flags[found[1]] + " " * bool(found[2]), str(error)) if flags else str(error)
        raise type(error)(words) from None


def _submit(arguments: argparse.Namespace) -> int:
    from cifar_hpc.launch.submit import preview, submit
    from cifar_hpc.runs.paths import program

    order = _order(arguments)
    run, spec = order.run(order.points[0]), order.points[0].spec
    seen = run.train_log.stat().st_size if run.train_log.is_file() else 0
    try:
        if arguments.dry_run or arguments.test_only:
            outcome, shown = preview(order, ask_slurm=arguments.test_only)
        else:
            outcome, shown = submit(order), ""
    except SchedulerError as error:
        about = _about_partition(spec) if "nvalid partition" in str(error) else ""
        raise type(error)(f"{error}; {about}" if about else str(error)) from None
    answer, text = _sweep_answer(order, outcome) if order.sweep else _run_answer(order, run, outcome)
    if shown:
        answer["estimate" if arguments.test_only else "script"] = shown
        text = f"{shown}\n{text if arguments.test_only else textwrap.indent(text, '# ')}"
    with contextlib.suppress(OSError):  # the job is submitted, whether that can be printed or not
        print(json.dumps(answer) if arguments.json else text, flush=True)
    if spec.tracking.tensorboard or spec.tracking.wandb:
        runs = shlex.quote(f"{order.sweep}-*") if order.sweep else run.name
        note(f"tracking.*: jobs start no tracker. HINT: {program()} track {runs} --tensorboard DIR, or --wandb online")
    if outcome.images:
        note(outcome.images)
    if order.on_slurm and not arguments.dry_run and (problem := _about_partition(spec)):
        note(f"the job may never start: {problem}")  # sbatch accepts it, and lets it wait
    if outcome.finished or not arguments.follow:
        return 0
    from cifar_hpc.cli.tail import follow

    if arguments.json:
        sys.stdout = sys.stderr  # the answer is complete: what follows is no part of it
    return follow(run, f"{program()} tail {run.name}\n{answer['status']}\n{answer['cancel']}", seen)


def _about_partition(spec: Spec) -> str:
    """A problem with the partition, as doctor sees it; empty where there is none or Slurm does not answer."""
    from cifar_hpc.cli.doctor.login import SlurmChecks

    with contextlib.suppress(SchedulerError):
        finding = SlurmChecks(spec.resources).check_partition()
        if finding.status == "problem":
            return f"{finding.found}. HINT: {finding.advice}"
    return ""


def _order(arguments: argparse.Namespace) -> Order:
    from cifar_hpc.config.io import load_site, load_values, new_spec, run_name
    from cifar_hpc.config.sweep import Point, expand
    from cifar_hpc.launch.preflight import on_slurm
    from cifar_hpc.launch.submit import Order
    from cifar_hpc.runs.paths import check_run_name, project_root

    site, defaults = load_site(arguments.profile)
    job = job_file(arguments.job) if arguments.job else DEFAULT_JOB
    resources = _resources(arguments)
    values = load_values(job, arguments.overrides, defaults, {"resources": resources})
    section = values.pop("sweep", None)
    if section is None:
        spec, sweep, parallel = new_spec(values, job.parent, project_root()), None, None
        points = [Point(check_run_name(arguments.name or run_name(job.stem, spec)), {}, spec)]
    else:
        if arguments.follow:
            hint = "HINT: python -m cifar_hpc status --watch"
            raise SpecError(f"--follow: a sweep is many runs, and this follows one. {hint}")
        sweep = check_run_name(arguments.name or job.stem)
        keys = [override.partition("=")[0].strip() for override in arguments.overrides]
        points, parallel = expand(sweep, section, values, keys, job.parent, project_root())
        check_run_name(points[0].run)  # the names of all points have the same length
    site.gpu_option(points[0].spec.resources.gpus_per_node)  # refuses a type of GPU that the site does not have
    if arguments.test_only and arguments.cluster == "local":
        raise SpecError("--test-only: asks Slurm, which --cluster local does not use. HINT: leave one of them out.")
    flags = _given(arguments, resources, points[0].spec)
    cluster = "slurm" if arguments.test_only else arguments.cluster
    slurm = (arguments.dry_run and cluster != "local") or on_slurm(cluster, points[0].spec, flags)
    return Order(project_root(), points, site, slurm, sweep, parallel, job.parent)


def _given(arguments: argparse.Namespace, resources: Answer, spec: Spec) -> dict[str, str]:
    """Words that gave each key of `resources`, and the profile, for this submission.

    Raises:
        SpecError: a flag has no effect on this job.
    """
    given, threads, tasks = spec.resources, spec.train.cpu_threads, spec.resources.tasks_per_node
    on_cpus = f"train.device: cpu and resources.tasks_per_node: {tasks}"
    rules: list[tuple[str, Any, str]] = [
        ("cpus_per_task", threads and arguments.cluster == "local", f"train.cpu_threads: {threads} here"),
        ("gpus_per_node", spec.train.device == "cpu" and given.gpus and tasks, on_cpus),
        *((key, _flag(key)[2:] in given.sbatch, f"--sbatch {_flag(key)[2:]}") for key in resources),
    ]
    for key, useless, why in rules:
        if useless and key in resources:
            raise SpecError(f"{_flag(key)}: has no effect with {why}. HINT: leave one of them out.")
    keys = [override.partition("=")[0].strip() for override in arguments.overrides]
    flags = {key.removeprefix("resources."): f"--set {key}" for key in keys if key.startswith("resources.")}
    return flags | {key: _flag(key) for key in resources} | ({"profile": "--profile"} if arguments.profile else {})


def _start(point: Point, start: Start) -> tuple[Answer, str]:
    """(keys for programs, words for people) on where a run begins or goes on."""
    resources, epochs = point.spec.resources, point.spec.train.epochs
    most, last = resources.max_nodes * resources.ntasks_per_node, start.processes_before
    now = f"{resources.fewest_tasks}-{most}" if resources.fewest_tasks else str(most)
    ranks = (f"{last} -> " if last and str(last) != now else "") + f"{now} rank{'s' * (now != '1')}"
    place = f"{'continues' if start.step else 'begins again'} from step {start.step}"
    place += "" if start.epoch is None else f", epoch {min(start.epoch + 1, epochs)} of {epochs}"
    damaged = f"; {start.damaged} is newer, but damaged" if start.damaged else ""
    new = not (start.step or last or damaged)
    words = f"new run: {epochs} epoch{'s' * (epochs != 1)}, {ranks}" if new else f"{place}, {ranks}{damaged}"
    return {"new": new, **vars(start), "epochs": epochs, "processes": most}, words


def _run_answer(order: Order, run: RunPaths, outcome: Submission) -> tuple[Answer, str]:
    """(answer for programs, answer for people) to the submission of a single run."""
    from cifar_hpc.runs.paths import program

    if outcome.busy:
        raise RunBusyError(outcome.busy[run.name])
    start, words = _start(order.points[0], outcome.starts[run.name])
    if outcome.finished:
        epochs = outcome.finished[run.name]
        hint = f"HINT: more epochs with --set train.epochs=N --name {run.name}, or another --name."
        text = f"run {run.name} has finished all {epochs} epochs; nothing to do. {hint}"
        return {"run": run.name, "state": "finished", **start, "epochs": epochs, "logs": str(run.logs)}, text
    answer: Answer = {
        "job_id": outcome.job_id,
        "cluster": "slurm" if order.on_slurm else "local",
        "logs": str(run.logs),
        "checkpoints": str(run.checkpoints),
    }
    if outcome.job_id is not None:
        answer |= {
            "tail": f"tail -F {shlex.quote(str(run.train_log))}",
            **{name: f"{program()} {name} {run.name}" for name in ("status", "cancel")},
        }
    return {"run": run.name, **start, **answer}, _lines({"run": run.name, "start": words, **answer})


def _sweep_answer(order: Order, outcome: Submission) -> tuple[Answer, str]:
    """(answer for programs, answer for people) to the submission of a sweep."""
    from cifar_hpc.runs.paths import program

    job: Answer = {"job_id": outcome.job_id}
    if outcome.folder is not None:
        job |= {
            "cluster": "slurm" if order.on_slurm else "local",
            "logs": str(outcome.folder.logs),
            "runs": str(order.root / "logs" / f"{order.sweep}-*"),
            **{name: f"{program()} {name} {shlex.quote(f'{order.sweep}-*')}" for name in ("status", "cancel")},
        }
    starts = {point.run: _start(point, outcome.starts[point.run]) for point in order.points}
    done, index = "submitted" if outcome.job_id else "to submit", {p.run: n for n, p in enumerate(outcome.submitted)}
    new = sum(starts[run][0]["new"] for run in index)
    kinds = ", ".join(f"{n} {kind}" for n, kind in ((new, "new"), (len(index) - new, "going on")) if n)
    counts = [f"{len(index)} {done} ({kinds})" if index else "nothing is left to submit"]
    others = ((outcome.finished, "finished"), (outcome.busy, "queued, running or being submitted"))
    counts += [f"{len(runs)} of {len(order.points)} {words}" for runs, words in others if runs]
    text = [_lines({"sweep": order.sweep, "points": ", ".join(counts), **job})]
    reasons = [reason.partition(" HINT: ")[0] for reason in outcome.busy.values()]
    text += [_lines({"left out": reason}) for reason in reasons[:SHOWN_REASONS]]
    text += [_lines({"": f"and {len(reasons) - SHOWN_REASONS} more"})] if len(reasons) > SHOWN_REASONS else []
    rows = []
    for point in order.points:
        start, words = starts[point.run]
        row: Answer = {"run": point.run, "state": done, "job_id": None, "values": point.values, **start}
        if point.run in outcome.finished:
            row["state"] = "finished"
        elif point.run in outcome.busy:
            row |= {"state": "left out", "reason": outcome.busy[point.run]}
        elif outcome.job_id is None:
            text.append(f"{index[point.run]} {point.run} {point}" + (f": {words}" if not start["new"] else ""))
        elif order.on_slurm:
            row["job_id"] = f"{outcome.job_id}_{index[point.run]}"
        rows.append(row)
    return {"sweep": order.sweep, **job, "points": rows}, "\n".join(text)


def _lines(answer: Answer) -> str:
    return "\n".join(f"{key:12} {value}" for key, value in answer.items() if value is not None)


def _resources(arguments: argparse.Namespace) -> dict[str, Any]:
    """Values of the section `resources` from the flags; text stays text, which YAML would interpret."""
    resources: dict[str, Any] = {}
    for key, _, _ in RESOURCE_FLAGS:
        if (value := getattr(arguments, key)) is not None:
            number = key in ("tasks_per_node", "cpus_per_task") and re.fullmatch("[0-9]{1,9}", value)
            resources[key] = int(value) if number else value
    options: dict[str, str] = {}
    for item in arguments.sbatch:
        key, separator, value = item.lstrip("-").partition("=")
        if not key:
            raise SpecError(f"--sbatch {item}: not understood; allowed: KEY=VALUE, such as mail-type=END.")
        options[key] = value if separator else "true"
    resources |= {"requeue": False} if arguments.no_requeue else {}
    return resources | ({"sbatch": options} if options else {})

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
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cifar_hpc.cli.parser import SEVERAL
from cifar_hpc.errors import RunBusyError, SpecError, UserError, explain
from cifar_hpc.text import printable

if TYPE_CHECKING:
    from cifar_hpc.launch.submit import Order, Submission
    from cifar_hpc.runs.paths import RunPaths

DEFAULT_JOB = Path(__file__).resolve().parents[2] / "jobs" / "improved_resnet.yaml"
SHOWN_REASONS = 10
Answer = dict[str, Any]  # for --json

# Keys of `resources` with a flag of the same name: (key, metavar, help).
RESOURCE_FLAGS = (
    ("partition", "P", "partition (leave out where a site's router chooses)"),
    ("account", "A", "account to charge"),
    ("qos", "Q", "quality of service"),
    ("time", "T", "time limit: minutes, MM:SS, HH:MM:SS, D-HH, D-HH:MM, D-HH:MM:SS or UNLIMITED"),
    ("nodes", "N|MIN-MAX", "nodes; a range or a list such as 1,2,4 lets Slurm choose, the weights do not depend on it"),
    ("gpus_per_node", "[TYPE:]G", "GPUs, and so processes, on each node"),
    ("cpus_per_task", "C", "CPU cores of each process"),
    ("mem", "M", "memory of a node, such as 32G"),
    ("constraint", "F", "node features"),
    ("exclude", "L", "nodes to avoid"),
    ("nodelist", "L", "nodes to use"),
    ("reservation", "R", "reservation"),
    ("dependency", "D", "further dependencies, beside singleton"),
    ("comment", "S", "comment; some sites read wishes from it, such as preemption=yes;requeue=true"),
)

EPILOG = """examples:
  python submit.py --partition gpu                          train jobs/improved_resnet.yaml
  python submit.py --partition gpu --nodes 1-2 --gpus-per-node 4 --time 1-00 --follow
  python submit.py jobs/demo.yaml --cluster local           train on this machine
  python submit.py --set train.seed=1 optimizer.lr=0.1 --dry-run
  python submit.py --partition gpu --test-only              when would it start?
  python submit.py --profile nyu-torch --account mine       as slurm/clusters/nyu-torch.yaml says
  python submit.py --partition gpu --sbatch mail-type=END mail-user=me@example.org
  python submit.py jobs/sweeps/dropout.yaml --set sweep.parallel=4      all its runs, as one job array
Submitting the same again continues the run from its last checkpoint; of a sweep, the runs that have not finished.

exit status: 0 submitted (with --follow: finished), 1 run failed, 2 bad spec or arguments,
3 the scheduler refused, 4 the run is already queued or running
"""


def build_parser() -> argparse.ArgumentParser:
    """The arguments of submit.py."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("submit.py", description=__doc__, epilog=EPILOG, formatter_class=form)
    parser.add_argument("job", metavar="JOB.yaml", nargs="?", help="what to train (default: jobs/improved_resnet.yaml)")
    text = "override keys of the job, such as train.epochs=10"
    parser.add_argument("--set", metavar="KEY.PATH=VALUE", dest="overrides", help=text, **SEVERAL)
    text = "the run's name (default: JOB and a hash of what it changes); of a sweep, in place of JOB"
    parser.add_argument("--name", metavar="RUN", help=text)
    where = parser.add_argument_group("where")
    where.add_argument("--cluster", choices=("auto", "slurm", "local"), default="auto", help="auto: Slurm where it is")
    where.add_argument("--profile", metavar="NAME", help="site profile in slurm/clusters (default: default)")
    for key, metavar, text in RESOURCE_FLAGS:
        where.add_argument(f"--{key.replace('_', '-')}", metavar=metavar, help=text)
    text = "any other options of sbatch, by their long names"
    where.add_argument("--sbatch", metavar="KEY=VALUE", help=text, **SEVERAL)
    where.add_argument("--no-requeue", action="store_true", help="never requeue the job; submit again to go on")
    how = parser.add_argument_group("how")
    how.add_argument("--dry-run", action="store_true", help="print the batch script that would be sent; change nothing")
    how.add_argument("--test-only", action="store_true", help="ask Slurm when the job would start; submit nothing")
    text = "follow train.log until the run ends; Ctrl-C leaves it running"
    how.add_argument("--follow", action="store_true", help=text)
    how.add_argument("--json", action="store_true", help="print the answer as one JSON object")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Submit; returns the exit status."""
    arguments = build_parser().parse_args(argv)
    try:
        return _submit(arguments)
    except KeyboardInterrupt:
        print("interrupted; python -m cifar_hpc status shows whether a job was submitted before", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 141  # the reader, such as head, has gone
    except (UserError, ModuleNotFoundError, OSError) as error:
        message, status = explain(error)
        if arguments.json:
            print(json.dumps({"error": message, "exit_code": status}))
        print(f"error: {printable(message)}", file=sys.stderr)
        return status


def _submit(arguments: argparse.Namespace) -> int:
    from cifar_hpc.launch.submit import preview, submit
    from cifar_hpc.runs.paths import keep_others_out

    keep_others_out()
    order = _order(arguments)
    if arguments.dry_run or arguments.test_only:
        print(preview(order, ask_slurm=not arguments.dry_run), flush=True)
        return 0
    run = order.run(order.points[0])
    seen = run.train_log.stat().st_size if run.train_log.is_file() else 0
    outcome = submit(order)
    answer, text = _sweep_answer(order, outcome) if order.sweep else _run_answer(order, run, outcome)
    with contextlib.suppress(OSError):  # the job is submitted, whether that can be printed or not
        print(json.dumps(answer) if arguments.json else text, flush=True)
    if outcome.finished or not arguments.follow:
        return 0
    from cifar_hpc.cli.tail import follow

    return follow(run, f"{_python()} tail {run.name}\n{answer['status']}\n{answer['cancel']}", seen)


def _order(arguments: argparse.Namespace) -> Order:
    from cifar_hpc.config.io import load_site, load_values, new_spec, run_name
    from cifar_hpc.config.sweep import Point, expand
    from cifar_hpc.launch.preflight import on_slurm
    from cifar_hpc.launch.submit import Order
    from cifar_hpc.runs.paths import check_run_name, project_root

    site, defaults = load_site(arguments.profile)
    job = Path(arguments.job) if arguments.job else DEFAULT_JOB
    values = load_values(job, arguments.overrides, {"resources": defaults}, {"resources": _resources(arguments)})
    section = values.pop("sweep", None)
    if section is None:
        spec, sweep, parallel = new_spec(values), None, None
        points = [Point(check_run_name(arguments.name or run_name(job.stem, spec)), {}, spec)]
    else:
        if arguments.follow:
            hint = "HINT: python -m cifar_hpc status --watch"
            raise SpecError(f"--follow: a sweep is many runs, and this follows one. {hint}")
        sweep = check_run_name(arguments.name or job.stem)
        keys = [override.partition("=")[0].strip() for override in arguments.overrides]
        points, parallel = expand(sweep, section, values, keys)
        check_run_name(points[0].run)  # the names of all points have the same length
    site.gpu_option(points[0].spec.resources.gpus_per_node)  # refuses a type of GPU that the site does not have
    slurm = arguments.dry_run or on_slurm("slurm" if arguments.test_only else arguments.cluster, points[0].spec)
    return Order(project_root(), points, site, slurm, sweep, parallel)


def _run_answer(order: Order, run: RunPaths, outcome: Submission) -> tuple[Answer, str]:
    """(answer for programs, answer for people) to the submission of a single run."""
    if outcome.busy:
        raise RunBusyError(outcome.busy[run.name])
    if outcome.finished:
        epochs = outcome.finished[run.name]
        hint = f"HINT: more epochs with --set train.epochs=N --name {run.name}, or another --name."
        text = f"run {run.name} has finished all {epochs} epochs; nothing to do. {hint}"
        return {"run": run.name, "state": "finished", "epochs": epochs, "logs": str(run.logs)}, text
    answer = {
        "run": run.name,
        "job_id": outcome.job_id,
        "cluster": "slurm" if order.on_slurm else "local",
        "logs": str(run.logs),
        "checkpoints": str(run.checkpoints),
        "tail": f"tail -F {shlex.quote(str(run.train_log))}",
        "status": f"{_python()} status {run.name}",
        "cancel": f"scancel {outcome.job_id}" if order.on_slurm else f"{_python()} cancel {run.name}",
    }
    return answer, _lines(answer)


def _sweep_answer(order: Order, outcome: Submission) -> tuple[Answer, str]:
    """(answer for programs, answer for people) to the submission of a sweep."""
    job: Answer = {"job_id": outcome.job_id}
    if outcome.folder is not None:
        job |= {
            "cluster": "slurm" if order.on_slurm else "local",
            "logs": str(outcome.folder.logs),
            "runs": str(order.root / "logs" / f"{order.sweep}-*"),
            "status": f"{_python()} status {shlex.quote(f'{order.sweep}-*')}",
            "cancel": f"{'scancel' if order.on_slurm else 'kill'} {outcome.job_id}",
        }
    counts = [f"{len(outcome.submitted)} submitted" if outcome.submitted else "nothing is left to submit"]
    others = ((outcome.finished, "finished"), (outcome.busy, "queued, running or being submitted"))
    counts += [f"{len(runs)} of {len(order.points)} {words}" for runs, words in others if runs]
    known = {key: value for key, value in job.items() if value is not None}
    text = [_lines({"sweep": order.sweep, "points": ", ".join(counts), **known})]
    text += [_lines({"left out": reason}) for reason in list(outcome.busy.values())[:SHOWN_REASONS]]
    if len(outcome.busy) > SHOWN_REASONS:
        text.append(_lines({"": f"and {len(outcome.busy) - SHOWN_REASONS} more"}))
    index = {point.run: number for number, point in enumerate(outcome.submitted)}
    rows = []
    for point in order.points:
        row: Answer = {"run": point.run, "state": "submitted", "job_id": None, "values": point.values}
        if point.run in outcome.finished:
            row["state"] = "finished"
        elif point.run in outcome.busy:
            row |= {"state": "left out", "reason": outcome.busy[point.run]}
        elif order.on_slurm:
            row["job_id"] = f"{outcome.job_id}_{index[point.run]}"
        rows.append(row)
    return {"sweep": order.sweep, **job, "points": rows}, "\n".join(text)


def _lines(answer: Answer) -> str:
    return "\n".join(f"{key:12} {value}" for key, value in answer.items())


def _python() -> str:
    return f"{shlex.quote(sys.executable)} -m cifar_hpc"


def _resources(arguments: argparse.Namespace) -> dict[str, Any]:
    """Values of the section `resources` from the flags; text stays text, which YAML would interpret."""
    resources: dict[str, Any] = {}
    for key, _, _ in RESOURCE_FLAGS:
        if (value := getattr(arguments, key)) is not None:
            number = key == "cpus_per_task" and re.fullmatch("[0-9]{1,9}", value)
            resources[key] = int(value) if number else value
    options: dict[str, str] = {}
    for item in arguments.sbatch:
        key, separator, value = item.lstrip("-").partition("=")
        if not key:
            raise SpecError(f"--sbatch {item}: not understood; allowed: KEY=VALUE, such as mail-type=END.")
        options[key] = value if separator else "true"
    requeue = {"requeue": False} if arguments.no_requeue else {}
    return resources | requeue | ({"sbatch": options} if options else {})

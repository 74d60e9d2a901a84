"""The command line of submit.py: arguments -> spec -> launcher. Never imports torch."""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cifar_hpc.errors import SpecError, UserError, missing_package
from cifar_hpc.text import printable

if TYPE_CHECKING:
    from cifar_hpc.config.site import Site
    from cifar_hpc.config.spec import Spec


DEFAULT_JOB = Path(__file__).resolve().parents[2] / "jobs" / "improved_resnet.yaml"

# Flags that set a key of `resources` each: (flag, key, metavar, help).
RESOURCE_FLAGS = (
    ("--partition", "partition", "P", "partition (leave out where a site's router chooses)"),
    ("--account", "account", "A", "account to charge"),
    ("--qos", "qos", "Q", "quality of service"),
    ("--time", "time", "T", "time limit: minutes, MM:SS, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS"),
    ("--nodes", "nodes", "N|MIN-MAX", "nodes; a range lets Slurm choose, the weights do not depend on it"),
    ("--gpus-per-node", "gpus_per_node", "G", "GPUs, and so processes, on each node"),
    ("--cpus-per-task", "cpus_per_task", "C", "CPU cores of each process"),
    ("--mem", "mem", "M", "memory of a node, such as 32G"),
    ("--constraint", "constraint", "F", "node features"),
    ("--exclude", "exclude", "L", "nodes to avoid"),
    ("--nodelist", "nodelist", "L", "nodes to use"),
    ("--reservation", "reservation", "R", "reservation"),
    ("--dependency", "dependency", "D", "further dependencies, beside singleton"),
    ("--comment", "comment", "S", "comment; some sites read wishes from it, such as preemption=yes;requeue=true"),
)

DESCRIPTION = """\
Submit a preemptible, resumable training run to Slurm, or start it on this
machine. Prints the job id, the run's name and folders, and the commands that
watch and cancel it.

JOB.yaml says what to train, the site profile where it runs; --set and the
flags below come last. The run's name is made from what differs from the
defaults, so the same submission continues the same run, which has one job at a
time. The code is copied: editing it does not change a queued job.
"""

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
    parser = argparse.ArgumentParser(
        prog="submit.py",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("job", metavar="JOB.yaml", nargs="?", help="what to train (default: jobs/improved_resnet.yaml)")
    parser.add_argument(
        "--set",
        metavar="KEY.PATH=VALUE",
        dest="overrides",
        nargs="+",
        action="extend",
        default=[],
        help="override keys of the job, such as train.epochs=10",
    )
    parser.add_argument(
        "--name",
        metavar="RUN",
        help="the run's name (default: JOB and a hash of what it changes); of a sweep, in place of JOB",
    )
    where = parser.add_argument_group("where")
    where.add_argument("--cluster", choices=("auto", "slurm", "local"), default="auto", help="auto: Slurm where it is")
    where.add_argument("--profile", metavar="NAME", help="site profile in slurm/clusters (default: default)")
    for flag, key, metavar, text in RESOURCE_FLAGS:
        where.add_argument(flag, dest=f"resources_{key}", metavar=metavar, help=text)
    where.add_argument(
        "--sbatch",
        metavar="KEY=VALUE",
        nargs="+",
        action="extend",
        default=[],
        help="any other options of sbatch, by their long names",
    )
    where.add_argument("--no-requeue", action="store_true", help="never requeue the job; submit again to go on")
    how = parser.add_argument_group("how")
    how.add_argument("--dry-run", action="store_true", help="print the batch script that would be sent; change nothing")
    how.add_argument("--test-only", action="store_true", help="ask Slurm when the job would start; submit nothing")
    how.add_argument(
        "--follow", action="store_true", help="follow train.log until the run ends; Ctrl-C leaves it running"
    )
    how.add_argument("--json", action="store_true", help="print the answer as one JSON object")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Submit; returns the exit status."""
    arguments = build_parser().parse_args(argv)
    try:
        return _submit(arguments)
    except UserError as error:
        if arguments.json:
            print(json.dumps({"error": str(error), "exit_code": error.exit_code}))
        return _say(str(error), error.exit_code)
    except ModuleNotFoundError as error:
        return _say(missing_package(error), SpecError.exit_code)
    except BrokenPipeError:
        return 141  # the reader, such as head, has gone
    except OSError as error:
        return _say(f"{error.filename}: {error.strerror}" if error.filename else str(error), SpecError.exit_code)
    except KeyboardInterrupt:
        print("interrupted; python -m cifar_hpc status shows whether a job was submitted before", file=sys.stderr)
        return 130


def _say(error: str, status: int) -> int:
    print(f"error: {printable(error)}", file=sys.stderr)
    return status


def _submit(arguments: argparse.Namespace) -> int:
    from cifar_hpc.config.io import from_plain, load_values
    from cifar_hpc.config.site import load_site
    from cifar_hpc.runs.paths import keep_others_out

    keep_others_out()
    site, defaults = load_site(arguments.profile)
    job = Path(arguments.job) if arguments.job else DEFAULT_JOB
    values = load_values(job, arguments.overrides, {"resources": defaults}, {"resources": _resources(arguments)})
    section = values.pop("sweep", None)
    if section is None:
        return _submit_run(arguments, job, from_plain(values), site)
    from cifar_hpc.config.sweep import expand
    from cifar_hpc.launch.submit_sweep import submit_sweep

    set_keys = [override.partition("=")[0].strip() for override in arguments.overrides]
    name = arguments.name or job.stem
    return submit_sweep(arguments, name, expand(name, section, values, set_keys), site)


def _submit_run(arguments: argparse.Namespace, job: Path, asked: Spec, site: Site) -> int:
    from cifar_hpc.config.io import run_name
    from cifar_hpc.launch import batch_script
    from cifar_hpc.launch import executors as launcher
    from cifar_hpc.launch import preflight as checks
    from cifar_hpc.launch import submit as submission
    from cifar_hpc.runs.frozen_spec import resolve
    from cifar_hpc.runs.paths import RunPaths, check_run_name, project_root

    name = check_run_name(arguments.name or run_name(job.stem, asked))
    paths = RunPaths(project_root(), name)

    if arguments.dry_run:
        spec = resolve(paths, asked, *submission.processes(asked, local=False))
        print(batch_script.batch_script(paths, spec, site))
        return 0
    slurm = checks.on_slurm("slurm" if arguments.test_only else arguments.cluster)

    def resolved() -> Spec:
        return resolve(paths, asked, *submission.processes(asked, local=not slurm))

    spec = resolved()
    if arguments.test_only:
        print(launcher.test_only(batch_script.batch_script(paths, spec, site)))
        return 0
    done = submission.finished_epochs(paths)
    if done >= spec.train.epochs:
        submission.print_answer(
            {"run": name, "state": "finished", "epochs": done, "logs": str(paths.logs)},
            arguments.json,
            f"run {name} has finished all {done} epochs; nothing to do. "
            f"HINT: more epochs with --set train.epochs=N --name {name}, or another --name.",
        )
        return 0
    begin = paths.train_log.stat().st_size if paths.train_log.is_file() else 0
    answer = submission.send(paths, resolved, site, slurm)
    submission.print_answer(answer, arguments.json, "\n".join(f"{key:12} {value}" for key, value in answer.items()))
    if not arguments.follow:
        return 0
    from cifar_hpc.cli.tail import follow

    hint = f"{submission.python()} tail {name}\n{answer['status']}\n{answer['cancel']}"
    return follow(paths, hint, begin)


def _resources(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the flags say, as values of the section `resources`: text as it is, since YAML would read it anew."""
    resources: dict[str, Any] = {}
    for _, key, _, _ in RESOURCE_FLAGS:
        value = getattr(arguments, f"resources_{key}")
        if value is not None:
            number = key in ("gpus_per_node", "cpus_per_task") and re.fullmatch("[0-9]{1,9}", value)
            resources[key] = int(value) if number else value
    options: dict[str, str] = {}
    for item in arguments.sbatch:
        key, separator, value = item.lstrip("-").partition("=")
        if not key:
            raise SpecError(f"--sbatch {item}: not understood; allowed: KEY=VALUE, such as mail-type=END.")
        options[key] = value if separator else "true"
    if options:
        resources["sbatch"] = options
    if arguments.no_requeue:
        resources["requeue"] = False
    return resources

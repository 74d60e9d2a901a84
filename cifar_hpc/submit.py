"""The command line of submit.py: arguments -> spec -> launcher. Never imports torch."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shlex
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cifar_hpc.errors import RunBusyError, SpecError, UserError, missing_package
from cifar_hpc.printable import printable

if TYPE_CHECKING:
    from cifar_hpc.paths import RunPaths
    from cifar_hpc.sites import Site
    from cifar_hpc.spec import Spec

DEFAULT_JOB = Path(__file__).resolve().parent.parent / "jobs" / "improved_resnet.yaml"

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

EPILOG = """examples:
  python submit.py --partition gpu                          train jobs/improved_resnet.yaml
  python submit.py --partition gpu --nodes 1-2 --gpus-per-node 4 --time 1-00 --follow
  python submit.py jobs/demo.yaml --cluster local           train on this machine
  python submit.py --set train.seed=1 optimizer.lr=0.1 --dry-run
Submitting the same again continues the run from its last checkpoint.

exit status: 0 submitted (with --follow: finished), 1 run failed, 2 bad spec or arguments,
3 the scheduler refused, 4 the run is already queued or running
"""


def build_parser() -> argparse.ArgumentParser:
    """The arguments of submit.py."""
    parser = argparse.ArgumentParser(
        prog="submit.py",
        description="Submit a preemptible, resumable training run to Slurm, or start it on this machine.",
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
    parser.add_argument("--name", metavar="RUN", help="the run's name (default: JOB and a hash of what it changes)")
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
    except OSError as error:
        return _say(f"{error.filename}: {error.strerror}" if error.filename else str(error), SpecError.exit_code)
    except KeyboardInterrupt:
        print("interrupted; python -m cifar_hpc status shows whether a job was submitted before", file=sys.stderr)
        return 130


def _say(error: str, status: int) -> int:
    print(f"error: {printable(error)}", file=sys.stderr)
    return status


def _submit(arguments: argparse.Namespace) -> int:
    from cifar_hpc import checks, launcher
    from cifar_hpc.freeze import resolve
    from cifar_hpc.paths import RunPaths, keep_others_out, project_root
    from cifar_hpc.sites import load_site
    from cifar_hpc.spec_io import check_run_name, load_spec, run_name

    keep_others_out()
    site, defaults = load_site(arguments.profile)
    job = Path(arguments.job) if arguments.job else DEFAULT_JOB
    asked = load_spec(job, arguments.overrides, {"resources": defaults}, {"resources": _resources(arguments)})
    name = check_run_name(arguments.name or run_name(job.stem, asked))
    paths = RunPaths(project_root(), name)

    if arguments.dry_run:
        spec = resolve(paths, asked, _tasks(asked), _threads(asked, local=False))
        print(launcher.batch_script(paths, spec, site))
        return 0
    slurm = checks.on_slurm("slurm" if arguments.test_only else arguments.cluster)

    def resolved() -> Spec:
        return resolve(paths, asked, _tasks(asked), _threads(asked, local=not slurm))

    spec = resolved()
    if arguments.test_only:
        print(launcher.test_only(paths, spec, site))
        return 0
    done = _finished_epochs(paths)
    if done >= spec.train.epochs:
        _print(
            {"run": name, "state": "finished", "epochs": done, "logs": str(paths.logs)},
            arguments.json,
            f"run {name} has finished all {done} epochs; nothing to do. "
            f"HINT: more epochs with --set train.epochs=N --name {name}, or another --name.",
        )
        return 0
    answer = _send(paths, resolved, site, slurm)
    _print(answer, arguments.json, _describe(answer))
    if not arguments.follow:
        return 0
    from cifar_hpc.tail import follow

    return follow(paths, hint=f"{answer['tail']}\n{answer['cancel']}")


def _send(paths: RunPaths, resolved: Callable[[], Spec], site: Site, slurm: bool) -> dict[str, Any]:
    """Check, freeze, snapshot, submit. Nothing of an earlier start is touched before the checks have passed."""
    from cifar_hpc import checks, launcher
    from cifar_hpc.jsonfile import remove_leftovers
    from cifar_hpc.runlog import append_event
    from cifar_hpc.snapshot import take_snapshot

    spec = resolved()
    if not slurm:
        checks.check_local_gpus(spec)
    checks.check_data(spec, paths.root)
    paths.create()
    with _one_submission(paths):
        checks.check_free(paths, slurm)
        remove_leftovers(paths.logs)  # of a submission that was killed
        spec = resolved()  # once more, since another submission may have come before this one
        code = take_snapshot(paths)

        def record(job_id: str) -> None:
            append_event(
                paths.events,
                "submitted",
                job_id=job_id,
                restart=None,
                world_size=None,
                scheduler="slurm" if slurm else "local",
                code=code.name,
                command=shlex.join(sys.argv),
            )

        with _frozen(paths, spec):
            if slurm:
                job_id = launcher.submit_slurm(paths, spec, site, code)
                record(job_id)
            else:
                job_id = launcher.submit_local(paths, spec, code, record)
    python = f"{shlex.quote(sys.executable)} -m cifar_hpc"
    return {
        "run": paths.name,
        "job_id": job_id,
        "cluster": "slurm" if slurm else "local",
        "logs": str(paths.logs),
        "checkpoints": str(paths.checkpoints),
        "tail": f"tail -F {shlex.quote(str(paths.train_log))}",
        "status": f"{python} status {paths.name}",
        "cancel": f"scancel {job_id}" if slurm else f"{python} cancel {paths.name}",
    }


@contextlib.contextmanager
def _one_submission(paths: RunPaths) -> Iterator[None]:
    """At most one submission of a run at a time; the kernel ends one that is killed."""
    from cifar_hpc.runlock import RunLock

    lock = RunLock(paths.logs / "submit.lock")
    try:
        lock.acquire({"pid": os.getpid(), "host": socket.gethostname()})
    except RunBusyError:
        raise RunBusyError(f"run {paths.name} is being submitted by another process right now.") from None
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def _frozen(paths: RunPaths, spec: Spec) -> Iterator[None]:
    """Freeze `spec`, since the job may start at once; a refused submission puts back what was frozen before."""
    from cifar_hpc.freeze import freeze
    from cifar_hpc.jsonfile import write_atomic

    before = paths.spec.read_bytes() if paths.spec.exists() else None
    freeze(paths, spec)
    try:
        yield
    except Exception:
        if before is None:
            paths.spec.unlink()
        else:
            write_atomic(paths.spec, before)
        raise


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


def _tasks(spec: Spec) -> int:
    return spec.resources.max_nodes * spec.resources.ntasks_per_node


def _threads(spec: Spec, local: bool) -> int:
    share = (os.cpu_count() or 1) // _tasks(spec) if local else 1
    return spec.resources.cpus_per_task or max(1, share)


def _finished_epochs(paths: RunPaths) -> int:
    from cifar_hpc.runlog import read_jsonl

    finished = [e for e in read_jsonl(paths.events) if e.get("event") == "finished"]
    return int(finished[-1]["epoch"]) if finished else 0


def _print(answer: dict[str, Any], as_json: bool, text: str) -> None:
    print(json.dumps(answer) if as_json else text, flush=True)


def _describe(answer: dict[str, Any]) -> str:
    return "\n".join(f"{key:12} {answer[key]}" for key in answer)

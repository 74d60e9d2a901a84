"""The command line of submit.py: arguments -> spec -> launcher. Never imports torch."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cifar_hpc.errors import RunBusyError, SpecError, UserError, missing_package

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
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except ModuleNotFoundError as error:
        print(f"error: {missing_package(error)}", file=sys.stderr)
        return SpecError.exit_code
    except OSError as error:
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        return SpecError.exit_code
    except KeyboardInterrupt:
        print("interrupted; nothing was submitted", file=sys.stderr)
        return 130


def _submit(arguments: argparse.Namespace) -> int:
    from cifar_hpc import checks, launcher
    from cifar_hpc.freeze import resolve
    from cifar_hpc.paths import RunPaths, project_root
    from cifar_hpc.sites import load_site
    from cifar_hpc.spec_io import check_run_name, load_spec, run_name

    site, defaults = load_site(arguments.profile)
    job = Path(arguments.job) if arguments.job else DEFAULT_JOB
    overrides = [*arguments.overrides, *_resource_overrides(arguments)]
    spec = load_spec(job, overrides, {"resources": defaults})
    name = check_run_name(arguments.name or run_name(job.stem, spec))
    paths = RunPaths(project_root(), name)

    if arguments.dry_run:
        spec = resolve(paths, spec, _tasks(spec), _threads(spec, local=False))
        print(launcher.batch_script(paths, spec, site))
        return 0
    slurm = checks.on_slurm("slurm" if arguments.test_only else arguments.cluster)
    spec = resolve(paths, spec, _tasks(spec), _threads(spec, local=not slurm))
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
    answer = _send(arguments, paths, spec, site, slurm)
    _print(answer, arguments.json, _describe(answer))
    if not arguments.follow:
        return 0
    from cifar_hpc.tail import follow

    return follow(paths, hint=f"{answer['tail']}\n{answer['cancel']}")


def _send(arguments: argparse.Namespace, paths: Any, spec: Any, site: Any, slurm: bool) -> dict[str, Any]:
    """Check, freeze, snapshot, submit. Nothing of an earlier start is touched before the checks have passed."""
    from cifar_hpc import checks, launcher
    from cifar_hpc.runlog import append_event
    from cifar_hpc.snapshot import take_snapshot

    if not slurm:
        checks.check_local_gpus(spec)
    checks.check_data(spec, paths.root)
    paths.create()
    with (paths.logs / "submit.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunBusyError(f"run {paths.name} is being submitted by another process right now.") from None
        checks.check_free(paths, slurm)
        code = take_snapshot(paths)
        with _frozen(paths, spec):
            if slurm:
                job_id = launcher.submit_slurm(paths, spec, site, code)
            else:
                job_id = launcher.submit_local(paths, spec, code)
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
def _frozen(paths: Any, spec: Any) -> Iterator[None]:
    """Freeze `spec`, since the job may start at once; a refused submission puts back what was frozen before."""
    from cifar_hpc.freeze import freeze
    from cifar_hpc.jsonfile import write_atomic

    before = paths.spec.read_bytes() if paths.spec.exists() else None
    freeze(paths, spec)
    try:
        yield
    except UserError:
        if before is None:
            paths.spec.unlink()
        else:
            write_atomic(paths.spec, before)
        raise


def _resource_overrides(arguments: argparse.Namespace) -> list[str]:
    overrides = []
    for _, key, _, _ in RESOURCE_FLAGS:
        value = getattr(arguments, f"resources_{key}")
        if value is not None:
            number = key in ("gpus_per_node", "cpus_per_task")
            overrides.append(f"resources.{key}={value if number else json.dumps(value)}")
    for item in arguments.sbatch:
        key, separator, value = item.lstrip("-").partition("=")
        if not key:
            raise SpecError(f"--sbatch {item}: not understood; allowed: KEY=VALUE, such as mail-type=END.")
        overrides.append(f"resources.sbatch.{key}={json.dumps(value if separator else 'true')}")
    if arguments.no_requeue:
        overrides.append("resources.requeue=false")
    return overrides


def _tasks(spec: Any) -> int:
    tasks: int = spec.resources.max_nodes * spec.resources.ntasks_per_node
    return tasks


def _threads(spec: Any, local: bool) -> int:
    import os

    share = (os.cpu_count() or 1) // _tasks(spec) if local else 1
    return spec.resources.cpus_per_task or max(1, share)


def _finished_epochs(paths: Any) -> int:
    from cifar_hpc.runlog import read_jsonl

    finished = [e for e in read_jsonl(paths.events) if e.get("event") == "finished"]
    return int(finished[-1]["epoch"]) if finished else 0


def _print(answer: dict[str, Any], as_json: bool, text: str) -> None:
    print(json.dumps(answer) if as_json else text, flush=True)


def _describe(answer: dict[str, Any]) -> str:
    return "\n".join(f"{key:12} {answer[key]}" for key in answer)

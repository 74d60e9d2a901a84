"""python -m cifar_hpc doctor: problems that runs would meet here, and what to do about them."""

from __future__ import annotations

import argparse
from dataclasses import replace

from cifar_hpc.cli.doctor import machine
from cifar_hpc.cli.doctor.job import check_job
from cifar_hpc.cli.doctor.node import check_python
from cifar_hpc.cli.doctor.report import Finding, Report
from cifar_hpc.cli.doctor.slurm import SlurmChecks
from cifar_hpc.runs.paths import project_root

HELP = "what would go wrong here: Slurm, partition, GPUs, file system, data, torch"
DESCRIPTION = """\
Each line is ok, a warning or a problem, with what was found and what to do.
Without --job nothing is submitted: Python, packages, the profile, Slurm, the
partition and what preempts there, account, file system, images, torch.

--job submits one small job the way runs are submitted, and reports from every
task: the same Python and packages, GPUs usable, file system shared and
lockable, images there, all-reduce between the tasks (NCCL or gloo), requeue
permitted, signals heard. It leaves nothing behind, unless there is a problem:
then what the job printed is kept. Ctrl-C cancels it.

Exit status: 0 no problem (warnings are none), 1 a problem, 2 bad arguments.
--json prints a list of {check, status, found, advice}."""
EXAMPLES = (
    "",
    "--profile mycluster --account lab --job",
    "--partition gpu --job --nodes 2 --gpus-per-node 4 --wait 60",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--profile", metavar="NAME", default="default", help="the site in slurm/clusters")
    parser.add_argument("--partition", metavar="P", help="the partition that runs would go to")
    parser.add_argument("--account", metavar="A", help="the account that runs would be charged to")
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="on so many nodes (default: 1)")
    parser.add_argument(
        "--gpus-per-node", type=int, metavar="G", help="with so many GPUs on each (default: the site's, else 1)"
    )
    parser.add_argument("--job", action="store_true", help="look on the compute nodes as well, in a job of a minute")
    parser.add_argument(
        "--wait",
        type=float,
        default=10,
        metavar="MINUTES",
        help="how long the job may wait for its start (default: 10)",
    )
    parser.add_argument("--json", action="store_true", help="machine-readable")


def main(arguments: argparse.Namespace) -> int:
    """Check this machine, Slurm and, with --job, the compute nodes; returns 1 where there is a problem."""
    report = Report(arguments.json)
    root = project_root()
    flags = {key: getattr(arguments, key) for key in ("partition", "account", "gpus_per_node")}
    flags = {key: value for key, value in flags.items() if value is not None} | {"nodes": str(arguments.nodes)}
    finding, site, spec = machine.read_site(arguments.profile, flags)
    plan = machine.plan_of(spec, root)
    report.run("python", check_python, plan)
    report.add(finding)
    slurm = SlurmChecks(spec.resources)
    report.run("slurm", slurm.check_slurm)
    if has_slurm := report.status("slurm") == "ok":
        report.run("partition", slurm.check_partition)
        if slurm.partition:
            report.run("nodes", slurm.check_nodes)
            report.run("preemption", slurm.check_preemption)
        report.run("requeue", slurm.check_requeue)
        report.run("account", slurm.check_account)
    report.run("file system", machine.check_file_system, root, not has_slurm)
    if report.status("file system") != "problem":
        report.run("locks", machine.check_locks, root)
        report.run("free space", machine.check_free_space, root)
    report.run("torch", machine.check_torch, plan)
    if arguments.job and has_slurm:
        plan = replace(plan, data_here=report.status("data") == "ok")
        report.run("job", check_job, root, spec, site, plan, 60 * arguments.wait)
    elif arguments.job:
        report.add(Finding("job", "warning", "--job needs a Slurm that answers", "try again on a login node"))
    return report.close()

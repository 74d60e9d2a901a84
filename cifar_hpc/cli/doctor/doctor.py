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


def doctor(arguments: argparse.Namespace) -> int:
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

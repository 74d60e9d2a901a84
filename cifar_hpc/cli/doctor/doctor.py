"""python -m cifar_hpc doctor: what would go wrong here, and what to do about it."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cifar_hpc.cli.doctor import doctor_checks as checks
from cifar_hpc.cli.doctor import doctor_slurm
from cifar_hpc.cli.doctor.doctor_files import check_folder
from cifar_hpc.cli.doctor.doctor_report import Finding, Report
from cifar_hpc.cli.doctor.doctor_slurm import Cluster
from cifar_hpc.cli.doctor.doctor_submit import doctors_job
from cifar_hpc.cli.doctor.doctor_verdict import judge_job
from cifar_hpc.config.site import Site
from cifar_hpc.config.spec import Spec
from cifar_hpc.errors import SchedulerError, SpecError, UserError
from cifar_hpc.runs.paths import project_root


def doctor(arguments: argparse.Namespace) -> int:
    """Look at this machine, at Slurm and, with --job, at compute nodes; returns 1 where there is a problem."""
    report = Report(arguments.json)
    root = project_root()
    pins = checks.required()
    finding, site, spec = checks.check_site(arguments.profile, _flags(arguments))
    report.add(checks.check_python(), finding)
    cluster, here = None, None
    with _told(report, "slurm"):
        cluster = _look_at_slurm(report, spec)
    with _told(report, "file system"):
        report.add(*check_folder(root, alone=cluster is None))
    with _told(report, "torch"):
        here = _look_at_torch(report, spec, root, pins)
    if arguments.job:
        if cluster is None:
            report.add(Finding("job", "warning", "--job needs a Slurm that answers", "try again on a login node"))
        else:
            with _told(report, "job"):
                _look_at_nodes(report, root, spec, site, pins, here, 60 * arguments.wait)
    return report.close()


@contextlib.contextmanager
def _told(report: Report, check: str) -> Iterator[None]:
    """What a check fails at is a finding, and the others go on."""
    try:
        yield
    except BrokenPipeError:  # the reader, such as head, has gone
        raise
    except (UserError, OSError) as error:
        words = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else str(error)
        report.add(Finding(check, "problem", f"it could not be looked at: {words}", "mend that, and try again"))


def _flags(arguments: argparse.Namespace) -> dict[str, Any]:
    named = {
        "partition": arguments.partition,
        "account": arguments.account,
        "nodes": arguments.nodes and str(arguments.nodes),
        "gpus_per_node": arguments.gpus_per_node,
    }
    return {key: value for key, value in named.items() if value is not None}


def _look_at_slurm(report: Report, spec: Spec) -> Cluster | None:
    resources = spec.resources
    finding, cluster = doctor_slurm.check_slurm()
    report.add(finding)
    if cluster is None:
        return None
    report.add(doctor_slurm.check_partition(cluster, resources))
    partition = cluster.partition(resources.partition)
    if partition is not None:
        report.add(
            doctor_slurm.check_nodes(partition, resources),
            doctor_slurm.check_preemption(cluster, partition, resources),
        )
    report.add(doctor_slurm.check_requeue(cluster, resources), doctor_slurm.check_account(cluster, resources))
    return cluster


def _look_at_torch(report: Report, spec: Spec, root: Path, pins: Mapping[str, str]) -> Mapping[str, Any] | None:
    try:
        facts = checks.probe(spec, root, pins)
    except SpecError as error:
        report.add(Finding("torch", "problem", str(error), checks.INSTALL))
        return None
    report.add(checks.compare_packages("packages", facts["packages"], pins, "here"))
    report.add(checks.check_torch(facts), checks.check_data(spec, root, facts))
    return facts


def _look_at_nodes(
    report: Report,
    root: Path,
    spec: Spec,
    site: Site,
    pins: Mapping[str, str],
    here: Mapping[str, Any] | None,
    patience: float,
) -> None:
    try:
        with doctors_job(root, spec, site, pins, patience, report.say) as (outcome, folder):
            findings = judge_job(outcome, spec, pins, here)
            report.add(*findings)
            if any(f.status == "problem" for f in findings) and outcome.output:
                report.say(f"what the job printed is kept in {outcome.keep(folder)}")
    except SchedulerError as error:
        advice = "--partition, --account and the profile's resources are what sites ask for"
        report.add(Finding("job", "problem", str(error), advice))

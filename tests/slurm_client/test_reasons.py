"""Slurm's reasons in words."""

from __future__ import annotations

import dataclasses
from datetime import datetime, timedelta

import pytest
from stub_slurm import slurm_time

from cifar_hpc.runs.state import clock, expected
from cifar_hpc.slurm.client import QueuedJob

JOB = QueuedJob("7", "run", "PENDING", "Priority", "N/A", "", "gpu", "(null)", "/logs/run/code/1")
NOW = datetime(2026, 1, 2, 12, 0, 0).astimezone()


def job(reason: str, dependency: str = "(null)", start: str = "N/A") -> QueuedJob:
    return dataclasses.replace(JOB, reason=reason, dependency=dependency, start=start)


@pytest.mark.parametrize(
    ("reason", "words"),
    [
        ("None", "Slurm has not looked at it yet"),
        ("Resources", "Resources: no room yet"),
        ("Priority", "Priority: other jobs go first"),
        ("JobHeldUser", "JobHeldUser: held by its owner"),
        ("JobArrayTaskLimit", "JobArrayTaskLimit: as many of the sweep's runs"),
        ("QOSMaxJobsPerUserLimit", "QOSMaxJobsPerUserLimit: as many of your jobs at a time as the QOS allows"),
        ("QOSNotAllowed", "QOSNotAllowed: the partition does not allow the QOS"),
        ("QOSGrpGRES", "QOSGrpGRES: all jobs of the QOS together"),
        ("QOSMaxWallDurationPerJobLimit", "QOSMaxWallDurationPerJobLimit: a limit of the QOS for one job"),
        ("AssocGrpCPUMinutesLimit", "AssocGrpCPUMinutesLimit: all jobs of your account together"),
        ("AssocMaxJobsLimit", "AssocMaxJobsLimit: as many of your jobs at a time as your account allows"),
        ("MaxGRESPerAccount", "MaxGRESPerAccount: a limit of the QOS for one account"),
        ("ReqNodeNotAvail, UnavailableNodes:node[1-9]", "ReqNodeNotAvail: a node it asks for"),
        ("Nodes required for job are DOWN, DRAINED or reserved for", "Nodes required: its nodes are down"),
        ("job_requeued_in_held_state", "job requeued in held state: whoever requeued it"),
        ("launch failed requeued held", "launch failed requeued held: it could not be launched"),
        ("SomethingNew", "SomethingNew"),
    ],
)
def test_why_begins_with_the_code_and_has_no_words_for_an_unknown_one(reason: str, words: str) -> None:
    assert job(reason).why.startswith(words)


@pytest.mark.parametrize(
    ("dependency", "words"),
    [
        ("singleton(unfulfilled)", "another job of this run must end first"),
        ("afterok:55(unfulfilled)", "job 55 must end first"),
        ("afterok:55(unfulfilled),afterany:7_*(unfulfilled),singleton(unfulfilled)", "jobs 55, 7_* must end first"),
        ("(null)", "another job must end first"),
    ],
)
def test_why_names_dependencies(dependency: str, words: str) -> None:
    assert job("Dependency", dependency).why == f"Dependency: {words}"


@pytest.mark.parametrize(
    ("start", "words"),
    [
        (slurm_time("2026-01-02T12:12:10"), "starts in ~12m"),
        (slurm_time("2026-01-02T12:00:40"), "starts in ~40s"),
        (slurm_time("2026-01-02T15:10:00"), "starts in ~3h10m"),
        (slurm_time("2026-01-09T12:00:00"), "starts in ~7d00h"),
        (slurm_time("2026-01-02T11:59:00"), ""),
        ("N/A", ""),
    ],
)
def test_expected(start: str, words: str) -> None:
    assert expected(job("Resources", start=start).start_time, NOW) == words


def test_start_of_a_held_job_is_none() -> None:
    for reason in ("JobHeldUser", "job requeued in held state"):
        assert job(reason, start=slurm_time("2026-01-02T12:12:10")).start_time is None


def test_clock() -> None:
    assert clock(NOW + timedelta(minutes=2), NOW) == "12:02:00"
    assert clock(NOW + timedelta(days=1), NOW) == "2026-01-03 12:00:00"

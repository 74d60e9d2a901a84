"""Reports and requests of the batch script where no task could make them; for real in tests/slurm/test_crashes.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers import tiny_spec

from cifar_hpc.launch.epilog import main
from cifar_hpc.runs.frozen_spec import freeze
from cifar_hpc.runs.history import History
from cifar_hpc.runs.logs import append_line, read_jsonl
from cifar_hpc.runs.paths import RunPaths, SweepPaths, write_points

START = {"event": "started", "job_id": "7", "restart": 0, "world_size": 2, "step": 0}
AGAIN = {"event": "resumed", "job_id": "7", "restart": 1, "world_size": 2, "step": 30}
FAILED = {"event": "failed", "step": 25, "again": True}
REQUEUED = {"event": "requeued", "reason": "failure", "delay_seconds": 240}
SAVED = {"event": "checkpoint", "job_id": "7", "step": 30}


@pytest.mark.parametrize(
    ("events", "restart", "end"),
    [
        ([START, SAVED], 0, {}),
        ([START, SAVED, REQUEUED, AGAIN], 1, {}),
        ([START, FAILED, REQUEUED, SAVED], 0, REQUEUED),
        ([], None, {}),
        ([{"event": "submitted", "job_id": "7"}], None, {}),  # killed before it began: the same would happen again
        ([START, {"event": "submitted", "job_id": "7"}], None, {}),
        ([START | {"job_id": "6"}, SAVED], None, {}),
    ],
)
def test_only_an_attempt_of_this_job_is_reported(
    events: list[dict[str, Any]], restart: int | None, end: dict[str, Any]
) -> None:
    history = History.of(events)
    attempt = history.attempt_of("7")
    assert (attempt.restart if attempt else None) == restart
    assert history.end == end


class Site:
    """A run, and a scontrol that answers from a file and notes what else it is asked."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.paths, self.answer, self.asked = RunPaths(folder, "run"), folder / "answer", folder / "asked"
        self.paths.create()
        program = folder / "bin" / "scontrol"
        program.parent.mkdir()
        program.write_text(f"#!/bin/sh\ncase $1 in show) cat {self.answer};; *) echo $* >> {self.asked};; esac\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
        monkeypatch.setenv("SLURM_JOB_ID", "7")
        self.job()

    def freeze(self, **sections: dict[str, Any]) -> None:
        freeze(self.paths, tiny_spec(**sections))

    def job(self, state: str = "RUNNING", preempted: str = "None") -> None:
        self.answer.write_text(f"JobId=7 JobState={state} StartTime=2026-01-01T00:00:00 PreemptTime={preempted}\n")

    def happened(self, *rows: dict[str, Any]) -> None:
        for row in rows:
            append_line(self.paths.events, json.dumps(row))

    def end(self, what: str = "run") -> list[dict[str, Any]]:
        """What is new in events.jsonl after the batch script's last line."""
        before = len(read_jsonl(self.paths.events))
        assert main([str(self.paths.root), what, "137"]) == 0
        return read_jsonl(self.paths.events)[before:]

    def requests(self) -> list[str]:
        return self.asked.read_text().splitlines() if self.asked.exists() else []


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    return Site(tmp_path, monkeypatch)


def test_epilog_reports_a_killed_attempt_as_a_failure_and_requeues_it(site: Site) -> None:
    site.freeze()
    site.happened(START, SAVED)
    failed, requeued = site.end()
    assert (failed["event"], failed["cause"], failed["step"], failed["world_size"]) == ("failed", "killed", 30, 2)
    assert (requeued["event"], requeued["reason"], requeued["delay_seconds"]) == ("requeued", "failure", 120)
    assert site.requests() == ["requeue 7"]
    assert "FAILED: all processes were killed (exit status 137)" in site.paths.train_log.read_text()
    assert site.end() == []  # all has been said


@pytest.mark.parametrize("last", [FAILED | {"again": False}, *({"event": e} for e in ("finished", "hang", "signal"))])
def test_epilog_leaves_an_attempt_that_has_reported_its_end(site: Site, last: dict[str, Any]) -> None:
    site.freeze()
    site.happened(START, SAVED, last)
    assert site.end() == [] and site.requests() == []


def test_epilog_requests_what_a_task_recorded_and_did_not_live_to_request(site: Site) -> None:
    site.freeze()
    site.happened(START, SAVED, FAILED)
    (requeued,) = site.end()
    assert (requeued["event"], requeued["reason"], requeued["delay_seconds"]) == ("requeued", "failure", 120)
    assert site.requests() == ["requeue 7"]
    assert site.end() == []  # it stands there already
    assert site.requests() == ["requeue 7", "requeue 7"]


def test_epilog_does_not_requeue_without_progress_or_permission(site: Site) -> None:
    site.freeze()
    site.happened(START, SAVED, {"event": "failed", "step": 30}, {"event": "requeued", "reason": "failure"}, AGAIN)
    assert [row["event"] for row in site.end()] == ["failed"]
    site.freeze(resources={"requeue": False})
    site.happened(AGAIN, SAVED | {"step": 40})
    assert [row["event"] for row in site.end()] == ["failed"]
    assert site.requests() == []


def test_epilog_counts_a_preemption_that_killed_all_tasks_as_one(site: Site) -> None:
    site.freeze()
    site.happened(START, SAVED)
    site.job(preempted="2026-01-01T00:00:05")
    (requeued,) = site.end()
    assert (requeued["event"], requeued["reason"]) == ("requeued", "preemption")
    assert site.requests() == ["requeue 7"]


def test_epilog_requeues_a_later_attempt_that_a_preemption_killed(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    site.freeze()
    site.happened(START, SAVED, REQUEUED, AGAIN)
    site.job("SIGNALING", preempted="2026-01-01T00:10:00 Restarts=1 Requeue=1")
    assert [row["event"] for row in site.end()][-1] == "requeued"
    assert site.requests()[0] == "requeue 7"


def test_epilog_leaves_a_preempted_job_that_may_not_be_requeued(site: Site) -> None:
    site.freeze(resources={"requeue": False})
    site.happened(START, SAVED)
    site.job(preempted="2026-01-01T00:00:05")
    (left,) = site.end()
    assert (left["event"], left["reason"], site.requests()) == ("left", "preemption", [])


def test_epilog_records_a_refused_requeue(site: Site) -> None:
    site.freeze()
    site.happened(START, SAVED)
    program = site.answer.parent / "bin" / "scontrol"
    program.write_text(f"#!/bin/sh\n[ $1 = show ] || exit 1\ncat {site.answer}\n")
    assert [row["event"] for row in site.end()] == ["failed", "requeued", "requeue_failed"]
    assert "WARNING not requeued: scontrol requeue 7 was refused" in site.paths.train_log.read_text()


@pytest.mark.parametrize("state", ["COMPLETING", "CANCELLED", "PENDING"])
def test_epilog_leaves_a_job_that_is_being_ended(site: Site, state: str) -> None:
    site.freeze()
    site.happened(START, SAVED)
    site.job(state)
    assert site.end() == [] and site.requests() == []


def test_epilog_reports_the_failure_where_slurm_does_not_answer(site: Site) -> None:
    site.freeze()
    site.happened(START, SAVED)
    site.answer.unlink()
    assert [row["event"] for row in site.end()] == ["failed"]
    assert "WARNING scontrol show job" in site.paths.train_log.read_text()


def test_epilog_finds_a_task_of_an_array_by_its_index(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = SweepPaths(site.paths.root, "job", 1)
    sweep.create()
    write_points(sweep, ["other", "run"])
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "5")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    site.freeze()
    site.happened(START | {"job_id": "5_1"}, SAVED)
    assert [row["event"] for row in site.end(str(sweep.points))] == ["failed", "requeued"]
    assert site.requests() == ["requeue 5_1"]


def test_epilog_names_a_spec_that_cannot_be_read(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    site.paths.spec.write_text("train: [")
    assert main([str(site.paths.root), "run", "1"]) == 1
    assert str(site.paths.spec) in capsys.readouterr().err

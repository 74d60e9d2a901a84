"""Reports and requests of the batch script where no task could make them; for real in tests/slurm/test_crashes.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers import tiny_spec

from cifar_hpc.launch.epilog import main
from cifar_hpc.runs import requeue
from cifar_hpc.runs.frozen_spec import freeze
from cifar_hpc.runs.history import History
from cifar_hpc.runs.lock import RunLock
from cifar_hpc.runs.logs import append_line, read_jsonl
from cifar_hpc.runs.paths import RunPaths, SweepPaths, write_points

ATTEMPT = {"event": "attempt", "job_id": "7", "restart": None, "restart_count": 0, "time": "2026-01-01T00:00:00.000Z"}
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
        ([{"event": "submitted", "job_id": "7"}], None, {}),
        ([ATTEMPT], 0, {}),
        ([ATTEMPT, {"event": "submitted", "job_id": "7"}], 0, {}),  # it began before that was recorded
        ([ATTEMPT, START, SAVED], 0, {}),
        ([ATTEMPT, START, REQUEUED, ATTEMPT | {"restart_count": 1}], None, {}),  # a later start than this one
        ([ATTEMPT, START, ATTEMPT | {"job_id": "8"}, REQUEUED | {"job_id": "7", "restart": 0}], 0, REQUEUED),
        ([START, {"event": "submitted", "job_id": "8"}], None, {}),
        ([START | {"job_id": "6"}, SAVED], None, {}),
    ],
)
def test_only_an_attempt_of_this_job_is_reported(
    events: list[dict[str, Any]], restart: int | None, end: dict[str, Any]
) -> None:
    attempt = History.of(events).attempt_of("7", 0)
    assert (attempt.restart if attempt else None) == restart
    assert end.items() <= (attempt.said if attempt else {}).items() and bool(end) == bool(attempt and attempt.said)


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
        self.answer.write_text(f"JobId=7 JobState={state} StartTime=1767225600 PreemptTime={preempted}\n")

    def happened(self, *rows: dict[str, Any]) -> None:
        for row in rows:
            append_line(self.paths.events, json.dumps(row))

    def end(self, what: str = "run", status: int = 137) -> list[dict[str, Any]]:
        """What is new in events.jsonl after the batch script's last line."""
        before = len(read_jsonl(self.paths.events))
        assert main([str(self.paths.root), what, str(status)]) == 0
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


def test_epilog_calls_nothing_killed_that_ended_by_itself(site: Site) -> None:
    site.freeze()
    site.happened(START, SAVED)
    failed, _ = site.end(status=1)
    assert failed["error"] == "all processes ended without a word (exit status 1)"
    assert f"(exit status 1). HINT: a full disk? See df {site.paths.logs}, and" in site.paths.train_log.read_text()


@pytest.mark.parametrize("last", [FAILED | {"again": False}, *({"event": e} for e in ("finished", "hang", "signal"))])
def test_epilog_leaves_an_attempt_that_has_reported_its_end(site: Site, last: dict[str, Any]) -> None:
    site.freeze()
    site.happened(START, SAVED, last)
    assert site.end() == [] and site.requests() == []


@pytest.mark.parametrize("event", ["failed", "hang"])
def test_epilog_requests_what_a_task_recorded_and_did_not_live_to_request(site: Site, event: str) -> None:
    site.freeze()
    site.happened(START, SAVED, FAILED | {"event": event})
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
    site.job(preempted="1767225605")
    (requeued,) = site.end()
    assert (requeued["event"], requeued["reason"]) == ("requeued", "preemption")
    assert site.requests() == ["requeue 7"]


def test_epilog_requeues_a_later_attempt_that_a_preemption_killed(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    site.freeze()
    site.happened(START, SAVED, REQUEUED, AGAIN)
    site.job("SIGNALING", preempted="1767226200 Restarts=1 Requeue=1")
    assert [row["event"] for row in site.end()][-1] == "requeued"
    assert site.requests()[0] == "requeue 7"


def test_epilog_leaves_a_preempted_job_that_may_not_be_requeued(site: Site) -> None:
    site.freeze(resources={"requeue": False})
    site.happened(START, SAVED)
    site.job(preempted="1767225605")
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


@pytest.mark.parametrize(
    ("state", "reason", "words"),
    [
        ("PENDING Reason=launch_failed_requeued_held", "requeued", "JobState=PENDING: requeued by Slurm or a person"),
        ("COMPLETING", "ended", "JobState=COMPLETING: cancelled, or its node is going; not requeueing"),
    ],
)
def test_a_start_whose_job_slurm_has_put_back_was_not_cancelled(
    site: Site, state: str, reason: str, words: str
) -> None:
    """slurmctld was away while srun wanted to start the tasks, and then holds the job without counting a restart."""
    site.freeze()
    site.happened(ATTEMPT)
    site.job(state)
    (left,) = site.end()
    assert (left["event"], left["reason"], site.requests()) == ("left", reason, [])
    assert left["explanation"].startswith(words) and words in site.paths.train_log.read_text()


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
    site.answer.write_text("JobId=7 ArrayJobId=5 ArrayTaskId=1 JobState=RUNNING\n")
    assert [row["event"] for row in site.end(str(sweep.points))] == ["failed", "requeued"]
    assert site.requests() == ["requeue 5_1"]


def test_epilog_names_a_spec_that_cannot_be_read(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    site.paths.spec.write_text("train: [")
    site.happened(ATTEMPT)
    (failed,) = site.end()
    assert (failed["again"], site.requests()) == (False, [])
    assert str(site.paths.spec) in capsys.readouterr().err and str(site.paths.spec) in failed["error"]
    assert f"FAILED: {site.paths.spec}" in site.paths.train_log.read_text()


OUTPUT = """an earlier start
== start of job 7, restart 0, on n1 ==
Traceback (most recent call last):
ModuleNotFoundError: No module named 'torch'
srun: error: n1: task 0: Exited with exit code 1
"""


def test_a_start_that_no_rank_has_spoken_of_is_a_failure_in_the_programs_own_words(site: Site) -> None:
    site.freeze()
    site.happened(ATTEMPT)
    (site.paths.slurm / "7_0_log.out").write_text(OUTPUT)
    (site.paths.slurm / "7_1_log.out").write_text("words of task 1\n")
    (site.paths.slurm / "77_0_log.out").write_text("words of another job\n")
    failed, requeued = site.end()
    assert failed["error"].endswith("(exit status 137): ModuleNotFoundError: No module named 'torch'")
    assert (failed["cause"], failed["again"], failed["restart"], failed["world_size"]) == ("start", True, 0, None)
    assert "bad_node" not in failed and (requeued["reason"], requeued["delay_seconds"]) == ("failure", 120)
    log = site.paths.train_log.read_text()
    assert "words of task 1" in log and "No module named 'torch'" in log and "out of memory" not in log
    assert "an earlier start" not in log and "another job" not in log
    assert site.end() == []


def test_two_starts_that_fail_without_progress_end_the_run(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.freeze(failures={"max": 5})
    site.happened(ATTEMPT)
    assert [row["event"] for row in site.end()] == ["failed", "requeued"]
    site.happened(ATTEMPT | {"restart_count": 1})
    assert site.end() == []  # of an old start whose node was cut off from the cluster
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    (failed,) = site.end()
    assert failed["again"] is False and "failed at step 0 before" in site.paths.train_log.read_text()
    history = History.read(site.paths.events)
    assert (len(history.attempts), history.restart_causes) == (2, {"failure": 1})
    assert site.requests() == ["requeue 7"]


@pytest.mark.parametrize(
    ("words", "node"),
    [
        ("srun: error: Task launch for StepId=7.0 failed on node n2: Communication connection failure", "n2"),
        ("srun: error: n2: task 1: Exited with exit code 1\nRuntimeError: No CUDA GPUs; no CUDA-capable device", "n2"),
        ("Task launch failed: Communication connection failure", "n1"),
        ("OSError: [Errno 28] No space left on device: '/tmp/x'", "n1"),
        ("sh: 1: exec: /opt/python: not found\nsrun: error: n2: task 1: Exited with exit code 127", "n2"),
    ],
)
@pytest.mark.parametrize(("nodes", "fewest"), [("1", 1), ("2-4", 2), ("4,2", 2)])
def test_a_broken_node_is_left_and_does_not_count_as_a_lack_of_progress(
    site: Site, monkeypatch: pytest.MonkeyPatch, words: str, node: str, nodes: str, fewest: int
) -> None:
    monkeypatch.setenv("SLURMD_NODENAME", "n1")
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "1")
    asked: list[tuple[Any, ...]] = []
    monkeypatch.setattr(requeue, "_nodes_but", lambda *given: asked.append(given) or "n1,n2")
    site.freeze(failures={"max": 2}, resources={"nodes": nodes})
    site.happened({"event": "failed", "step": 0}, ATTEMPT)
    (site.paths.slurm / "7_0_log.out").write_text(words)
    failed, _ = site.end()
    assert (failed["bad_node"], asked) == (node, [(node, "7", fewest)])
    assert site.requests()[:2] == ["requeue 7", "update jobid=7 ExcNodeList=n1,n2"]
    assert f"without node {node}, which looks broken" in site.paths.train_log.read_text()
    assert History.read(site.paths.events).failed_step == 0  # of the failure before


@pytest.mark.parametrize("nodelist", ["n1", None])
def test_a_broken_node_is_taken_again_where_there_is_no_other(
    site: Site, monkeypatch: pytest.MonkeyPatch, nodelist: str | None
) -> None:
    monkeypatch.setattr(requeue, "_nodes_but", lambda *_: "")
    site.freeze(resources={"nodelist": nodelist})
    site.happened(ATTEMPT)
    (site.paths.slurm / "7_0_log.out").write_text("srun: error: n1: task 0: x\nuncorrectable ECC error\n")
    assert [row["event"] for row in site.end()] == ["failed", "requeued"]
    assert site.requests() == ["requeue 7"]
    why = "resources.nodelist asks for certain nodes" if nodelist else "too few others would be left"
    assert f"not without node n1, which looks broken: {why}" in site.paths.train_log.read_text()


def test_a_start_that_finds_the_run_in_other_hands_comes_back_later_and_leaves_its_logs(site: Site) -> None:
    site.freeze(failures={"max": 1})
    site.happened(START | {"job_id": "6"}, SAVED | {"job_id": "6"}, ATTEMPT)
    lock = RunLock(site.paths.lock)
    lock.acquire({"job_id": "6"})
    (requeued,) = site.end()
    assert (requeued["event"], requeued["delay_seconds"], site.requests()[0]) == ("requeued", 240, "requeue 7")
    site.happened(ATTEMPT | {"restart_count": 0})
    before = site.paths.train_log.read_text()
    assert site.end() == [] and site.paths.train_log.read_text() == before
    lock.release()


def test_a_failure_for_good_after_a_preemption_gives_up_the_right_to_come_back(site: Site) -> None:
    site.freeze(failures={"max": 0})
    site.happened(START, {"event": "requeued", "reason": "preemption"}, ATTEMPT)
    assert [row["event"] for row in site.end()] == ["failed"]
    assert site.requests() == ["update jobid=7 Requeue=0"]


NODES = "n1|idle|8|8000|gpu:4|(null) n2|mix~|8|8000|gpu:4|(null) n3|down*|8|8000|gpu:4|(null) n4|idle|64|9|(null)|big"


@pytest.mark.parametrize(
    ("node", "own", "fewest", "expected"),
    [
        ("n1", "(null)", 1, "n1"),
        ("n1", "(null)", 2, ""),  # n3 is down, and n4 is of another kind
        ("n1", "n4", 1, "n1,n4"),
        ("n1", "n[2-3]", 1, ""),
        ("n4", "(null)", 1, ""),
        ("n9", "(null)", 1, ""),
    ],
)
def test_nodes_but_leaves_enough_of_the_same_kind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, node: str, own: str, fewest: int, expected: str
) -> None:
    show = f"echo 'JobId=6 ArrayTaskId=1-3 Partition=gpu ExcNodeList={own} Comment=x'"
    names = r"echo $3 | tr , '\n' | sed 's/n\[2-3\]/n2 n3/'"
    scontrol = f"case $2 in job) [ $4 = 5 ] && {show};; hostnames) {names};; esac"
    sinfo = f"[ $3 = --partition=gpu ] && echo '{NODES}' | tr ' ' '\\n'"
    for name, body in (("scontrol", scontrol), ("sinfo", sinfo)):
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert requeue._nodes_but(node, "5_2", fewest) == expected


@pytest.mark.parametrize(
    ("limit", "rows", "told"),
    [
        (0, [START, SAVED], "run failed all processes were killed (exit status 137)"),  # given up
        (0, [ATTEMPT], "run failed before training began (exit status 137)"),
        (1, [START, SAVED], ""),  # requeued
        (1, [START, SAVED, FAILED | {"again": False}], ""),  # the rank that has said it has told of it, too
    ],
)
def test_epilog_tells_of_a_run_that_failed_for_good(
    site: Site, limit: int, rows: list[dict[str, Any]], told: str
) -> None:
    out = site.paths.root / "told"
    command = f'echo "$CIFAR_HPC_RUN $CIFAR_HPC_STATE $CIFAR_HPC_REASON" >> {out}'
    site.freeze(notify={"command": command}, failures={"max": limit})
    site.happened(*rows)
    site.end()
    assert (out.read_text().strip() if out.exists() else "") == told

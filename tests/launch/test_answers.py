"""Answers of Slurm's commands that are late, empty, wrapped, or say less than was done, and what follows from each."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
from stub_slurm import StubSlurm

from cifar_hpc.__main__ import main
from cifar_hpc.cli import requeue as command_requeue
from cifar_hpc.cli import submit
from cifar_hpc.launch import batch_script, snapshot
from cifar_hpc.runs.lock import RunLock
from cifar_hpc.runs.logs import append_line, read_jsonl
from cifar_hpc.runs.paths import RunPaths, SweepPaths, all_runs
from cifar_hpc.slurm import client
from cifar_hpc.slurm.client import user_name

JOB = "data: {source: synthetic}\n"
SWEEP = JOB + "sweep: {seeds: 2}\n"
TIMED_OUT = "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation"
REFUSED = "sbatch: error: Batch job submission failed: Invalid account or account/partition combination specified"


@dataclass
class Site:
    """A root, a stub of Slurm, and programs that come before those of the stub."""

    root: Path
    stub: StubSlurm
    front: Path
    capsys: pytest.CaptureFixture[str]

    def program(self, name: str, body: str) -> None:
        """A program that may call the stub's as REAL."""
        self.front.joinpath(name).write_text(f"#!/bin/sh\nREAL={self.stub.programs / name}\n{body}\n")
        self.front.joinpath(name).chmod(0o755)

    def submit(self, text: str = JOB, *arguments: str) -> tuple[int, str]:
        """Exit status and output of a submission."""
        job = self.root.with_name("job.yaml")
        job.write_text(text)
        return self._said(submit.main([str(job), "--name", "run", *arguments]))

    def command(self, *words: str) -> tuple[int, str]:
        return self._said(main(list(words)))

    def _said(self, status: int) -> tuple[int, str]:
        captured = self.capsys.readouterr()
        return status, captured.out + captured.err

    def states(self) -> dict[str, str]:
        """State of each run by `status`."""
        main(["status", "--json"])
        return {row["run"]: row["state"] for row in json.loads(self.capsys.readouterr().out)}


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Site:
    made = Site(tmp_path / "root", StubSlurm(tmp_path), tmp_path / "front", capsys)
    made.front.mkdir()
    monkeypatch.delenv("SLURM_CONF", raising=False)
    monkeypatch.setenv("CIFAR_HPC_ROOT", str(made.root))
    monkeypatch.setattr(batch_script, "LOOK_SECONDS", (0, 0))
    for name, value in made.stub.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PATH", f"{made.front}:{made.stub.environment['PATH']}")
    return made


# By the answer of sbatch: whether the job exists, and what is known of it (a number, none, or maybe).
ANSWERS = {
    "plain": ('"$REAL" "$@"', "known"),
    "banner": ('echo "Welcome! job 99 of today"; "$REAL" "$@"; echo bye', "known"),
    "warning": ('echo "sbatch: warning: no time limit" >&2; "$REAL" "$@"', "known"),
    "timed out, done": (f'"$REAL" "$@" > /dev/null; echo "{TIMED_OUT}" >&2; exit 1', "known"),
    "timed out, not done": (f'echo "{TIMED_OUT}" >&2; exit 1', "none"),
    "unknown words, done": ('"$REAL" "$@" > /dev/null; echo "see your administrator" >&2; exit 1', "known"),
    "killed, done": ('"$REAL" "$@" > /dev/null; kill -9 $$', "known"),
    "nothing, done": ('"$REAL" "$@" > /dev/null', "known"),
    "nothing, not done": ("exit 0", "none"),
    "two numbers, done": (
        '"$REAL" "$@" > /dev/null; printf "Submitted batch job 7\\nSubmitted batch job 8\\n"',
        "known",
    ),
    "another cluster's name, done here": ('echo "$("$REAL" "$@") on cluster here"', "known"),
    "another cluster": ('echo "Submitted batch job 7 on cluster other"', "maybe"),
    "refused": (f'echo "{REFUSED}" >&2; exit 1', "none"),
}


@pytest.mark.parametrize("text", [JOB, SWEEP], ids=["run", "sweep"])
@pytest.mark.parametrize(("body", "known"), ANSWERS.values(), ids=ANSWERS)
def test_what_sbatch_answers(site: Site, text: str, body: str, known: str) -> None:
    site.program("sbatch", body)
    status, said = site.submit(text)
    queued = site.stub.queued()
    assert (status, bool(queued)) == ((0, True) if known == "known" else (3, False)), said
    runs = all_runs(site.root)
    recorded = sorted(row["job_id"] for run in runs for row in read_jsonl(run.events))
    assert recorded == (queued if known == "known" else [])
    assert bool(runs) is (known != "none")  # a frozen spec, without which a job could not start
    sweep = SweepPaths(site.root, "run", 1)
    folder = sweep if text is SWEEP else RunPaths(site.root, "run")
    assert ("maybe submitted" in said) is (known == "maybe") is (folder.slurm / "submission.sh").exists()
    assert (folder.slurm / "task.pkl").exists() is (known != "none")
    if known == "known":
        assert (folder.slurm / "1_submission.sh").exists()
        assert site.submit(text)[0] == (0 if text is SWEEP else 4) and site.stub.queued() == queued


@pytest.mark.parametrize("made_again", [False, True])
@pytest.mark.parametrize("text", [JOB, SWEEP], ids=["run", "sweep"])
def test_the_job_of_a_root_that_was_renamed_is_still_the_runs_own(
    site: Site, monkeypatch: pytest.MonkeyPatch, text: str, made_again: bool
) -> None:
    assert site.submit(text)[0] == 0
    queued, new, runs = site.stub.queued(), site.root.with_name("new"), all_runs(site.root)
    site.root.rename(new)
    if made_again:  # by a job of an older version that goes on there
        for run in runs:
            run.create()
            append_line(run.events, '{"event": "checkpoint", "job_id": "1"}')
    for file in new.glob("logs/*/events.jsonl"):  # long ago
        file.write_text(re.sub(r'"time": "[^"]*"', '"time": "2026-01-01T00:00:00.000Z"', file.read_text()))
    monkeypatch.setenv("CIFAR_HPC_ROOT", str(new))
    assert set(site.states().values()) == {"queued"}
    status, said = site.submit(text)
    assert status == (4 if text is JOB else 0) and site.stub.queued() == queued, said
    assert f"(PENDING), which works in {site.root}/logs/" in said


def test_fewer_epochs_than_are_done_are_refused_before_anything_changes(site: Site) -> None:
    assert site.submit()[0] == 0
    site.stub.end()
    events = RunPaths(site.root, "run").events
    append_line(events, '{"event": "checkpoint", "job_id": "1", "step": 500, "epoch": 5, "step_in_epoch": 0}')
    for _ in ("under way", "finished"):
        before = sorted((path, path.stat().st_mtime_ns) for path in site.root.rglob("*"))
        for epochs in (1, 4):
            status, said = site.submit(JOB, "--set", f"train.epochs={epochs}")
            assert (
                status == 2 and f"error: train.epochs: {epochs} is not allowed; allowed: 5 or more, since run" in said
            )
        assert sorted((path, path.stat().st_mtime_ns) for path in site.root.rglob("*")) == before
        append_line(events, '{"event": "finished", "job_id": "1", "step": 500, "epoch": 5}')
    status, said = site.submit(JOB, "--set", "train.epochs=5")
    assert status == 0 and "run run has finished all 5 epochs; nothing to do." in said and not site.stub.queued()
    status, said = site.submit(JOB, "--set", "train.epochs=8")
    assert status == 0 and len(site.stub.queued()) == 1, said


@pytest.mark.parametrize("text", [JOB, SWEEP], ids=["run", "sweep"])
def test_a_full_disk_is_named(site: Site, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(snapshot, "_write", full)
    status, said = site.submit(text)
    folder = site.root / "logs" / ("run" if text is JOB else "sweeps/run/1")
    hint = "HINT: make room; python -m cifar_hpc du shows what the runs take"
    assert status == 2 and f"error: {folder}: No space left on device. {hint}\n" in said


@pytest.mark.parametrize("name", ["SLURM_CLUSTERS", "SBATCH_CLUSTERS"])
def test_a_variable_that_sends_jobs_to_another_cluster_is_refused(
    site: Site, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    site.program("scontrol", 'echo "ClusterName             = this"')
    monkeypatch.setenv(name, "other")
    status, said = site.submit()
    assert status == 2 and f"{name}: 'other' would hide the job" in said and site.stub.calls() == []
    monkeypatch.setenv(name, "this")
    assert site.submit()[0] == 0 and len(site.stub.calls()) == 1
    status, said = site.submit(JOB, "--sbatch", "clusters=other")
    assert status == 2 and "--sbatch clusters: would hide the job from status and cancel. HINT: use a" in said


def test_an_sbatch_that_hangs_is_given_up(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_script, "SBATCH_SECONDS", 3)
    # Its child holds the pipes when it is killed.
    site.program("sbatch", '"$REAL" "$@" > /dev/null; touch "$QUEUE.done"; sleep 600 & echo $! > "$QUEUE.pid"; wait')
    status, said = site.submit()
    os.kill(int(site.stub.queue.with_name("queue.pid").read_text()), signal.SIGKILL)
    assert status == 0 and "did not answer within 3 s" in said and len(site.stub.queued()) == 1


@pytest.mark.parametrize("text", [JOB, SWEEP], ids=["run", "sweep"])
def test_while_slurm_is_silent_nothing_is_undone_and_the_next_submission_looks_first(site: Site, text: str) -> None:
    site.program("sbatch", f'"$REAL" "$@" > /dev/null; touch "$QUEUE.silent"; echo "{TIMED_OUT}" >&2; exit 1')
    site.program(
        "squeue", '[ ! -e "$QUEUE.silent" ] || { echo "Unable to contact slurm controller" >&2; exit 1; }\n"$REAL" "$@"'
    )
    status, said = site.submit(text)
    assert status == 3 and "maybe submitted" in said and "Unable to contact" in said
    runs = all_runs(site.root)
    assert len(runs) == (2 if text is SWEEP else 1)
    assert site.submit(text)[0] == 3 and len(site.stub.calls()) == 1  # still silent
    site.stub.queue.with_name("queue.silent").unlink()
    assert set(site.states().values()) == {"queued"}
    status, said = site.submit(text)
    assert status == (0 if text is SWEEP else 4) and "already in the queue as job 1" in said
    assert len(site.stub.calls()) == 1


def test_a_run_that_was_submitted_is_not_gone_because_one_answer_lacks_it(site: Site) -> None:
    """As of a slurmctld that has just been restarted."""
    site.submit()
    site.program("squeue", f'case "$*" in *--user*) exit 0;; esac; sed "s/$/|{user_name()}/" "$QUEUE"')
    assert site.states() == {"run": "unknown"}
    status, said = site.submit()
    assert status == 4 and "in the queue as" in said and len(site.stub.calls()) == 1
    site.stub.end()
    assert site.states() == {"run": "unknown"}
    assert site.submit()[0] == 0  # asked for the job itself, Slurm does not know it


CANCELLATIONS = {
    "done": ('echo > "$QUEUE"', 0, "is cancelled", "cancelled"),
    "timed out, done": ('echo > "$QUEUE"; echo "Socket timed out" >&2; exit 1', 0, "is cancelled", "cancelled"),
    "timed out, not done": ('echo "Socket timed out" >&2; exit 1', 3, "Socket timed out", "queued"),
    "ending": (
        'sed -i "s/PENDING/COMPLETING/" "$QUEUE"; echo "Socket timed out" >&2; exit 1',
        0,
        "is cancelled",
        "stopping",
    ),
    "silent": ('touch "$QUEUE.silent"; echo "Socket timed out" >&2; exit 1', 3, "maybe cancelled", "unknown"),
}


@pytest.mark.parametrize(("body", "status", "words", "state"), CANCELLATIONS.values(), ids=CANCELLATIONS)
def test_what_scancel_answers(site: Site, body: str, status: int, words: str, state: str) -> None:
    site.submit()
    site.program("scancel", body)
    site.program("squeue", '[ ! -e "$QUEUE.silent" ] || exit 1\n"$REAL" "$@"')
    found, said = site.command("cancel", "run")
    assert found == status and words in said
    events = [row["event"] for row in read_jsonl(RunPaths(site.root, "run").events)]
    assert events == ["submitted", "cancelled"][: 2 - bool(status)]
    assert site.states() == {"run": state}


class Two:
    """What a second person sees of the run that alice has submitted."""

    def __init__(self, site: Site, hides: bool) -> None:
        self.site, self.events = site, RunPaths(site.root, "run").events
        site.submit()
        self.events.write_text(self.events.read_text().replace(json.dumps(user_name()), '"alice"'))
        shown = "" if hides else 'sed "s/$/|alice/" "$QUEUE"'
        site.program("squeue", rf'case "$*" in *--jobs=1\ --format*) echo asked >> "$QUEUE.asked"; {shown};; esac')
        site.program("scontrol", f'echo "PrivateData = {"jobs,usage" if hides else "none"}"')
        site.program("scancel", 'echo "scancel: error: Kill job error: Access/permission denied" >&2; exit 1')

    def asked(self) -> int:
        """How often squeue was asked for the job by its id."""
        file = self.site.stub.queue.with_name("queue.asked")
        return len(file.read_text().splitlines()) if file.exists() else 0


def test_another_users_job_is_seen_and_not_submitted_again(site: Site) -> None:
    two = Two(site, hides=False)
    assert site.states() == {"run": "queued"} and two.asked() == 1
    assert "alice's job: Priority" in site.command("status")[1]
    status, said = site.submit()
    assert status == 4 and "already in the queue as alice's job 1 (PENDING). HINT: ask alice" in said
    status, said = site.command("cancel", "run")
    assert status == 3 and "permission denied HINT: ask alice, whose job it is." in said
    status, said = site.command("requeue", "run")
    assert status == 2 and "job 1 is alice's" in said
    assert site.command("cancel", "run", "--gone")[0] == 2
    site.stub.end()
    assert site.states() == {"run": "stopped"}  # it is gone, and Slurm would show it
    assert site.submit()[0] == 0
    asked = two.asked()
    assert site.states() == {"run": "unknown"} and two.asked() == asked  # of one's own job the first answer tells


def test_where_slurm_hides_others_jobs_a_run_is_maybe_queued(site: Site) -> None:
    Two(site, hides=True)
    assert site.states() == {"run": "unknown"}
    status, said = site.submit()
    assert status == 4 and "maybe in the queue as job 1 of alice" in said and "cancel run --gone" in said
    assert "with --gone it is recorded as ended" in given_up(site)
    assert len(site.stub.calls()) == 2


def given_up(site: Site) -> str:
    """What a cancellation says that cannot reach the job; the run is then recorded as ended, and submitted again."""
    status, said = site.command("cancel", "run")
    assert status == 3
    assert site.command("cancel", "run", "--gone")[0] == 0
    assert site.states() == {"run": "cancelled"}
    assert site.submit()[0] == 0
    return said


def test_of_runs_that_have_ended_slurm_is_asked_nothing_more(site: Site) -> None:
    two = Two(site, hides=True)
    with two.events.open("a") as file:
        file.write(json.dumps({"event": "failed", "error": "x", "job_id": "1", "again": False}) + "\n")
    shutil.rmtree(site.root / "logs" / "run" / "code")
    assert site.states() == {"run": "failed"} and two.asked() == 0


def test_a_number_that_slurm_has_given_to_another_job_is_not_the_runs(site: Site) -> None:
    """slurmctld forgot the first job, and began again with its number."""
    assert site.submit()[0] == 0
    line = site.stub.queue.read_text()
    site.stub.queue.write_text(line.replace("/logs/run/code/", "/logs/other/code/").replace("|run|", "|other|"))
    site.program("squeue", 'case "$*" in *--jobs*) sed "s/$/|$(id -un)/" "$QUEUE";; esac')
    status, words = site.command("cancel", "run")
    assert status == 2 and "has no job in the queue" in words


def test_a_job_on_another_cluster_of_the_same_file_system_is_maybe_there(site: Site) -> None:
    client.cluster_name.cache_clear()
    site.program("scontrol", 'echo "ClusterName             = alpha"')
    assert site.submit()[0] == 0
    site.stub.end()
    site.program("scontrol", 'echo "ClusterName             = beta"')
    site.program("squeue", f'case "$*" in *--jobs*) echo "1|x|RUNNING|None|N/A|n1|gpu|(null)|/x|{user_name()}";; esac')
    client.cluster_name.cache_clear()
    status, words = site.submit()
    assert status == 4 and "maybe in the queue as job 1" in words and "on cluster alpha" in words
    assert "is not this cluster's" in given_up(site)
    client.cluster_name.cache_clear()


def test_a_scontrol_that_does_not_answer_moves_no_run_to_another_cluster(site: Site) -> None:
    client.cluster_name.cache_clear()
    site.program("scontrol", 'echo "ClusterName             = alpha"')
    assert site.submit()[0] == 0
    site.stub.end()
    site.program("scontrol", "exit 1")
    client.cluster_name.cache_clear()
    assert not json.loads(site.command("status", "--json")[1])[0]["owner"]
    client.cluster_name.cache_clear()


class Running:
    """A run whose job runs, and a scancel that notes what it is asked for and lets `then` happen."""

    def __init__(self, site: Site, then: str, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
        self.site, self.run = site, RunPaths(site.root, "run")
        site.submit(JOB, *arguments)
        monkeypatch.setattr(command_requeue, "POLL_SECONDS", 0.01)
        queue = site.stub.queue
        queue.write_text(queue.read_text().replace("PENDING", "RUNNING"))
        append_line(self.run.events, '{"event": "attempt", "job_id": "1", "restart": null, "restart_count": 0}')
        site.program("scancel", f'echo "scancel $*" >> {site.root}/asked\n{then}')
        site.program("scontrol", f'echo "$*" >> {site.root}/asked')
        site.program("squeue", 'case "$*" in *--jobs*) sed "s/$/|$(id -un)/" "$QUEUE";; *) "$REAL" "$@";; esac')

    def asked(self) -> list[str]:
        file = self.site.root / "asked"
        return file.read_text().splitlines() if file.exists() else []


def said_so(event: str) -> str:
    return f"echo '{{{event}}}' >> \"$CIFAR_HPC_ROOT/logs/run/events.jsonl\""


ENDS = '; echo > "$QUEUE"'
REQUEUES = {
    "requeued": ('sed -i "s/RUNNING/PENDING/" "$QUEUE"', 0, "job 1 may start as soon as there is room"),
    "started again": (said_so('"event": "attempt", "job_id": "1", "restart_count": 1'), 0, "has started again already"),
    "finished": (said_so('"event": "finished", "test_accuracy": 9.0') + ENDS, 0, "run has finished meanwhile"),
    "cancelled": (said_so('"event": "cancelled", "by": "alice"') + ENDS, 1, "since it is cancelled: by alice"),
    "left": (said_so('"event": "left", "reason": "x", "explanation": "why"') + ENDS, 1, "since it is stopped: why"),
    "refused": ('echo "scancel: error: Access denied" >&2; exit 1', 3, "Access denied"),
    "silent": ('echo "nonsense" > "$QUEUE"; echo "1|broken" >> "$QUEUE"', 3, "job 1 goes back into the queue all the"),
}


@pytest.mark.parametrize(("then", "status", "words"), REQUEUES.values(), ids=REQUEUES)
def test_requeue_waits_for_the_job_and_says_what_became_of_it(
    site: Site, monkeypatch: pytest.MonkeyPatch, then: str, status: int, words: str
) -> None:
    running = Running(site, then, monkeypatch)
    found, said = site.command("requeue", "ru")
    assert (found, words in said) == (status, True), said
    assert ("job 1: waiting for the checkpoint" in said) is ("denied" not in said)
    assert running.asked()[0] == "scancel --signal=USR2 1"
    assert any(line.startswith("update jobid=1 StartTime=now+2") for line in running.asked()) is ("may start" in said)
    (asked,) = (row for row in read_jsonl(running.run.events) if row["event"] == "requeue_requested")
    assert (asked["by"], asked["job_id"]) == (user_name(), "1")


def test_ctrl_c_ends_only_the_waiting(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    Running(site, "true", monkeypatch)
    clock = SimpleNamespace(sleep=lambda seconds: signal.raise_signal(signal.SIGINT))
    monkeypatch.setattr(command_requeue, "time", clock)  # not that of subprocess, which sleeps as well
    status, said = site.command("requeue", "run")
    assert status == 130 and "job 1 goes back into the queue all the same, and starts by itself after about two" in said


@pytest.mark.parametrize(
    ("arguments", "state", "words"),
    [
        (["--no-requeue"], "RUNNING", "run: was submitted with --no-requeue"),
        ([], "SUSPENDED", "run: job 1 is SUSPENDED now. HINT: try again when"),
    ],
)
def test_a_job_that_would_not_come_back_is_sent_no_signal(
    site: Site, monkeypatch: pytest.MonkeyPatch, arguments: list[str], state: str, words: str
) -> None:
    running = Running(site, "true", monkeypatch, *arguments)
    queue = site.stub.queue
    queue.write_text(queue.read_text().replace("RUNNING", state))
    status, said = site.command("requeue", "run")
    assert status == 2 and words in said and running.asked() == []
    assert [row["event"] for row in read_jsonl(running.run.events)] == ["submitted", "attempt"]


def sweep_of_two(site: Site, scancel: str) -> list[str]:
    """Names of the points, in the queue as tasks 1_0 and 1_1."""
    site.submit(SWEEP)
    site.program("scancel", f'echo "$*" >> {site.root}/asked\n{scancel}')
    return [run.name for run in all_runs(site.root)]


def test_a_pattern_asks_before_it_cancels_several_runs_with_one_call(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = sweep_of_two(site, 'echo > "$QUEUE"')
    status, said = site.command("cancel", "run*")
    assert status == 2 and all(name in said for name in names) and "HINT: --yes, to cancel all of them." in said
    terminal = io.StringIO("no\n")
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr("sys.stdin", terminal)
    status, said = site.command("cancel", "run*")
    assert status == 2 and "run* means 2 runs:" in said and "nothing was changed" in said
    assert set(site.states().values()) == {"queued"} and not (site.root / "asked").exists()
    status, said = site.command("cancel", "run*", "--yes")
    assert status == 0 and said.count("is cancelled") == 2
    (call,) = (site.root / "asked").read_text().splitlines()
    assert sorted(call.split()) == ["1_0", "1_1"]
    assert set(site.states().values()) == {"cancelled"}
    status, said = site.command("cancel", "run*", "--yes")
    assert status == 2 and "run*: 2 runs, of which none has a job in the queue or a process here." in said


def test_one_run_that_cannot_be_cancelled_does_not_keep_the_others(site: Site) -> None:
    only_the_second = 'case "$*" in 1_1) sed -i /^1_1/d "$QUEUE";; *) echo "scancel: error: no" >&2; exit 1;; esac'
    first, second = sweep_of_two(site, only_the_second)
    status, said = site.command("cancel", first, second)
    assert status == 3 and "job 1_1 is cancelled" in said
    (left,) = (name for name, state in site.states().items() if state == "queued")
    assert f"error: {left}: scancel 1_0 was refused: scancel: error: no" in said
    assert sorted(site.states().values()) == ["cancelled", "queued"]
    status, said = site.command("cancel", "run")
    assert status == 2 and f"run: 2 runs begin so: {first}, {second}." in said


def test_cancel_cancels_an_older_job_of_the_run_that_somebody_has_requeued(site: Site) -> None:
    site.submit()
    line = site.stub.queue.read_text()
    site.stub.queue.write_text(line.replace("PENDING", "RUNNING") + line.replace("1|", "2|", 1))
    site.program("scancel", 'for id; do sed -i "/^$id|/d" "$QUEUE"; done')
    status, words = site.command("cancel", "run")
    assert status == 0 and "job 1 is cancelled" in words and "job 2 of the same run is cancelled, too" in words
    assert site.stub.queued() == []


@pytest.mark.process
def test_a_process_that_nothing_would_start_again_is_not_stopped_by_requeue(site: Site) -> None:
    """Neither one of `train`, nor the last one that submitit's local controller starts."""
    run = RunPaths(site.root, "run")
    run.create()
    lock = RunLock(run.lock)
    lock.acquire({"pid": os.getpid(), "host": socket.gethostname()})
    status, said = site.command("requeue", "run")
    assert status == 2 and "run: is a process of `train`, which nothing would start again. HINT: cancel run" in said
    name = f"submitit.local._local {run.slurm}".split()
    with subprocess.Popen([sys.executable, "-c", "input()", *name], stdin=subprocess.PIPE) as controller:
        row = {"event": "submitted", "scheduler": "local", "job_id": str(controller.pid)}
        for more in (row, *[{"event": "requeued", "reason": "requested"}] * 5):
            append_line(run.events, json.dumps(more))
        status, said = site.command("requeue", "run")
        assert status == 2 and "run: the local executor restarts a job at most 5 times. HINT: cancel run" in said
        controller.communicate(b"\n")
    assert "requeue_requested" not in run.events.read_text()
    lock.release()

"""The status command as a whole: one question to Slurm, the same answer with progress.json as without."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import NoneType
from typing import Any

import pytest
from helpers import PROJECT

from benchmarks.many_runs import KINDS, make_runs
from cifar_hpc.__main__ import main
from cifar_hpc.cli import status
from cifar_hpc.cli.status import URGENCY
from cifar_hpc.runs import progress
from cifar_hpc.runs import state as run_state
from cifar_hpc.runs.events import Submitted, append_event
from cifar_hpc.runs.paths import all_runs

RUNS = 2 * len(KINDS)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two runs of each kind, with a squeue that knows those that have a job."""
    commands = make_runs(tmp_path, RUNS)
    monkeypatch.setenv("PATH", f"{commands}:{os.environ['PATH']}")
    monkeypatch.setenv("CIFAR_HPC_ROOT", str(tmp_path))
    return tmp_path


def rows(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    """What `status --json` says, but for the log's age."""
    assert main(["status", "--json"]) == 0
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    return [{k: v for k, v in row.items() if k != "log_age_seconds"} for row in found]


def test_all_kinds_of_runs_are_told_apart(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    states = [row["state"] for row in rows(capsys)]
    kinds = ["stopped" if kind == "killed" else "not started" if kind == "new" else kind for kind in KINDS * 2]
    assert sorted(states) == sorted(kinds)
    assert all(row["epochs"] == 400 for row in rows(capsys))


def test_one_call_asks_slurm_once(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows(capsys)
    assert (root / "bin" / "asked").read_text() == "asked\n"


def test_the_answer_is_the_same_with_progress_json(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = rows(capsys)
    assert all(paths.progress.is_file() for paths in all_runs(root))
    assert rows(capsys) == first


def test_some_runs_alone(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = rows(capsys)[3]
    assert main(["status", one["run"], "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["state"] == one["state"]
    assert (root / "bin" / "asked").read_text() == 2 * "asked\n"


def test_patterns(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [row["run"] for row in rows(capsys)]
    assert main(["status", names[0], "improved_*", "--json"]) == 0
    assert [row["run"] for row in json.loads(capsys.readouterr().out)] == names
    assert main(["status", "x*", "--json"]) == 2
    assert "no such run" in capsys.readouterr().err


def test_logs_are_read_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = status.Reader(root, ["improved_*"])
    before = reader.read()
    monkeypatch.setattr(progress, "parse_jsonl", None)
    monkeypatch.setattr(progress, "read_frozen", None)
    assert [state.epoch for state in reader.read()] == [state.epoch for state in before]


def test_a_run_that_was_submitted_since_the_queue_was_read_has_not_stopped(root: Path) -> None:
    reader = status.Reader(root, [])
    reader.read()
    fresh = next(paths for paths in all_runs(root) if not paths.events.exists())
    append_event(
        fresh.events, Submitted(scheduler="slurm", code="", command=""), job_id="99", restart=None, world_size=None
    )
    (found,) = (state for state in reader.read() if state.run == fresh.name)
    assert (found.state, found.detail) == ("unknown", "submitted a moment ago, and Slurm does not know its job")
    (root / "bin" / "squeue").write_text("#!/bin/sh\nexit 1\n")
    reader.queue.next_poll = 0.0
    (found,) = (state for state in reader.read() if state.run == fresh.name)
    assert reader.queue.trouble and found.state == "unknown"


def test_the_manual_knows_every_state() -> None:
    words = " ".join(str(status.__doc__).split())
    assert all(re.search(rf"\b{state}\b", words) for state in URGENCY) and "3 Slurm does not answer" in words


NUMBER, COUNTS = (int, float), dict
SCHEMA: dict[str, tuple[type, ...]] = {
    "run": (str,),
    "state": (str,),
    "detail": (str,),
    "epoch": (int,),
    "epochs": (int,),
    "test_accuracy": (*NUMBER, NoneType),
    "best_accuracy": (*NUMBER, NoneType),
    "images_per_second": (*NUMBER, NoneType),
    "eta_seconds": (*NUMBER, NoneType),
    "restarts": (int,),
    "requeues": (COUNTS,),
    "world_size": (int, NoneType),
    "job_id": (str, NoneType),
    "log_age_seconds": (*NUMBER, NoneType),
    "reason": (str, NoneType),
    "start_time": (str, NoneType),
    "epoch_progress": (*NUMBER, NoneType),
    "restart_causes": (COUNTS,),
    "lost_seconds": NUMBER,
    "user": (str, NoneType),
    "position": (*NUMBER, NoneType),
    "changed": (dict, NoneType),
    "sweep": (str, NoneType),
    "owner": (str, NoneType),
}


def test_the_schema_of_json(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damaged = all_runs(root)[0]
    damaged.metrics.write_text('{"epoch": "x"}\n')
    assert main(["status", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found) == RUNS and {row["state"] for row in found} > {"unreadable", "running", "queued", "finished"}
    for row in found:
        assert list(row) == list(SCHEMA)
        for key, kinds in SCHEMA.items():
            assert isinstance(row[key], kinds) and not isinstance(row[key], bool), (key, row[key])
        for counts in (row["requeues"], row["restart_causes"]):
            assert all(isinstance(k, str) and type(v) is int for k, v in counts.items())
        assert row["state"] in URGENCY
        assert row["start_time"] is None or re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", row["start_time"])
    queued = [row for row in found if row["state"] in ("queued", "requeued")]
    assert queued and all(row["reason"] for row in queued)
    documented = str(run_state.RunState.plain.__doc__)
    assert all(re.search(rf"\b{key}\b", documented) for key in SCHEMA)
    assert all(re.search(rf"\b{state}\b", documented) for state in URGENCY)


def test_a_silent_slurm_leaves_what_files_tell(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "bin" / "squeue").write_text("#!/bin/sh\necho 'slurm_load_jobs error: Unable to contact' >&2; exit 1\n")
    assert main(["status", "--json"]) == 3
    captured = capsys.readouterr()
    assert {row["state"] for row in json.loads(captured.out)} == {"finished", "cancelled", "not started", "unknown"}
    assert "Unable to contact" in captured.err


def test_the_last_known_jobs_stay_while_slurm_is_silent(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status, "QUEUE_SECONDS", 0.0)
    reader = status.Reader(root, [])
    before = [run.state for run in reader.read()]
    assert reader.queue.trouble == "" and reader.queue.asked_at is not None
    answering = (root / "bin" / "squeue").read_text()
    (root / "bin" / "squeue").write_text("#!/bin/sh\nexit 1\n")
    assert [run.state for run in reader.read()] == before
    assert "squeue" in reader.queue.trouble
    (root / "bin" / "squeue").write_text(answering)
    reader.read()
    assert reader.queue.trouble != ""  # it is not asked at once again
    monkeypatch.setattr(reader.queue, "next_poll", 0.0)
    reader.read()
    assert reader.queue.trouble == ""


def test_a_pipe_gets_everything_by_name_and_a_terminal_what_fits_by_interest(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["status"]) == 0
    plain = capsys.readouterr().out
    names = [line.split()[0] for line in plain.splitlines()[1:]]
    assert names == sorted(names) and len(names) == RUNS and "\x1b" not in plain and "runs:" not in plain

    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert main(["status"]) == 0
    coloured = capsys.readouterr().out
    bare = re.sub(r"\x1b\[[0-9;]*m", "", coloured)
    assert coloured != bare and max(map(len, bare.splitlines())) <= 80
    rows, _, total = bare.partition(f"\n{RUNS} runs: ")
    assert rows.splitlines()[-2].split()[1] == "running"  # next to the prompt, in two lines
    assert total.startswith("2 running, 4 failed, ") and all(name in rows for name in names)
    monkeypatch.setenv("NO_COLOR", "1")
    assert main(["status"]) == 0
    assert "\x1b" not in capsys.readouterr().out


@pytest.mark.process
def test_help_and_status_load_no_more_than_they_need() -> None:
    heavy = {"submitit", "torch", "numpy", "rich", "asyncio"}
    run = (
        "import sys, runpy\nsys.argv[1:] = {arguments}\ntry: runpy.{call}\nexcept SystemExit: pass\nprint(*sys.modules)"
    )
    cases = [
        ("run_path('submit.py', None, '__main__')", ["--help"], heavy | {"yaml"}),
        ("run_module('cifar_hpc', None, '__main__')", ["--help"], heavy | {"matplotlib", "shtab"}),
        ("run_module('cifar_hpc', None, '__main__')", ["status"], heavy),
    ]
    for call, arguments, unwanted in cases:
        code = run.format(call=call, arguments=arguments)
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, timeout=120, check=True
        )
        loaded = set(done.stdout.splitlines()[-1].split())
        assert "argparse" in loaded and not loaded & unwanted, arguments

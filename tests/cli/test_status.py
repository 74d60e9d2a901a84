"""The status command as a whole: one question to Slurm, the same answer with its cache as without."""

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
from cifar_hpc.cli import status
from cifar_hpc.cli.parser import MANUAL
from cifar_hpc.cli.status_table import INTEREST
from cifar_hpc.config.io import from_plain
from cifar_hpc.config.spec import Spec
from cifar_hpc.errors import SpecError
from cifar_hpc.runs import history_cache as facts_cache
from cifar_hpc.runs import state as run_state
from cifar_hpc.runs.events import append_event
from cifar_hpc.runs.frozen_spec import freeze, read_frozen
from cifar_hpc.runs.history import read_facts
from cifar_hpc.runs.paths import RunPaths, all_runs

RUNS = 2 * len(KINDS)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two runs of each kind, with a squeue that knows those that have a job."""
    commands = make_runs(tmp_path, RUNS)
    monkeypatch.setenv("PATH", f"{commands}:{os.environ['PATH']}")
    monkeypatch.setenv("CIFAR_HPC_ROOT", str(tmp_path))
    monkeypatch.setattr(facts_cache, "SETTLED_SECONDS", -1)
    monkeypatch.setattr(facts_cache, "WORTH_WRITING", 1)
    return tmp_path


def rows(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    """What `status --json` says, but for the log's age."""
    assert status.status([], watch=False, as_json=True) == 0
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


def test_the_answer_is_the_same_with_the_cache(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = rows(capsys)
    assert (root / "logs" / ".status-cache").is_file()
    assert rows(capsys) == first
    (root / "logs" / ".status-cache").unlink()
    assert rows(capsys) == first


def test_some_runs_alone(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = rows(capsys)[3]
    assert status.status([one["run"]], watch=False, as_json=True) == 0
    assert json.loads(capsys.readouterr().out)[0]["state"] == one["state"]
    assert (root / "bin" / "asked").read_text() == 2 * "asked\n"


def test_patterns(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [row["run"] for row in rows(capsys)]
    assert status.status([names[0], "improved_*"], watch=False, as_json=True) == 0
    assert [row["run"] for row in json.loads(capsys.readouterr().out)] == names
    with pytest.raises(SpecError, match="no such run"):
        status.status(["x*"], watch=False, as_json=True)


def test_logs_are_read_once_whichever_runs_are_watched(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[str] = []
    monkeypatch.setattr(facts_cache, "read_facts", lambda paths: reads.append(paths.name) or read_facts(paths))
    reader = status.Reader(root, ["improved_*"])
    reader.read()
    reader.read()
    assert len(reads) == RUNS


def test_some_runs_leave_the_others_in_the_cache(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = rows(capsys)[0]["run"]
    before = (root / "logs" / ".status-cache").read_bytes()
    RunPaths(root, name).metrics.write_text("")
    status.status([name], watch=False, as_json=True)
    assert (root / "logs" / ".status-cache").read_bytes() == before


def test_a_run_that_was_submitted_since_the_queue_was_read_has_not_stopped(root: Path) -> None:
    reader = status.Reader(root, [])
    reader.read()
    fresh = next(paths for paths in all_runs(root) if not paths.events.exists())
    append_event(fresh.events, "submitted", job_id="99", restart=None, world_size=None, scheduler="slurm")
    (found,) = (state for state in reader.read() if state.run == fresh.name)
    assert (found.state, found.detail) == ("unknown", "submitted since Slurm last answered")
    (root / "bin" / "squeue").write_text("#!/bin/sh\nexit 1\n")
    reader._ask_next = 0.0
    (found,) = (state for state in reader.read() if state.run == fresh.name)
    assert reader.trouble and found.state == "unknown"


def test_the_manual_knows_every_state() -> None:
    words = " ".join(MANUAL["status"].split())
    assert all(re.search(rf"\b{state}\b", words) for state in INTEREST) and "3 Slurm does not answer" in words


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
}


def test_the_schema_of_json(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damaged = all_runs(root)[0]
    damaged.metrics.write_text('{"epoch": "x"}\n')
    assert status.status([], watch=False, as_json=True) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found) == RUNS and {row["state"] for row in found} > {"unreadable", "running", "queued", "finished"}
    for row in found:
        assert list(row) == list(SCHEMA)
        for key, kinds in SCHEMA.items():
            assert isinstance(row[key], kinds) and not isinstance(row[key], bool), (key, row[key])
        for counts in (row["requeues"], row["restart_causes"]):
            assert all(isinstance(k, str) and type(v) is int for k, v in counts.items())
        assert row["state"] in INTEREST
        assert row["start_time"] is None or re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", row["start_time"])
    queued = [row for row in found if row["state"] in ("queued", "requeued")]
    assert queued and all(row["reason"] for row in queued)
    documented = str(run_state.RunState.plain.__doc__)
    assert all(re.search(rf"\b{key}\b", documented) for key in SCHEMA)
    assert all(re.search(rf"\b{state}\b", documented) for state in INTEREST)


def test_a_silent_slurm_leaves_what_files_tell(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "bin" / "squeue").write_text("#!/bin/sh\necho 'slurm_load_jobs error: Unable to contact' >&2; exit 1\n")
    assert status.status([], watch=False, as_json=True) == 3
    captured = capsys.readouterr()
    assert {row["state"] for row in json.loads(captured.out)} == {"finished", "cancelled", "not started", "unknown"}
    assert "Unable to contact" in captured.err


def test_the_last_known_jobs_stay_while_slurm_is_silent(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status, "QUEUE_SECONDS", 0.0)
    reader = status.Reader(root, [])
    before = [run.state for run in reader.read()]
    assert reader.trouble == "" and reader.asked_at is not None
    answering = (root / "bin" / "squeue").read_text()
    (root / "bin" / "squeue").write_text("#!/bin/sh\nexit 1\n")
    assert [run.state for run in reader.read()] == before
    assert "squeue" in reader.trouble
    (root / "bin" / "squeue").write_text(answering)
    reader.read()
    assert reader.trouble != ""  # it is not asked at once again
    monkeypatch.setattr(reader, "_ask_next", 0.0)
    reader.read()
    assert reader.trouble == ""


def test_a_pipe_gets_everything_by_name_and_a_terminal_what_fits_by_interest(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert status.status([], watch=False, as_json=False) == 0
    plain = capsys.readouterr().out
    names = [line.split()[0] for line in plain.splitlines()[1:]]
    assert names == sorted(names) and len(names) == RUNS and "\x1b" not in plain and "runs:" not in plain

    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert status.status([], watch=False, as_json=False) == 0
    coloured = capsys.readouterr().out
    bare = re.sub(r"\x1b\[[0-9;]*m", "", coloured)
    assert coloured != bare and max(map(len, bare.splitlines())) <= 80
    assert bare.splitlines()[RUNS].split()[1] == "running"  # next to the prompt
    assert bare.splitlines()[RUNS + 1].startswith(f"{RUNS} runs: 2 running, 4 failed, ")
    monkeypatch.setenv("NO_COLOR", "1")
    assert status.status([], watch=False, as_json=False) == 0
    assert "\x1b" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "spec",
    [
        Spec(),
        from_plain({"train": {"epochs": 1_000_000, "log_seconds": 0.5}, "resources": {"comment": "\\ntrain: 'x'"}}),
        from_plain(
            {"resources": {"sbatch": {"mail-type": "END"}, "comment": "epochs: 3 " * 40}, "train": {"epochs": 3}}
        ),
    ],
)
def test_the_pace_of_a_frozen_spec_is_found_without_yaml(
    tmp_path: Path, spec: Spec, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = RunPaths(tmp_path, "run")
    paths.create()
    freeze(paths, spec)
    frozen = read_frozen(paths)
    assert frozen is not None
    monkeypatch.setattr(run_state, "read_frozen", None)
    assert run_state._pace(paths) == (frozen.train.epochs, frozen.train.log_seconds)


def test_the_pace_of_any_other_spec_is_that_of_yaml(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path, "run")
    paths.create()
    assert run_state._pace(paths) is None
    paths.spec.write_text("# The frozen spec of run x\ntrain: {epochs: 7}\n")
    assert run_state._pace(paths) == (7, 30.0)
    for text in ("train:\n  epochs: many\n", "tran:\n  epochs: 7\n", "train:\n  epochs: 7\n  epochs: 8\n"):
        paths.spec.write_text(text)
        assert run_state._pace(paths) is None


@pytest.mark.process
def test_help_and_status_load_no_more_than_they_need() -> None:
    heavy = {"submitit", "torch", "numpy", "rich", "asyncio"}
    run = (
        "import sys, runpy\nsys.argv[1:] = {arguments}\ntry: runpy.{call}\nexcept SystemExit: pass\nprint(*sys.modules)"
    )
    cases = [
        ("run_path('submit.py', None, '__main__')", ["--help"], heavy | {"yaml"}),
        ("run_module('cifar_hpc', None, '__main__')", ["--help"], heavy | {"yaml"}),
        ("run_module('cifar_hpc', None, '__main__')", ["status"], heavy),
    ]
    for call, arguments, unwanted in cases:
        code = run.format(call=call, arguments=arguments)
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, timeout=120, check=True
        )
        loaded = set(done.stdout.splitlines()[-1].split())
        assert "argparse" in loaded and not loaded & unwanted, arguments

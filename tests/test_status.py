"""The status command as a whole: one question to Slurm, the same answer with its cache as without."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.many_runs import KINDS, make_runs
from cifar_hpc import facts_cache, run_state, status
from cifar_hpc.freeze import freeze, read_frozen
from cifar_hpc.paths import RunPaths
from cifar_hpc.spec import Spec
from cifar_hpc.spec_io import from_plain

PROJECT = Path(__file__).resolve().parents[1]
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

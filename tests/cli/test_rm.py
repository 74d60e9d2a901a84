"""Deleting runs, and what they take on disk."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from helpers import tiny_spec

from cifar_hpc.__main__ import main
from cifar_hpc.cli import rm
from cifar_hpc.runs import queue as run_queue
from cifar_hpc.runs.frozen_spec import freeze
from cifar_hpc.runs.lock import RunLock
from cifar_hpc.runs.logs import append_line
from cifar_hpc.runs.paths import RunPaths, SweepPaths, all_runs, write_points
from cifar_hpc.slurm.client import QueuedJob

MIB = 2**20


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CIFAR_HPC_ROOT", str(tmp_path))
    monkeypatch.setattr(run_queue, "queue", lambda *_: {})
    for number, name in enumerate(("a-1", "a-2", "b"), 1):
        run = RunPaths(tmp_path, name)
        run.create()
        freeze(run, tiny_spec())
        append_line(run.events, '{"event": "finished", "step": 9, "test_accuracy": 50.0}')
        (run.checkpoints / "step_00000009.pt").write_bytes(os.urandom(number * MIB))
        os.link(run.checkpoints / "step_00000009.pt", run.checkpoints / "best.pt")
        (run.code / "1f").mkdir(parents=True)
    return tmp_path


def names(root: Path) -> list[str]:
    return [run.name for run in all_runs(root)]


def inside(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_rm_deletes_all_of_a_run_and_nothing_else(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rm", "a-*", "--yes"]) == 0
    assert "deleted: 2 runs, 3." in capsys.readouterr().out
    assert names(root) == ["b"] and inside(root / "checkpoints") == ["b"]
    assert inside(root / "logs") == ["b"]


def test_rm_asks_on_a_terminal_and_is_refused_without(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["rm", "b"]) == 2 and "HINT: --yes" in capsys.readouterr().err
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    for answer, left in (("", 3), ("n", 3), ("y", 2)):
        monkeypatch.setattr("builtins.input", lambda words, answer=answer: answer)
        assert main(["rm", "b"]) == 0
        assert len(names(root)) == left


def test_a_run_that_is_under_way_or_in_the_queue_keeps_all_from_being_deleted(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lock = RunLock(RunPaths(root, "a-2").lock)
    lock.acquire({"pid": os.getpid(), "host": "here"})
    assert main(["rm", "a-*", "--yes"]) == 4 and "run a-2 is being trained" in capsys.readouterr().err
    lock.release()
    job = QueuedJob("7", "a-1", "PENDING", "Priority", "N/A", "", "gpu", "(null)", "")
    monkeypatch.setattr(run_queue, "queue", lambda *_: {"a-1": job})
    assert main(["rm", "a-*", "--yes"]) == 4 and "already in the queue as job 7" in capsys.readouterr().err
    assert names(root) == ["a-1", "a-2", "b"]


def test_a_run_of_slurm_is_not_deleted_where_slurm_does_not_say_that_it_has_ended(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    append_line(RunPaths(root, "b").events, '{"event": "submitted", "scheduler": "slurm", "job_id": "7"}')
    monkeypatch.setenv("PATH", str(root))
    assert main(["rm", "b", "--yes"]) == 3 and "delete it on a login node" in capsys.readouterr().err
    assert names(root) == ["a-1", "a-2", "b"]


def test_a_killed_rm_leaves_no_run_that_looks_whole(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(folder: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(rm.shutil, "rmtree", killed)
        assert main(["rm", "b", "--yes"]) == 130
    assert names(root) == ["a-1", "a-2"] and not (root / "checkpoints" / "b").exists()
    assert len(list((root / "checkpoints").glob(".b.*.removed"))) == 1
    assert main(["rm", "a-1", "--yes"]) == 0  # and the next one clears up
    assert inside(root / "checkpoints") == ["a-2"] and inside(root / "logs") == ["a-2"]


def test_another_rm_may_take_the_same_folders_for_leftovers(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real, calls = shutil.rmtree, 0

    def raced(folder: Path, **options: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:  # the other one has just taken a file away
            (folder / "spec.yaml").unlink()
            raise FileNotFoundError(folder / "spec.yaml")
        real(folder, **options)

    monkeypatch.setattr(rm.shutil, "rmtree", raced)
    assert main(["rm", "a-*", "--yes"]) == 0 and "deleted: 2 runs" in capsys.readouterr().out
    assert inside(root / "logs") == inside(root / "checkpoints") == ["b"]


@pytest.mark.parametrize("what", ["a-*", "a-2"])
def test_rm_finds_what_a_killed_rm_has_left(root: Path, capsys: pytest.CaptureFixture[str], what: str) -> None:
    rm._hide(RunPaths(root, "a-1").logs)  # killed before the checkpoints were hidden
    for folder in (RunPaths(root, "a-2").logs, RunPaths(root, "a-2").checkpoints):  # ... before anything was deleted
        rm._hide(folder)
    assert names(root) == ["b"] and inside(root / "checkpoints")[1:] == ["a-1", "b"]
    capsys.readouterr()
    assert main(["du", "a-*"]) == 0 and "a-1" in capsys.readouterr().out
    assert main(["rm", what, "--yes"]) == 0
    runs = "1 run" if what == "a-*" else "0 runs"
    assert f"deleted: {runs} and 3 leftovers of a killed rm, " in capsys.readouterr().out
    assert inside(root / "logs") == ["b"]
    assert inside(root / "checkpoints") == (["b"] if what == "a-*" else ["a-1", "b"])


def test_the_folder_of_a_sweep_goes_with_its_last_run(root: Path) -> None:
    sweep = SweepPaths(root, "a", 1)
    sweep.create()
    write_points(sweep, ["a-1", "a-2"])
    assert main(["rm", "a-1", "--yes"]) == 0 and sweep.points.exists()
    assert main(["rm", "a-2", "--yes"]) == 0 and not sweep.sweep.exists()


def test_du_counts_files_of_two_names_once_and_sorts_by_size(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["du", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in found["runs"]] == ["b", "a-2", "a-1"]
    for row, mib in zip(found["runs"], (3, 2, 1), strict=True):
        assert mib * MIB <= row["checkpoints"] < (mib + 0.1) * MIB and row["code"] > 0
        assert row["total"] == row["checkpoints"] + row["code"] + row["logs"]
    assert found["total"] == sum(row["total"] for row in found["runs"])
    assert main(["du", "a-*"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["run", "a-2", "a-1", "all"] and "MiB" in lines[1]
    shutil.rmtree(root / "logs")
    shutil.rmtree(root / "checkpoints")
    assert main(["du"]) == 0 and "all 0" in capsys.readouterr().out

"""The command train: whose spec is frozen where two processes begin one run at the same moment."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers import PROJECT

from cifar_hpc.__main__ import main
from cifar_hpc.errors import RunBusyError, SpecError
from cifar_hpc.runs import frozen_spec, lock
from cifar_hpc.runs.lock import RunLock, WriterLock, holder
from cifar_hpc.runs.paths import RunPaths
from cifar_hpc.training.process import StopFlag

KEYS = ["data.source=synthetic", "train.device=cpu", "lookahead.k=7"]
FROZEN = "lookahead: {k: 3}\n"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunPaths:
    """A run whose spec another process has frozen just now."""
    monkeypatch.setenv("CIFAR_HPC_ROOT", str(tmp_path))
    monkeypatch.setattr(StopFlag, "install", lambda self, **_: self)
    paths = RunPaths(tmp_path, "run")
    paths.create()
    paths.spec.write_text(FROZEN)
    return paths


def train() -> int:
    return main(["train", str(PROJECT / "jobs" / "demo.yaml"), "--name", "run", "--set", *KEYS])


def test_the_spec_of_a_run_that_others_train_or_submit_is_not_touched(
    run: RunPaths, capsys: pytest.CaptureFixture[str]
) -> None:
    submission, writer = RunLock(run.logs / "submit.lock"), WriterLock(run)
    for held, words in ((submission, "submitted by"), (writer, "already being trained by job 5")):
        held.acquire({"job_id": "5"})
        assert train() == RunBusyError.exit_code and words in capsys.readouterr().err
        held.release()
    assert run.spec.read_text() == FROZEN


def test_the_spec_is_frozen_under_the_locks(run: RunPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    def freeze(paths: RunPaths, _: object) -> None:
        assert all(holder(path) is not None for path in (paths.logs / "submit.lock", paths.owner, paths.lock))
        raise SpecError("seen")

    monkeypatch.setattr(frozen_spec, "freeze", freeze)
    assert train() == SpecError.exit_code


def test_a_process_that_began_and_ended_meanwhile_has_fixed_the_spec(
    run: RunPaths, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def locked(*arguments: object) -> RunLock:
        run.events.write_text(json.dumps({"event": "started"}) + "\n")
        return RunLock(run.logs / "submit.lock")

    monkeypatch.setattr(lock, "lock_submission", locked)
    assert train() == SpecError.exit_code
    assert "lookahead.k: 3 -> 7" in capsys.readouterr().err and run.spec.read_text() == FROZEN

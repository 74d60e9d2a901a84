"""A run folder of an earlier version, tests/recorded, is shown, inspected, evaluated and trained to its end."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import PROJECT, TESTS

from cifar_hpc.runs.logs import read_jsonl
from cifar_hpc.runs.paths import RunPaths

RECORDED = TESTS / "recorded"
pytestmark = pytest.mark.process
EXPECTED = json.loads((RECORDED / "expected.json").read_text())
pytestmark = pytest.mark.process


@pytest.fixture
def run(tmp_path: Path) -> RunPaths:
    """A copy of the recorded run."""
    paths = RunPaths(tmp_path, "recorded")
    paths.create()
    for name in ("spec.yaml", "events.jsonl", "metrics.jsonl", "train.log"):
        shutil.copy(RECORDED / name, paths.logs / name)
    for file in (RECORDED / "index.json", *RECORDED.glob("*.pt")):
        shutil.copy2(file, paths.checkpoints / file.name)
    os.link(paths.checkpoints / "best.pt", paths.checkpoints / "step_00000009.pt")
    return paths


def command(run: RunPaths, *arguments: str) -> Any:
    """What `python -m cifar_hpc ... --json` prints."""
    environment = os.environ | {"CIFAR_HPC_ROOT": str(run.root)}
    done = subprocess.run(
        [sys.executable, "-m", "cifar_hpc", *arguments], cwd=PROJECT, env=environment,
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout) if "--json" in arguments else done.stdout


def test_status_shows_a_recorded_run(run: RunPaths) -> None:
    (row,) = command(run, "status", "recorded", "--json")
    shown = {key: row[key] for key in ("run", "state", "epoch", "epochs", "best_accuracy", "restarts")}
    assert shown == {
        "run": "recorded", "state": "stopped", "epoch": 1, "epochs": 4, "best_accuracy": 15.0, "restarts": 0,
    }  # fmt: skip


def test_inspect_verifies_a_recorded_checkpoint(run: RunPaths) -> None:
    answer = command(run, "inspect", "recorded", "--json")
    assert (answer["verified"], answer["step"], answer["epoch"], answer["step_in_epoch"]) == (True, 11, 1, 2)
    assert answer["environment"] == EXPECTED["environment"] and answer["best"] == {"epoch": 1, "test_accuracy": 15.0}


def test_evaluate_gives_the_recorded_accuracy(run: RunPaths) -> None:
    answer = command(run, "evaluate", "recorded", "--json")
    expected = EXPECTED["evaluated"]
    assert (answer["step"], answer["accuracy"]) == (expected["step"], pytest.approx(expected["accuracy"], abs=1))
    assert answer["loss"] == pytest.approx(expected["loss"], rel=1e-4)


def test_a_recorded_run_is_resumed_to_its_end(run: RunPaths) -> None:
    command(run, "train", str(RECORDED / "job.yaml"), "--name", "recorded")
    events = read_jsonl(run.events)
    resumed = next(e for e in events if e["event"] == "resumed")
    assert (resumed["step"], resumed["file"]) == (11, "step_00000011.pt") and events[-1]["event"] == "finished"
    rows = read_jsonl(run.metrics)
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4]


def test_without_dropout_a_run_ends_in_the_bits_of_the_earlier_version(run: RunPaths) -> None:
    expected = EXPECTED["without_dropout"]
    command(run, "train", str(RECORDED / "job.yaml"), "--name", "plain", "--set", "model.dropout=0")
    found = command(run, "inspect", "plain", "--json")
    # Bits hold for one kind of CPU and one version of torch.
    if found["environment"] == expected["environment"]:
        assert found["sums"] == expected["sums"]
        rows = read_jsonl(RunPaths(run.root, "plain").metrics)
        assert [row["test_loss"] for row in rows] == expected["test_loss"]


def test_a_resume_says_that_the_bits_may_differ(run: RunPaths) -> None:
    command(run, "train", str(RECORDED / "job.yaml"), "--name", "recorded")
    resumed = next(e for e in read_jsonl(run.events) if e["event"] == "resumed")
    changed = resumed["environment_changed"]
    assert changed["masks"] == ["generator", "counter hash"], "of dropout"
    assert changed["statistics"] == ["batches", "shards"], "of BatchNorm for an evaluation"
    assert "so the bits may differ from here" in " ".join(run.train_log.read_text().split())

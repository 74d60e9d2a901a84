"""Reading train.log back."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from helpers import PROJECT

from cifar_hpc.runs.eta import TAIL_BYTES, Progress, kind_of_line, last_progress, parse_progress

DATE = "2026-01-01 00:00:00 "
PROGRESS = (
    DATE + "epoch 3/400 step 120/391 (total 902)  loss 1.9010  acc 40.01%  lr 0.050000  9,000.1 img/s  run ETA 1:02:03"
)
EPOCH = DATE + "epoch 2/400 DONE  train loss 1.9 acc 31.25%  |  test loss 1.6 acc 39.84% (best 39.84% at 2)  |  lr 0.05"


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ("=" * 100, "banner"),
        ("== run x  |  started from step 0", "banner"),
        (PROGRESS, "progress"),
        (DATE + "evaluating: 128/128 test images", "phase"),
        (DATE + "epoch 9: measuring BatchNorm statistics of the weights to evaluate, batch 5/16", "phase"),
        (EPOCH, "epoch"),
        ("epoch    2  train loss 2.1 acc  30.00%  test loss 2.0 acc  30.00%", "epoch"),
        (DATE + "FINISHED 3 epochs, 48 steps: test accuracy 39.84%", "good"),
        (DATE + "STOPPED by SIGTERM: step 176 is on disk", "stop"),
        (DATE + "JobState=RUNNING: preemption; requeueing", "stop"),
        (DATE + "requeueing after failure 1 of at most 3", "stop"),
        (DATE + "CANCELLED by me; submit again to go on", "stop"),
        (DATE + "FAILED on rank 0 (n1): the training loss was NaN", "trouble"),
        (DATE + "HUNG on rank 0 (n1): no rank got anything done", "trouble"),
        (DATE + "not requeued: the same would happen again", "trouble"),
        (DATE + "WARNING checkpoint x could not be written", "warning"),
        (DATE + "ready after 5.5 s", ""),
        ("WARNINGS", ""),
        ("", ""),
    ],
)
def test_kinds(line: str, kind: str) -> None:
    assert kind_of_line(line) == kind


def test_progress_is_read_back() -> None:
    found = parse_progress(PROGRESS)
    assert found == Progress(3, 400, 120, 391, "1.9010", "40.01", 9000.1, 3723.0)
    assert found.epochs_done == 2 + 120 / 391
    days = parse_progress(PROGRESS.replace("1:02:03", "25 days, 8:31:14"))
    assert days is not None and days.eta_seconds == 25 * 86400 + 8 * 3600 + 31 * 60 + 14


@pytest.mark.parametrize("line", ["", EPOCH, PROGRESS[:-3], PROGRESS + "!", PROGRESS.replace("9,000.1", ".,.")])
def test_what_is_no_progress(line: str) -> None:
    assert parse_progress(line) is None


def test_the_last_progress_counts_until_something_else_is_said(tmp_path: Path) -> None:
    log = tmp_path / "train.log"
    assert last_progress(log) is None
    other = PROGRESS.replace("120/391", "200/391")
    log.write_text(f"{PROGRESS}\n{other}\n{DATE}WARNING x\n{PROGRESS[:60]}")
    assert last_progress(log) == parse_progress(other)
    for line in (EPOCH, "== run x", DATE + "STOPPED by SIGTERM", DATE + "FINISHED 3"):
        log.write_text(f"{PROGRESS}\n{line}\n")
        assert last_progress(log) is None


def test_only_the_end_of_a_log_is_read_and_only_of_a_log(tmp_path: Path) -> None:
    log = tmp_path / "train.log"
    log.write_bytes(PROGRESS.encode() + b"\n" + b"\xff" * TAIL_BYTES + b"\n")
    assert last_progress(log) is None
    log.unlink()
    os.mkfifo(log)
    assert last_progress(log) is None


def test_the_lines_that_runs_write_are_known() -> None:
    """By a log of a real run, which is kept with the documentation."""
    lines = (PROJECT / "docs" / "train.log").read_text().splitlines()
    kinds = [kind_of_line(line) for line in lines]
    assert {"banner", "progress", "stop"} <= set(kinds)
    assert all(parse_progress(line) for line, kind in zip(lines, kinds, strict=True) if kind == "progress")
    assert kinds.count("stop") == 2

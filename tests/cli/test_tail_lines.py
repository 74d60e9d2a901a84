"""Lines of train.log: their kinds and styles."""

from __future__ import annotations

import pytest
from helpers import PROJECT

from cifar_hpc.cli.tail import LINES, kind_of_line

DATE = "2026-01-01 00:00:00 "
DONE = DATE + "epoch 3/400 DONE  train loss 1.901  test 39.84% (best)  42s"


def test_the_lines_that_runs_write_are_known() -> None:
    """By a log of a real run, which is kept with the documentation."""
    kinds = [kind_of_line(line) for line in (PROJECT / "docs" / "train.log").read_text().splitlines()]
    assert {"banner", "stop"} <= set(kinds)
    assert kinds.count("stop") == 2


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ("=" * 100, "banner"),
        ("== run x  |  started from step 0", "banner"),
        (DATE + "epoch 3/400 step 98/391  loss 1.901  9,000 img/s  run ETA 1h02m", "other"),
        (DATE + "evaluating: 128/128 test images", "other"),
        (DONE, "epoch"),
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
        (DATE + "ready after 5.5 s", "other"),
        ("WARNINGS", "other"),
        ("", "other"),
    ],
)
def test_kinds(line: str, kind: str) -> None:
    assert kind_of_line(line) == kind


def test_styles_of_lines() -> None:
    assert LINES["banner"][0] == "bold cyan" and LINES["other"][0] == ""

"""Colours: on a terminal that wants them, and nowhere else."""

from __future__ import annotations

import io

import pytest

from cifar_hpc.cli.terminal import kind_of_line, paint, style_of_line, use_colour

DATE = "2026-01-01 00:00:00 "
PROGRESS = (
    DATE + "epoch 3/400 step 120/391 (total 902)  loss 1.9010  acc 40.01%  lr 0.050000  9,000.1 img/s  run ETA 1:02:03"
)
EPOCH = DATE + "epoch 2/400 DONE  train loss 1.9 acc 31.25%  |  test loss 1.6 acc 39.84% (best 39.84% at 2)  |  lr 0.05"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"TERM": "xterm"}, True),
        ({"TERM": "xterm", "NO_COLOR": ""}, True),  # https://no-color.org: not an empty string
        ({"TERM": "xterm", "NO_COLOR": "1"}, False),
        ({"TERM": "dumb"}, False),
        ({}, False),
    ],
)
def test_wanted(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], expected: bool) -> None:
    for name in ("TERM", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert use_colour(Terminal()) is expected
    assert not use_colour(io.StringIO())


def test_paint() -> None:
    assert paint("a", "bold red") == "\x1b[1;31ma\x1b[0m"
    assert paint("a", "") == "a" and paint("", "red") == ""
    assert paint("a", style_of_line("banner")).startswith("\x1b[1;36m")
    assert paint("a", style_of_line("progress")) == "a"


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

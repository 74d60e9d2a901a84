"""submit.py --follow on a terminal: what is printed for good, and what stands in the line below."""

from __future__ import annotations

import io

import pytest
from helpers import PROJECT
from rich.console import Console

from cifar_hpc.cli.tail import LINES, LiveView, eta_seconds, kind_of_line
from cifar_hpc.cli.tail import PROGRESS as LINE
from cifar_hpc.runs.state import RunState
from cifar_hpc.text import duration

DATE = "2026-01-01 00:00:00 "
PROGRESS = DATE + "epoch 3/400 step 98/391  loss 1.901  9,000 img/s  run ETA 1h02m"
DONE = DATE + "epoch 3/400 DONE  train loss 1.901  test 39.84% (best)  42s"


def state(name: str, eta: float | None = None) -> RunState:
    return RunState("run", name, "on n1", 2, 400, None, None, None, eta, 0)


class Seen:
    """A terminal of a given width."""

    def __init__(self, width: int) -> None:
        self.console = Console(file=io.StringIO(), force_terminal=True, width=width, height=20, color_system=None)
        self.screen = LiveView(self.console)

    def below(self) -> str:
        """The line that is drawn again and again."""
        lines = self.console.render_lines(self.screen._renderable(), pad=False)
        return "\n".join("".join(segment.text for segment in line) for line in lines).rstrip()

    def printed(self) -> str:
        file = self.console.file
        assert isinstance(file, io.StringIO)
        return file.getvalue()


@pytest.fixture(autouse=True)
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")


@pytest.mark.parametrize("width", [60, 80, 100, 160])
def test_progress_moves_a_bar_that_fits(width: int) -> None:
    seen = Seen(width)
    with seen.screen as screen:
        screen.line(PROGRESS)
        below = seen.below()
    assert below.startswith("epoch 3/400 ━") and "98/391" in below and "ETA 1h02m" in below
    assert len(below) <= width and "\n" not in below
    assert ("9,000 img/s" in below) is (width >= 80)
    bar = below[len("epoch 3/400 ") : below.index(" 98/391")]  # a quarter of it is done
    assert len(bar) >= 8 and abs(bar.count("━") - len(bar) / 4) <= 1


def test_other_lines_are_printed_above() -> None:
    seen = Seen(80)
    with seen.screen as screen:
        screen.line("== run x  |  started from step 0")
        screen.line(PROGRESS)
        screen.line(DONE)
        screen.note("hung: no log line")
        screen.line(DATE + "evaluating: 100/128 test images")
        assert seen.below() == "evaluating: 100/128 test images  ETA 1h02m"
    printed = seen.printed().replace("\n", "")
    for text in ("== run x  |  started from step 0", DONE, "[hung: no log line]"):
        assert printed.count(text) == 1
    assert "run ETA" not in printed


def test_what_is_waited_for_stands_in_place_of_the_bar() -> None:
    seen = Seen(80)
    with seen.screen as screen:
        assert seen.below() == "submitted"
        screen.state(state("queued"), "queued: Priority: other jobs go first")
        assert seen.below() == "queued: Priority: other jobs go first"
        screen.state(state("running", 7200.0), "running: on n1")
        assert seen.below() == "running: on n1  ETA 2h00m"
        screen.line(PROGRESS)
        assert seen.below().endswith("ETA 2h00m")  # which knows of restarts, as the log does not
        screen.state(state("running", 3600.0), "running: on n1")
        assert seen.below().startswith("epoch 3/400") and seen.below().endswith("ETA 1h00m")
        screen.state(state("requeued"), "requeued: until 10:00:00, preempted")
        assert seen.below().startswith("requeued: until 10:00:00, preempted")
        screen.state(state("cancelled"), "cancelled: by me")
        assert seen.below() == "cancelled: by me"


def test_nothing_is_taken_for_markup_and_nothing_long_wraps() -> None:
    seen = Seen(40)
    with seen.screen as screen:
        screen.line("[red]x[/red] :smile:")
        screen.state(state("queued"), "queued: [bold]" + "y" * 100)
        assert len(seen.below()) == 40 and "[bold]" in seen.below()
    assert "[red]x[/red] :smile:" in seen.printed()


def test_progress_is_read_back() -> None:
    found = LINE.match(PROGRESS)
    assert found is not None and found.groups()[:5] == ("3/400", "98", "391", "loss 1.901", "9,000")
    for seconds in (7, 65, 720, 3720, 25 * 86400 + 8 * 3600):
        found = LINE.match(PROGRESS.replace("1h02m", duration(seconds)))
        assert found is not None and eta_seconds(found) == seconds


@pytest.mark.parametrize("line", ["", DONE, PROGRESS[:-1], PROGRESS + "!"])
def test_what_is_no_progress(line: str) -> None:
    assert LINE.match(line) is None


def test_the_lines_that_runs_write_are_known() -> None:
    """By a log of a real run, which is kept with the documentation."""
    lines = (PROJECT / "docs" / "train.log").read_text().splitlines()
    kinds = [kind_of_line(line) for line in lines]
    assert {"banner", "progress", "stop"} <= set(kinds)
    assert all(LINE.match(line) for line, kind in zip(lines, kinds, strict=True) if kind == "progress")
    assert kinds.count("stop") == 2


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ("=" * 100, "banner"),
        ("== run x  |  started from step 0", "banner"),
        (PROGRESS, "progress"),
        (DATE + "evaluating: 128/128 test images", "phase"),
        (DATE + "epoch 9: measuring BatchNorm statistics, batch 5/16", "phase"),
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
    assert LINES["banner"][0] == "bold cyan" and LINES["progress"][0] == ""

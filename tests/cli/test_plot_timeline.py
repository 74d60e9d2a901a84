"""The figure of runs in time."""

from __future__ import annotations

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from run_logs import BEGIN

from cifar_hpc.cli.figures.timeline import fits, in_words, timeline_figure
from cifar_hpc.runs.timeline import Mark, Span, Timeline

ZERO = BEGIN.timestamp()


def life(later: float = 0.0) -> Timeline:
    """A run of 10 minutes that was preempted once and killed once."""
    begin = ZERO + later
    spans = [("waiting", 0, 60), ("starting", 60, 90), ("training", 90, 200), ("waiting", 200, 320),
             ("starting", 320, 350), ("training", 350, 400), ("lost", 400, 450), ("training", 450, 600)]  # fmt: skip
    marks = [("checkpoint", 150), ("preempted", 200), ("restart", 320), ("checkpoint", 400), ("failed", 450),
             ("finished", 600)]  # fmt: skip
    return Timeline(
        [Span(kind, begin + one, begin + other) for kind, one, other in spans],
        [Mark(kind, begin + at) for kind, at in marks],
        [[(begin + 90, 0.0), (begin + 200, 2.0)], [], [(begin + 350, 2.0), (begin + 450, 4.0)], [(begin + 450, 3.0)]],
    )


def bars(axis: Axes, kind: str) -> list[tuple[float, float]]:
    """(begin, end) of the bars of a kind."""
    boxes = [path.get_extents() for one in axis.collections if one.get_gid() == kind for path in one.get_paths()]
    return [(round(float(box.x0), 3), round(float(box.x1), 3)) for box in boxes]


def marks(axis: Axes, kind: str) -> list[float]:
    lines = [line for line in axis.get_lines() if line.get_gid() == kind]
    return [round(float(x), 3) for line in lines for x in line.get_xdata()]


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for one in figure.legends for text in one.get_texts()]


def test_one_run_has_its_bar_and_its_epochs() -> None:
    figure = timeline_figure([life()], ["a"])
    above, below = figure.axes
    assert bars(below, "waiting") == [(0, 1), (round(200 / 60, 3), round(320 / 60, 3))]
    assert bars(below, "lost") == [(round(400 / 60, 3), 7.5)]
    assert len(bars(below, "training")) == 3
    assert len(bars(below, "starting")) == 2
    assert marks(below, "checkpoint") == [2.5, round(400 / 60, 3)]
    assert marks(below, "preempted") == [round(200 / 60, 3)]
    assert marks(below, "restart") == [round(320 / 60, 3)]
    assert marks(below, "failed") == [7.5]
    assert marks(below, "finished") == [10]
    assert below.get_xlabel() == "minutes since 2026-01-02 03:00:00 UTC"
    drawn = [list(map(float, line.get_ydata())) for line in above.get_lines() if line.get_gid() == "progress"]
    assert drawn == [[0, 2], [2, 4], [3]]
    assert above.get_ylabel() == "epochs done"
    assert legend(figure) == [
        "waiting: 3.0 min",
        "starting: 60 s",
        "training: 5.2 min",
        "training that was lost and done again: 50 s",
        "checkpoint: 2",
        "restart: 1",
        "preempted: 1",
        "failed: 1",
        "finished: 1",
    ]


def test_several_runs_are_rows_on_one_axis_of_time() -> None:
    lives = [life(), life(later=3600 * 5)]
    figure = timeline_figure(lives, ["seed 0", "x" * 81], left_out=7)
    (axis,) = figure.axes
    labels = [label.get_text() for label in axis.get_yticklabels()]
    assert labels[0] == "seed 0"
    assert labels[1] == f"{'x' * 39}…\n{'x' * 40}"
    assert axis.get_xlabel() == "hours since 2026-01-02 03:00 UTC; 7 more runs are not shown"
    assert marks(axis, "finished") == [round(600 / 3600, 3), round(5 + 600 / 3600, 3)]
    assert "preempted: 2" in legend(figure)
    assert not any(text.startswith("checkpoint") for text in legend(figure))


def test_a_long_label_takes_two_lines_and_a_longer_one_is_the_name_of_its_run() -> None:
    label = "lr 0.1, epochs 2, train_size 400, test_size 200, seed 0"
    assert fits(label) and not fits(label * 2)
    (axis,) = timeline_figure([life(), life()], [label, "b"]).axes
    shown = axis.get_yticklabels()[0].get_text()
    assert shown.split("\n") == ["lr 0.1, epochs 2, train_size 400,", "test_size 200, seed 0"]


def test_a_run_of_a_single_moment_can_be_drawn() -> None:
    moment = Timeline([], [Mark("under way", ZERO)])
    figure = timeline_figure([moment], ["a"])
    assert legend(figure) == ["under way: 1"]
    figure.draw_without_rendering()


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.26, "0.3 s"),
        (59.7, "60 s"),
        (91, "1.5 min"),
        (3600, "60 min"),
        (5400, "1.5 h"),
        (36_000, "10 h"),
        (2e5, "2.3 d"),
    ],
)
def test_lengths_of_time(seconds: float, words: str) -> None:
    assert in_words(seconds) == words

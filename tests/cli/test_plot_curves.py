"""The figures of accuracy, loss and learning rate: what is drawn where, and what the legend says."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from run_logs import Maker, metrics_row, series_of

from cifar_hpc.cli.figures.curves import (
    GREY,
    MOST_STYLES,
    OTHERS,
    Series,
    learning_rate_figure,
    looks,
    merge_equal,
    score_figure,
)
from cifar_hpc.cli.figures.style import COLOURS, DOUBLE_COLUMN, SINGLE_COLUMN
from cifar_hpc.runs.logs import metrics_text


def accuracy_figure(series: Sequence[Series]) -> Figure:
    return score_figure(series, "accuracy")


@pytest.fixture
def make(tmp_path: Path) -> Maker:
    return Maker(tmp_path)


def curves(axis: Axes) -> list[list[tuple[float, float]]]:
    return [points(line) for line in axis.get_lines() if line.get_linestyle() != "None"]


def points(line: Line2D) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in zip(*line.get_data(), strict=True)]


def marked(axis: Axes, gid: str) -> list[tuple[float, float]]:
    return [point for line in axis.get_lines() if line.get_gid() == gid for point in points(line)]


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for one in figure.legends for text in one.get_texts()]


def test_a_single_run(make: Maker) -> None:
    figure = accuracy_figure(series_of(make("a", [10, 30, 20], restarts=(2,))))
    (axis,) = figure.axes
    assert curves(axis) == [[(1, 11), (2, 31), (3, 21)], [(1, 10), (2, 30), (3, 20)]]
    assert marked(axis, "restart") == [(2, 30)]
    assert marked(axis, "best") == [(2, 30)]
    assert legend(figure) == ["test: 20.00% at epoch 3", "best: 30.00% at epoch 2", "training", "restart"]
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("epoch", "accuracy (%)")
    assert figure.get_size_inches()[0] == SINGLE_COLUMN


def test_the_loss(make: Maker) -> None:
    figure = score_figure(series_of(make("a", [10, 30])), "loss")
    (axis,) = figure.axes
    assert curves(axis) == [[(1, 0.89), (2, 0.69)], [(1, 0.9), (2, 0.7)]]
    assert legend(figure) == ["test", "training"]


def test_seeds_are_a_line_in_a_band(make: Maker) -> None:
    figure = accuracy_figure(series_of(make("a", [10, 20], train={"seed": 0}), make("b", [14, 30], train={"seed": 1})))
    (axis,) = figure.axes
    assert curves(axis)[1] == [(1, 12), (2, 25)]
    bands = [{(x, round(y, 2)) for x, y in band.get_paths()[0].vertices.tolist()} for band in axis.collections]
    assert bands[1] >= {(1, 9.17), (2, 17.93), (1, 14.83), (2, 32.07)}  # the means ± 2.83 and 7.07
    assert legend(figure) == [
        "test, 2 seeds: 25.00 ± 7.07% at epoch 2",
        "training",
        "mean ± sample standard deviation over the seeds",
    ]


def test_a_seed_that_is_further_goes_on_thinner(make: Maker) -> None:
    figure = accuracy_figure(
        series_of(make("a", [10, 20, 40], train={"seed": 0}), make("b", [14, 30], train={"seed": 1}))
    )
    assert [(2, 20), (3, 40)] in curves(figure.axes[0])
    assert "a seed that is unfinished or further than others" in legend(figure)


def test_a_seed_that_has_not_finished_is_marked_and_in_no_mean(make: Maker) -> None:
    runs = [make(f"r{n}", [10, 20 + n, 30][:done], train={"seed": n, "epochs": 3}) for n, done in enumerate((3, 3, 1))]
    figure = accuracy_figure(series_of(*runs))
    assert curves(figure.axes[0])[2:] == [[(1, 10), (2, 20.5), (3, 30)], [(1, 10)]]
    words = "test, 2 seeds and 1 unfinished (1 of 3 epochs): 30.00 ± 0.00% at epoch 3"
    assert " ".join(legend(figure)[0].split()) == words
    assert "a seed that is unfinished or further than others" in legend(figure)
    alone = score_figure(series_of(runs[2]), "loss")
    assert legend(alone) == ["test (1 of 3 epochs)", "training"]


def test_seeds_of_which_none_has_finished_are_all_in_the_mean(make: Maker) -> None:
    runs = [make(f"r{n}", [10, 20, 30][:done], train={"seed": n, "epochs": 9}) for n, done in enumerate((3, 1))]
    figure = score_figure(series_of(*runs), "loss")
    assert legend(figure)[0] == "test, 2 seeds (1 to 3 of 9 epochs)"


def test_the_axes_have_one_size_whatever_the_legend_has(make: Maker) -> None:
    one, other = make("a", [10, 30, 20], restarts=(2,)), make("b" * 90, [99.123, 99.5, 99.7], optimizer={"lr": 1e-5})
    figures = [score_figure(series_of(*runs), what) for runs in ([one], [one, other]) for what in ("accuracy", "loss")]
    figures += [learning_rate_figure(series_of(one)), learning_rate_figure(series_of(one, other))]
    boxes = []
    for figure in figures:
        figure.draw_without_rendering()
        box = figure.axes[0].get_window_extent()
        boxes.append([round(value) for value in (box.x0, figure.bbox.y1 - box.y1, box.width, box.height)])
        assert figure.axes[0].get_tightbbox().x0 >= 0
        assert all(one.get_window_extent().y1 <= figure.axes[0].get_tightbbox().y0 for one in figure.legends)
    assert boxes == [boxes[0]] * len(boxes)


def test_few_lines_are_distinguishable_without_colours(make: Maker) -> None:
    series = series_of(*(make(f"r{n}", [10 + n] * 50, model={"dropout": n / 10}) for n in range(5)))
    for figure in (score_figure(series, "loss"), accuracy_figure(series)):
        assert len({(line.get_marker(), line.get_linestyle()) for line in figure.axes[1].get_lines()}) == 5


def test_a_number_is_in_a_figure_once(make: Maker) -> None:
    assert legend(accuracy_figure(series_of(make("a", [10, 20])))) == ["test: 20.00% at epoch 2", "training"]


def test_few_groups_share_a_panel(make: Maker) -> None:
    figure = accuracy_figure(series_of(*(make(f"r{rate}", [10, 20], model={"dropout": rate}) for rate in (0.5, 0.1))))
    (axis,) = figure.axes
    by_colour = [(to_hex(line.get_color()), line.is_dashed()) for line in axis.get_lines()]
    assert by_colour == [(colour.lower(), dashed) for colour in COLOURS[:2] for dashed in (True, False)]
    assert legend(figure) == [
        "dropout 0.1: 20.00%",
        "dropout 0.5: 20.00%",
        "test",
        "training",
    ]


def test_more_groups_have_training_and_test_apart(make: Maker) -> None:
    figure = accuracy_figure(
        series_of(*(make(f"r{n}", [10, 20 + n], restarts=(2,), model={"dropout": n / 10}) for n in range(5)))
    )
    training, test = figure.axes
    assert [axis.get_title() for axis in (training, test)] == ["training", "test"]
    assert [curve[1] for curve in curves(test)] == [(2, 20 + n) for n in range(5)]
    assert [curve[1] for curve in curves(training)] == [(2, 21 + n) for n in range(5)]
    assert marked(test, "restart") == [(2, 20 + n) for n in range(5)]
    assert marked(training, "restart") == []
    assert figure.get_size_inches()[0] == DOUBLE_COLUMN
    assert legend(figure)[-1] == "restart"


def test_of_many_groups_the_best_have_a_style_each_and_the_others_are_grey(make: Maker) -> None:
    series = series_of(*(make(f"r{n:02}", [10, 20 + n], restarts=(2,), model={"dropout": n / 100}) for n in range(30)))
    styles = [style for _, style in looks(series)]
    assert styles[: 30 - MOST_STYLES] == [OTHERS] * (30 - MOST_STYLES)
    assert len({tuple(map(str, style.items())) for style in styles}) == MOST_STYLES + 1
    figure = accuracy_figure(series)
    texts = legend(figure)
    assert len(texts) == MOST_STYLES + 2
    assert texts[0] == "dropout 0.16: 36.00%"
    assert "16 with lower test accuracy: 20.00 to 35.00%" in texts
    greys = [line for line in figure.axes[1].get_lines() if line.get_color() == GREY]
    assert len(greys) == 30 - MOST_STYLES
    assert len(marked(figure.axes[1], "restart")) == MOST_STYLES


def test_a_single_epoch_is_a_point(make: Maker) -> None:
    figure = accuracy_figure(series_of(make("a", [10])))
    (axis,) = figure.axes
    assert curves(axis) == [[(1, 11)], [(1, 10)]]
    assert {line.get_marker() for line in axis.get_lines()} == {"."}
    assert [tick for tick in axis.get_xticks() if axis.get_xlim()[0] <= tick <= axis.get_xlim()[1]] == [1]


def test_the_steep_part_of_a_long_run_is_out_of_sight(make: Maker) -> None:
    accuracies = [10, 20, *(90 + epoch / 100 for epoch in range(98))]
    bottom, top = accuracy_figure(series_of(make("a", accuracies))).axes[0].get_ylim()
    assert 89 < bottom < 91 < 91.97 < top < 93
    low, high = score_figure(series_of(make("b", accuracies)), "loss").axes[0].get_ylim()
    assert 0 < low < 0.08 < 0.1 < high < 0.12


def test_equal_learning_rates_are_one_line_without_a_legend(make: Maker) -> None:
    series = series_of(*(make(f"r{n}", [10] * (n + 1), model={"dropout": n / 10}) for n in range(3)))
    figure = learning_rate_figure(series)
    assert curves(figure.axes[0]) == [[(1, 0.1), (2, 0.1), (3, 0.1)]]
    assert legend(figure) == []


def test_learning_rates_are_labelled_by_what_their_runs_share(make: Maker) -> None:
    runs = []
    for schedule in ("cosine", "constant"):
        for rate in (0.0, 0.1):
            run = make(f"{schedule}{rate}", [], model={"dropout": rate}, schedule={"name": schedule})
            rows = [metrics_row(e, 10, lr=0.1 / e if schedule == "cosine" else 0.1) for e in (1, 2, 3)]
            run.metrics.write_text(metrics_text(rows))
            runs.append(run)
    merged = merge_equal(series_of(*runs))
    assert dict(merged) == {
        "schedule constant": {1: 0.1, 2: 0.1, 3: 0.1},
        "schedule cosine": {1: 0.1, 2: 0.05, 3: 0.1 / 3},
    }
    assert legend(learning_rate_figure(series_of(*runs))) == ["schedule constant", "schedule cosine"]


def test_runs_without_a_shared_value_are_labelled_by_the_first(make: Maker) -> None:
    runs = []
    for name, lr in (("a", 0.1), ("b", 0.2)):
        for rate in (0.0, 0.1):
            run = make(f"{name}{rate}", [], model={"dropout": rate}, data={"train_size": 200 if name == "a" else None})
            run.metrics.write_text(metrics_text([metrics_row(1, 10, lr=lr * (1 + rate * (name == "b")))]))
            runs.append(run)
    assert [label for label, _ in merge_equal(series_of(*runs))] == [
        "dropout 0, train_size null",
        "train_size 200",
        "dropout 0.1, train_size null",
    ]


def test_many_learning_rates_end_in_grey(make: Maker) -> None:
    runs = []
    for n in range(20):
        run = make(f"r{n:02}", [], optimizer={"lr": 0.01 * (n + 1)})
        run.metrics.write_text(metrics_text([metrics_row(1, 10, lr=0.01 * (n + 1))]))
        runs.append(run)
    texts = legend(learning_rate_figure(series_of(*runs)))
    assert texts[0] == "lr 0.01"
    assert texts[-1] == f"{20 - MOST_STYLES} others"

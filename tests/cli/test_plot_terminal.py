"""The charts as text."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from run_logs import make_run, write_metrics

from cifar_hpc.cli.figures.curves import MOST_STYLES, Series, read_series
from cifar_hpc.cli.figures.plot import draw
from cifar_hpc.runs.paths import RunPaths
from cifar_hpc.runs.results import group_runs

ESCAPE = re.compile(r"\x1b\[[0-9;]*m")
Make = Callable[..., RunPaths]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def run(name: str, accuracies: Sequence[float], **sections: Any) -> RunPaths:
        paths = make_run(tmp_path, name, **sections)
        write_metrics(paths, accuracies)
        return paths

    return run


def series_of(*runs: RunPaths) -> list[Series]:
    return read_series(group_runs(runs))


def many(make: Make, count: int) -> list[Series]:
    return series_of(*(make(f"r{n:02}", [10, 20 + n], model={"dropout": n / 100}) for n in range(count)))


def test_one_run_plain(make: Make) -> None:
    text = draw(series_of(make("a", [10, 30, 20])), 80, 24, colours=False)
    assert "\x1b" not in text
    assert [line.strip() for line in text.splitlines() if re.fullmatch(r" +[a-z]+( rate| \(%\))?", line)] == [
        "accuracy (%)", "epoch", "loss", "epoch", "learning rate", "epoch",
    ]  # fmt: skip
    assert "  * test: 20.00 at epoch 3, best 30.00\n" in text
    assert "  . training\n" in text
    chart = text[: text.index("epoch")]
    assert chart.count("*") > 10
    assert re.search(r"\n *1 +2 +3\n", chart)


@pytest.mark.parametrize("width", [80, 160, 47, 10])
@pytest.mark.parametrize("colours", [False, True])
def test_no_line_is_wider_than_the_terminal(make: Make, width: int, colours: bool) -> None:
    long = make("a" * 90, [10, 20]), make("b" * 90, [10, 21])
    (long[1].spec).write_text("[")  # so that its name is its label
    text = ESCAPE.sub("", draw(series_of(*long), width, 24, colours=colours))
    assert max(map(len, text.splitlines())) <= max(width, 40)
    assert "best 21.00" in text


def test_several_runs_have_a_letter_each(make: Make) -> None:
    text = draw(many(make, 3), 80, 24, colours=False)
    assert "test accuracy (%)" in text
    assert re.findall(r"^  ([A-Z]) (.*)$", text, re.MULTILINE)[:3] == [
        ("A", "dropout 0: 20.00, best 20.00"),
        ("B", "dropout 0.01: 21.00, best 21.00"),
        ("C", "dropout 0.02: 22.00, best 22.00"),
    ]
    chart = text[: text.index("epoch")]
    assert all(letter in chart for letter in "ABC")


def test_of_many_runs_the_best_are_drawn(make: Make) -> None:
    text = draw(many(make, 30), 80, 24, colours=False)
    letters = re.findall(r"^  ([A-Z]) dropout [0-9.]+: ", text, re.MULTILINE)
    assert len(set(letters)) == len(letters) == MOST_STYLES
    assert f"{30 - MOST_STYLES} with lower test accuracy are not shown." in text


def test_colours_are_those_of_the_legend(make: Make) -> None:
    text = draw(series_of(make("a", [10, 30, 20])), 80, 24, colours=True)
    training, test = (set(re.findall(rf"\x1b\[38;5;({colour})m", text)) for colour in (208, 74))
    assert training and test
    assert "\x1b[38;5;74m──\x1b[0m test" in text
    assert re.search("[\u2801-\u28ff]", text)


def test_seeds_have_a_deviation(make: Make) -> None:
    series = series_of(make("a", [10, 20], train={"seed": 0}), make("b", [14, 30], train={"seed": 1}))
    assert "test: 25.00 ± 7.07 at epoch 2, best 25.00" in draw(series, 80, 24, colours=False)


def test_ascii_for_terminals_that_know_nothing_else(make: Make) -> None:
    series = series_of(make("a", [10, 20], train={"seed": 0}), make("b", [14, 30], train={"seed": 1}))
    text = draw(series, 80, 24, colours=False, ascii_only=True)
    assert text.isascii()
    assert "+-----" in text


def test_the_steep_part_is_left_out_here_too(make: Make) -> None:
    text = draw(series_of(make("a", [10, 20, *[90.0] * 50, *[95.0] * 48])), 80, 24, colours=False)
    labels = [float(found) for found in re.findall(r"^ *([0-9.]+)┤", text[: text.index("epoch")], re.MULTILINE)]
    assert (min(labels), max(labels)) == (90, 96)


def test_epochs_that_are_one_point(make: Make) -> None:
    assert draw(series_of(make("a", [10])), 80, 24, colours=False).count("*") >= 2


def test_what_a_log_says_cannot_steer_the_terminal(make: Make) -> None:
    odd = make("a", [10], data={"source": "folder", "root": "x"})
    other = make("b", [10], data={"source": "folder", "root": "y"})
    text = odd.spec.read_text().replace("root: x", 'root: "z\\u202ez"')
    odd.spec.write_text(text)
    assert "\u202e" not in draw(series_of(odd, other), 80, 24, colours=False)


def test_drawing_again_starts_from_nothing(make: Make) -> None:
    one, other = series_of(make("a", [10, 20])), series_of(make("b", [50, 60, 70]))
    first = draw(one, 80, 24, colours=False)
    draw(other, 60, 30, colours=True)
    assert draw(one, 80, 24, colours=False) == first

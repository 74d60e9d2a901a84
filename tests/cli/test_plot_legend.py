"""Legends below figures."""

from __future__ import annotations

import pytest
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from cifar_hpc.cli.figures.style import ABOVE, BELOW, LETTERS_AN_INCH, MOST_COLUMNS, add_legend, new_figure, shorten

LINE = Line2D([], [], color="red")


@pytest.mark.parametrize(
    ("text", "letters", "short"),
    [("abc", 3, "abc"), ("abcdef", 5, "ab…ef"), ("abcdefg", 4, "a…fg"), ("abcdef", 1, "…"), ("", 0, "")],
)
def test_long_text_loses_its_middle(text: str, letters: int, short: str) -> None:
    assert shorten(text, letters) == short


def test_figures_are_never_cut() -> None:
    figure = new_figure(3, 2)
    figure.subplots()
    add_legend(figure, [(LINE, "x" * 200, ": 95.00%")])
    (text,) = figure.legends[0].get_texts()
    assert len(text.get_text()) < 3 * LETTERS_AN_INCH
    assert text.get_text().endswith("x: 95.00%")


@pytest.mark.parametrize(("words", "columns"), [("ab", 4), ("a" * 30, 3), ("a" * 40, 2), ("a" * 70, 1)])
def test_there_are_as_many_columns_as_fit_and_the_axes_keep_their_height(words: str, columns: int) -> None:
    figure = new_figure(7, 2)
    axis = figure.subplots()
    add_legend(figure, [(LINE, words, "")] * 20)
    figure.draw_without_rendering()
    (legend,) = figure.legends
    assert columns <= MOST_COLUMNS
    assert len({round(text.get_window_extent().x0) for text in legend.get_texts()}) == columns
    assert axis.get_window_extent().height == pytest.approx((2 - ABOVE - BELOW) * figure.dpi)
    assert legend.get_window_extent().width <= figure.bbox.width
    assert legend.get_window_extent().y1 <= axis.get_tightbbox().y0


def test_a_long_name_is_wrapped_before_it_is_cut() -> None:
    figure = new_figure(3.5, 2)
    figure.subplots()
    add_legend(figure, [(LINE, ", ".join(f"key_{n} 0.000{n}" for n in range(9)), ": 95.00 ± 0.20%")])
    (text,) = figure.legends[0].get_texts()
    lines = text.get_text().split("\n")
    assert len(lines) == 3
    assert lines[-1].endswith(": 95.00 ± 0.20%")
    assert "…" not in text.get_text()
    assert text.get_window_extent().x1 <= figure.bbox.x1


def test_samples_may_be_lines_bands_and_patches() -> None:
    figure = new_figure(3, 2)
    figure.subplots()
    patch = Patch(facecolor="red")
    add_legend(figure, [(LINE, "a", ""), ((patch, LINE), "b", ""), (patch, "c", "")], title="what")
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b", "c"]
    assert figure.legends[0].get_title().get_text() == "what"

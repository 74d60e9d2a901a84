"""Legends below figures."""

from __future__ import annotations

import pytest

from cifar_hpc.cli.figures.figure_style import new_figure
from cifar_hpc.cli.figures.plot_legend import LETTERS_AN_INCH, MOST_COLUMNS, ROW, Entry, add_legend, shorten


@pytest.mark.parametrize(
    ("text", "letters", "short"),
    [("abc", 3, "abc"), ("abcdef", 5, "ab…ef"), ("abcdefg", 4, "a…fg"), ("abcdef", 1, "…"), ("", 0, "")],
)
def test_long_text_loses_its_middle(text: str, letters: int, short: str) -> None:
    assert shorten(text, letters) == short


def test_figures_are_never_cut() -> None:
    figure = new_figure(3, 2)
    figure.subplots()
    add_legend(figure, [Entry("x" * 200, {"color": "black"}, figures=": 95.00%")])
    (text,) = figure.legends[0].get_texts()
    assert len(text.get_text()) < 3 * LETTERS_AN_INCH
    assert text.get_text().endswith("x: 95.00%")


@pytest.mark.parametrize(("words", "rows"), [("ab", 5), ("a" * 30, 7), ("a" * 40, 10), ("a" * 70, 20)])
def test_there_are_as_many_columns_as_fit(words: str, rows: int) -> None:
    figure = new_figure(7, 2)
    figure.subplots()
    add_legend(figure, [Entry(words, {"color": "black"})] * 20)
    assert figure.get_size_inches()[1] == pytest.approx(2 + ROW * rows)
    assert rows >= 20 / MOST_COLUMNS


def test_no_entries_are_no_legend() -> None:
    figure = new_figure(3, 2)
    add_legend(figure, [])
    assert figure.legends == []
    assert tuple(figure.get_size_inches()) == (3, 2)


def test_samples_may_be_lines_bands_and_patches() -> None:
    figure = new_figure(3, 2)
    figure.subplots()
    styles = [Entry("a", {"color": "red"}), Entry("b", {"color": "red"}, band=True), Entry("c", {"facecolor": "red"})]
    add_legend(figure, styles, title="what")
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b", "c"]
    assert figure.legends[0].get_title().get_text() == "what"

"""The confusion matrix: counted right, a table of 80 columns, and a figure that holds what was counted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cifar_hpc.cli.evaluate import class_accuracy, confusion, draw, most_confused, short, table
from cifar_hpc.data.info import CIFAR10

LABELS = torch.tensor([0, 0, 0, 0, 3, 3, 9])
PREDICTED = torch.tensor([0, 0, 0, 8, 5, 3, 9])
MATRIX = confusion(LABELS, PREDICTED, 10)


def test_rows_are_true_classes() -> None:
    assert (MATRIX[0][0], MATRIX[0][8], MATRIX[3][5], MATRIX[3][3], MATRIX[9][9]) == (3, 1, 1, 1, 1)
    assert sum(map(sum, MATRIX)) == len(LABELS)
    assert [class_accuracy(MATRIX, label) for label in (0, 1, 3, 9)] == [75, None, 50, 100]


def test_the_table_fits_80_columns_and_says_it_all() -> None:
    large = [[count * 1111 + 1000 for count in row] for row in MATRIX]
    assert max(map(len, table(large, ["x" * 50] * 10))) <= 80
    lines = table(MATRIX, CIFAR10)
    assert lines[2].split() == ["0", "airplane", "75.00%", "3", *["."] * 7, "1", "."]
    assert lines[3].split() == ["1", "automobile", "-", *["."] * 10]
    assert len({len(line) for line in lines[1:]}) == 1
    predicted = [line.split() for line in lines]
    assert predicted[0] == ["predicted"] and predicted[1][-10:] == [str(n) for n in range(10)]


def test_the_pairs_that_are_confused_most() -> None:
    assert most_confused(MATRIX, CIFAR10) == [" 50.0% of cat taken for dog", " 25.0% of airplane taken for ship"]
    assert most_confused(confusion(LABELS, LABELS, 10), CIFAR10) == []


def test_names_of_unknown_origin_are_cut_and_harmless() -> None:
    assert short("cat") == "cat"
    assert short("\x1b[2J\n" + "x" * 90) == "\\x1b[2J xxx…"


def test_a_hundred_classes_are_a_list_and_no_wall() -> None:
    names = [f"a fish of the kind {n}" for n in range(100)]
    labels = torch.arange(1000) % 100
    matrix = confusion(labels, torch.where(labels == 7, 9, labels), 100)
    lines = table(matrix, names)
    assert len(lines) == 101 and max(map(len, lines)) <= 80
    assert lines[8].split() == "7 a fish of the kind 7 10 0.00% a fish of the kind 9 (10)".split()
    assert lines[9].split() == "8 a fish of the kind 8 10 100.00%".split()
    assert most_confused(matrix, names) == ["100.0% of a fish of the kind 7 taken for a fish of the kind 9"]
    confused = confusion(labels, (labels + labels // 5) % 100, 100)
    assert len(most_confused(confused, names)) == 10


@pytest.mark.parametrize("count", [2, 16, 17, 100])
def test_a_figure_of_any_number_of_classes(tmp_path: Path, count: int) -> None:
    labels = torch.arange(2 * count) % count
    matrix = confusion(labels, labels.flip(0), count)
    svg = draw(matrix, [f"name {n}" for n in range(count)], "title", tmp_path)[1].read_text()
    assert svg.count(">name 1</text>") == 2
    assert (f">{100 * matrix[0][count - 1] / 2:.0f}</text>" in svg) is (count <= 16) or count > 16


def test_the_figure_holds_the_shares(tmp_path: Path) -> None:
    names = ["$x^2$", *CIFAR10[1:]]  # no formula
    paths = draw(MATRIX, names, "run, epoch 3: 71.43%", tmp_path)
    assert [path.name for path in paths] == ["confusion.png", "confusion.svg"]
    assert paths[0].read_bytes()[:4] == b"\x89PNG"
    svg = paths[1].read_text()
    for text in ("75.0", "25.0", "50.0", "100", "truck", "$x^2$", "predicted class", "run, epoch 3: 71.43%"):
        assert f">{text}</text>" in svg, text

"""Who is taken for whom: the confusion matrix, as a table of 80 columns and as a figure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from cifar_hpc.figure_style import new_figure, save_figure
from cifar_hpc.image_folder import CLASSES
from cifar_hpc.printable import printable

NAME_WIDTH = 12
Matrix = list[list[int]]


def confusion(labels: Tensor, predicted: Tensor) -> Matrix:
    """How many images of each true class (row) were taken for each class (column).

    Args:
        labels, predicted: int64 [N] of classes 0 to 9.
    """
    counts = torch.bincount(labels * CLASSES + predicted, minlength=CLASSES**2)
    matrix: Matrix = counts.view(CLASSES, CLASSES).tolist()
    return matrix


def class_accuracy(matrix: Matrix, label: int) -> float | None:
    """Per cent of the class's images that were recognised; None where there is no image of it."""
    images = sum(matrix[label])
    return 100 * matrix[label][label] / images if images else None


def table(matrix: Matrix, names: Sequence[str]) -> list[str]:
    """Lines of at most 80 columns, as long as no count has more than four digits."""
    width = 1 + max(4, *(len(str(count)) for row in matrix for count in row))
    head = "".join(f"{label:{width}}" for label in range(CLASSES))
    lines = [f"{'':{NAME_WIDTH + 11}}predicted", f"{'true':{NAME_WIDTH + 2}} accuracy{head}"]
    for label, row in enumerate(matrix):
        accuracy = class_accuracy(matrix, label)
        share = "-" if accuracy is None else f"{accuracy:.2f}%"
        counts = "".join(f"{count or '.':>{width}}" for count in row)
        lines.append(f"{label} {short(names[label]):{NAME_WIDTH}}{share:>9}{counts}")
    return lines


def short(name: str) -> str:
    """A class's name, fit for a column of a table."""
    text = " ".join(printable(name).split())
    return text if len(text) <= NAME_WIDTH else text[: NAME_WIDTH - 2] + ".."


def most_confused(matrix: Matrix, names: Sequence[str], count: int = 3) -> list[str]:
    """The pairs of classes that are taken for one another most often, such as `12.1% of cat taken for dog`."""
    shares = [
        (100 * matrix[true][predicted] / sum(matrix[true]), true, predicted)
        for true in range(CLASSES)
        for predicted in range(CLASSES)
        if predicted != true and matrix[true][predicted]
    ]
    worst = sorted(shares, key=lambda entry: (-entry[0], entry[1:]))[:count]
    return [
        f"{share:5.1f}% of {short(names[true])} taken for {short(names[predicted])}" for share, true, predicted in worst
    ]


def draw(matrix: Matrix, names: Sequence[str], title: str, folder: Path) -> list[Path]:
    """Write confusion.png and confusion.svg into `folder`: shares of each true class, in %. Returns their paths."""
    shares = [[100 * count / max(1, sum(row)) for count in row] for row in matrix]
    figure = new_figure(5.2, 4.5)
    axes = figure.add_subplot()
    # The colour goes with the square root: most of what is confused is below 10%, and would look like nothing.
    image = axes.imshow([[share**0.5 for share in row] for row in shares], cmap="Blues", vmin=0, vmax=10)
    for true, row in enumerate(shares):
        for predicted, share in enumerate(row):
            if matrix[true][predicted]:
                text = f"{share:.1f}" if share < 99.95 else "100"
                colour = "white" if share > 40 else "black"
                axes.text(predicted, true, text, ha="center", va="center", fontsize=6.5, color=colour)
    labels = [short(name) for name in names]
    axes.set_xticks(range(CLASSES), labels, rotation=40, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(CLASSES), labels)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    axes.set_title(printable(title))
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    bar = figure.colorbar(image, ax=axes, fraction=0.046, pad=0.03)
    ticks = (0, 1, 5, 10, 25, 50, 100)
    bar.set_ticks([share**0.5 for share in ticks], labels=[str(share) for share in ticks])
    bar.set_label("images of the true class, %")
    bar.outline.set_visible(False)
    return save_figure(figure, folder, "confusion", printable(title))

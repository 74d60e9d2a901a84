"""Figure of a network: the blocks and the layers of one of them, or a table of layers where it is the user's own."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from cifar_hpc.cli.figures.style import DOUBLE_COLUMN, Axes, Figure, new_figure, shorten
from cifar_hpc.config.spec import ModelSpec
from cifar_hpc.data.info import DatasetInfo

if TYPE_CHECKING:
    from cifar_hpc.models.summary import Architecture, Block, Layer

# Inches from the left or the top. Blocks, shapes and parameters are three columns, the single block is a fourth.
BLOCK_LEFT, BLOCK_WIDTH = 0.08, 2.35
SHAPE_RIGHT, PARAMETERS_RIGHT = 3.35, 4.1
DETAIL_LEFT, SHORTCUT_LEFT, DETAIL_WIDTH = 4.45, 5.75, 1.15
LOW, HIGH, GAP, TOP, BOTTOM = 0.23, 0.36, 0.13, 0.35, 0.3
SUM = 0.16  # the height of its sign
FILLS = {"bottleneck": "#cfe6f5", "dropout": "#eeeeee", "linear": "#fbe3c0", "stem": "#d5efe4"}
EDGE = "#444444"
LINE, MOST_LAYERS = 0.17, 45  # of the table
SMALL = 6.5  # points
DETAIL_LETTERS = 46  # the width of a box


class Row(NamedTuple):
    """A box of the figure with a line of detail, and the shape and parameters beside it."""

    words: str
    detail: str
    shape: tuple[int, ...]
    parameters: int | None

    @property
    def height(self) -> float:
        return HIGH if self.detail else LOW


def architecture_figure(spec: ModelSpec, info: DatasetInfo, code: Path) -> Figure:
    """Draw the network of `spec`.

    Args:
        code: folder of the run's copies of user files.

    Raises:
        ImportError: PyTorch is not installed, or does not load.
        RunFailedError: the user's network cannot be built.
    """
    from cifar_hpc.models.summary import describe

    if spec.target is not None:
        return _table_figure(spec, info, code)
    network = describe(spec, info)
    rows = rows_of(network)
    single = next(block for block in network.blocks if block.shortcut)
    layers = TOP + (LOW + GAP) * (len(single.layers) + 2) + BOTTOM
    height = max(TOP + sum(row.height + GAP for row in rows) + BOTTOM, layers)
    figure = new_figure(DOUBLE_COLUMN, height)
    figure.set_layout_engine("none")
    axis: Axes = figure.add_axes((0, 0, 1, 1), xlim=(0, DOUBLE_COLUMN), ylim=(height, 0))
    axis.axis("off")
    _draw_rows(axis, rows, network.parameters)
    end = _draw_single(axis, single)
    if any(block.words == single.words and not block.shortcut for block in network.blocks):
        words = "Later blocks of a size add their input\nunchanged (identity shortcut)."
        _text(axis, DETAIL_LEFT, end + 0.18, words, ha="left", fontsize=SMALL, color=EDGE)
    return figure


def _table_figure(spec: ModelSpec, info: DatasetInfo, code: Path) -> Figure:
    from cifar_hpc.models.network import build_network
    from cifar_hpc.models.summary import table

    network = build_network(spec, info, 0, code)
    rows: list[tuple[str, str, tuple[int, ...], int | None]] = [
        ("images", "", (3, info.image_size, info.image_size), None)
    ]
    rows += [(name, layer.words, layer.shape, layer.parameters) for name, layer in table(network, info, MOST_LAYERS)]
    height = TOP + 2 * BOTTOM + LINE * (len(rows) + 1)
    figure = new_figure(DOUBLE_COLUMN, height)
    figure.set_layout_engine("none")
    axis: Axes = figure.add_axes((0, 0, 1, 1), xlim=(0, DOUBLE_COLUMN), ylim=(height, 0))
    axis.axis("off")
    total = ("total", "", (), sum(parameter.numel() for parameter in network.parameters()))
    columns = zip((0.1, 2.6, 5.4, DOUBLE_COLUMN - 0.1), ("left", "left", "right", "right"), strict=True)
    for number, (left, side) in enumerate(columns):
        _text(axis, left, TOP, ("name", "layer", "output", "parameters")[number], ha=side, color=EDGE)
        for line, (name, words, shape, parameters) in enumerate([*rows, total], 1):
            y = TOP + LINE * (line + 0.5 * (line > len(rows)))
            count = "" if parameters is None else f"{parameters:,}"
            _text(axis, left, y, (shorten(name, 40), shorten(words, 40), _dimensions(shape), count)[number], ha=side)
    for y in (TOP + LINE / 2, TOP + LINE * (len(rows) + 0.75)):
        axis.plot([0.1, DOUBLE_COLUMN - 0.1], [y, y], color=EDGE, linewidth=0.6)
    return figure


def rows_of(network: Architecture) -> list[Row]:
    """The rows of the figure, equal blocks that follow each other in one."""
    rows = [Row("images", "", network.input, None)]
    for block, equal in groupby(network.blocks):
        count = len(list(equal))
        words = (f"{count} × " if count > 1 else "") + block.words
        words += ", shortcut by 1×1 convolution" if block.shortcut else ""
        convolutions = [layer for layer in block.layers if "convolution" in layer.words]
        detail = " → ".join(layer.words.replace(" convolution", f", {layer.shape[0]}") for layer in convolutions)
        rows.append(Row(words, detail, block.shape, count * block.parameters))
    return [*rows[:-1], Row("global average pooling", "", network.features, 0), rows[-1]]


def _draw_rows(axis: Axes, rows: Sequence[Row], parameters: int) -> None:
    middle = BLOCK_LEFT + BLOCK_WIDTH / 2
    _text(axis, SHAPE_RIGHT, TOP - 0.12, "output", ha="right", color=EDGE)
    _text(axis, PARAMETERS_RIGHT, TOP - 0.12, "parameters", ha="right", color=EDGE)
    y = TOP
    for row in rows:
        if y > TOP:
            _arrow(axis, (middle, y - GAP), (middle, y))
        _box(axis, BLOCK_LEFT, y, BLOCK_WIDTH, row.height, row.words)
        _text(axis, middle, y + row.height * 0.72, shorten(row.detail, DETAIL_LETTERS), fontsize=SMALL, color=EDGE)
        _text(axis, SHAPE_RIGHT, y + row.height / 2, _dimensions(row.shape), ha="right")
        if row.parameters is not None:
            _text(axis, PARAMETERS_RIGHT, y + row.height / 2, f"{row.parameters:,}", ha="right")
        y += row.height + GAP
    left = SHAPE_RIGHT - 0.85
    axis.plot([left, PARAMETERS_RIGHT], [y - 0.05, y - 0.05], color=EDGE, linewidth=0.6)
    _text(axis, left, y + 0.07, "total", ha="left")
    _text(axis, PARAMETERS_RIGHT, y + 0.07, f"{parameters:,}", ha="right", weight="bold")


def _draw_single(axis: Axes, block: Block) -> float:
    """Draw each layer of one block, the shortcut beside them, and the sum of both; return the lower end."""
    left, right = DETAIL_LEFT + DETAIL_WIDTH / 2, SHORTCUT_LEFT + DETAIL_WIDTH / 2
    _text(axis, DETAIL_LEFT, TOP - 0.12, f"the first {block.words}, {_dimensions(block.shape)}", ha="left", color=EDGE)
    y = _draw_layers(axis, DETAIL_LEFT, TOP, block.layers[:-1])
    _arrow(axis, (left, y), (left, y + GAP))
    y += GAP + SUM / 2
    begin = TOP + 0.03
    top = (begin + y - SUM / 2) / 2 - len(block.shortcut) * (LOW + GAP) / 2 - GAP
    axis.plot([left, right, right], [begin, begin, top], color=EDGE, linewidth=0.7, snap=False)
    end = _draw_layers(axis, SHORTCUT_LEFT, top, block.shortcut)
    axis.plot([right, right], [end, y], color=EDGE, linewidth=0.7, snap=False)
    _arrow(axis, (right, y), (left + SUM / 2, y))
    axis.plot(left, y, "o", markersize=SUM * 72, color="white", markeredgecolor=EDGE, markeredgewidth=0.6)
    _text(axis, left, y, "+", va="center_baseline", fontsize=9)
    y = _draw_layers(axis, DETAIL_LEFT, y + SUM / 2, block.layers[-1:])
    _arrow(axis, (left, y), (left, y + GAP))
    return y + GAP


def _draw_layers(axis: Axes, left: float, y: float, layers: Sequence[Layer]) -> float:
    """Draw boxes below each other, an arrow into each; return the lower end."""
    middle = left + DETAIL_WIDTH / 2
    for layer in layers:
        _arrow(axis, (middle, y), (middle, y + GAP))
        words = layer.words.replace(" convolution", f" conv, {layer.shape[0]}")
        _box(axis, left, y + GAP, DETAIL_WIDTH, LOW, words.replace("batch normalisation", "batch norm"))
        y += GAP + LOW
    return y


def _dimensions(shape: Sequence[int]) -> str:
    return " × ".join(map(str, shape))


def _box(axis: Axes, left: float, top: float, width: float, height: float, words: str) -> None:
    from matplotlib.patches import FancyBboxPatch

    fill = next((colour for kind, colour in FILLS.items() if kind in words), "white")
    shape: Any = {"boxstyle": "round,pad=0,rounding_size=0.05", "facecolor": fill, "edgecolor": EDGE, "linewidth": 0.6}
    axis.add_patch(FancyBboxPatch((left, top), width, height, **shape))
    _text(axis, left + width / 2, top + height * (0.5 if height == LOW else 0.3), words)


def _text(axis: Axes, x: float, y: float, words: str, ha: str = "center", fontsize: float = 7, **style: Any) -> None:
    axis.text(x, y, words, ha=ha, fontsize=fontsize, **{"va": "center"} | style)


def _arrow(axis: Axes, begin: tuple[float, float], end: tuple[float, float]) -> None:
    style = {"arrowstyle": "-|>,head_width=0.12,head_length=0.2", "color": EDGE, "lw": 0.7, "shrinkA": 0, "shrinkB": 0}
    axis.annotate("", end, begin, arrowprops=style)

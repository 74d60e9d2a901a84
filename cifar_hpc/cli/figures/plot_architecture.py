"""The figure of the network: its blocks with shapes and parameters, and one bottleneck block taken apart."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cifar_hpc.cli.figures.figure_style import DOUBLE_COLUMN, new_figure
from cifar_hpc.cli.figures.plot_legend import shorten
from cifar_hpc.config.spec import ModelSpec

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from cifar_hpc.models.summary import Architecture, Block, Layer


# Inches. The blocks, their shapes and their parameters stand in three columns, the single block in a fourth.
BLOCK_LEFT, BLOCK_WIDTH = 0.08, 2.35
SHAPE_RIGHT, PARAMETERS_RIGHT = 3.35, 4.1
DETAIL_LEFT, SHORTCUT_LEFT, DETAIL_WIDTH = 4.45, 5.75, 1.15
LOW, HIGH, GAP, TOP, BOTTOM = 0.23, 0.36, 0.13, 0.35, 0.3
FILLS = {
    "bottleneck": "#cfe6f5",
    "dropout": "#eeeeee",
    "convolution": "#cfe6f5",
    "linear": "#fbe3c0",
    "stem": "#d5efe4",
}
EDGE = "#444444"
SMALL = 6.5  # points
DETAIL_LETTERS = 46  # which a box is wide enough for
ADDED = 0.16  # inches across the sign of the sum


@dataclass(frozen=True)
class Row:
    """A box of the figure: its words, a line of detail, and what stands beside it."""

    words: str
    detail: str
    shape: tuple[int, ...]
    parameters: int | None

    @property
    def height(self) -> float:
        return HIGH if self.detail else LOW


def architecture_figure(spec: ModelSpec) -> Figure:
    """The network of `spec`, built and run on PyTorch's meta device.

    Raises:
        ImportError: PyTorch is not installed, or does not load.
    """
    from cifar_hpc.models.summary import describe

    return draw(describe(spec))


def draw(network: Architecture) -> Figure:
    """The figure of a network that has been described."""
    rows = rows_of(network)
    single = next((b for b in network.blocks if b.shortcut), None) or max(network.blocks, key=lambda b: len(b.layers))
    height = max(TOP + sum(row.height + GAP for row in rows) + BOTTOM, _detail_height(single))
    figure = new_figure(DOUBLE_COLUMN, height)
    figure.set_layout_engine("none")
    axis: Axes = figure.add_axes((0, 0, 1, 1))
    axis.set_xlim(0, DOUBLE_COLUMN)
    axis.set_ylim(height, 0)
    axis.axis("off")
    _draw_rows(axis, rows, network.parameters)
    _draw_single(axis, single, others=any(b.words == single.words and not b.shortcut for b in network.blocks))
    return figure


def rows_of(network: Architecture) -> list[Row]:
    """The rows of the figure, blocks that are alike and follow each other in one."""
    rows = [Row("images", "", network.input, None)]
    for blocks in _runs(network.blocks):
        first = blocks[0]
        if network.features != first.shape and first is network.blocks[-1]:
            rows.append(Row("global average pooling", "", network.features, 0))
        times = f"{len(blocks)} × " if len(blocks) > 1 else ""
        words = f"{times}{first.words}" + (", shortcut by 1×1 convolution" if first.shortcut else "")
        parameters = sum(block.parameters for block in blocks)
        rows.append(Row(words, _convolutions(first.layers), first.shape, parameters))
    return rows


def _runs(blocks: Sequence[Block]) -> Iterable[list[Block]]:
    """Blocks that follow each other and differ in nothing that is shown."""
    together: list[Block] = []
    for block in blocks:
        if together and not _alike(together[-1], block):
            yield together
            together = []
        together.append(block)
    yield together


def _alike(one: Block, other: Block) -> bool:
    def shown(block: Block) -> list[Any]:
        return [block.words, [(x.words, x.shape, x.parameters) for x in (*block.layers, *block.shortcut)]]

    return shown(one) == shown(other)


def _convolutions(layers: Sequence[Layer]) -> str:
    """`1×1, 64 → 3×3, 64, stride 2 → 1×1, 256`."""
    found = (layer for layer in layers if "convolution" in layer.words)
    return " → ".join(layer.words.replace(" convolution", f", {layer.shape[0]}") for layer in found)


def _draw_rows(axis: Axes, rows: Sequence[Row], parameters: int) -> None:
    middle = BLOCK_LEFT + BLOCK_WIDTH / 2
    for words, right in (("output", SHAPE_RIGHT), ("parameters", PARAMETERS_RIGHT)):
        axis.text(right, TOP - 0.12, words, ha="right", va="center", fontsize=7, color=EDGE)
    y = TOP
    for number, row in enumerate(rows):
        _box(axis, BLOCK_LEFT, y, BLOCK_WIDTH, row.height, row.words, shorten(row.detail, DETAIL_LETTERS))
        beside = y + row.height / 2
        axis.text(SHAPE_RIGHT, beside, _in_words(row.shape), ha="right", va="center", fontsize=7)
        if row.parameters is not None:
            axis.text(PARAMETERS_RIGHT, beside, f"{row.parameters:,}", ha="right", va="center", fontsize=7)
        y += row.height
        if number < len(rows) - 1:
            _arrow(axis, (middle, y), (middle, y + GAP))
        y += GAP
    axis.plot([SHAPE_RIGHT - 0.85, PARAMETERS_RIGHT], [y - 0.05] * 2, color=EDGE, linewidth=0.6)
    axis.text(SHAPE_RIGHT - 0.85, y + 0.07, "in all", ha="left", va="center", fontsize=7)
    axis.text(PARAMETERS_RIGHT, y + 0.07, f"{parameters:,}", ha="right", va="center", fontsize=7, weight="bold")


def _detail_height(block: Block) -> float:
    return TOP + (LOW + GAP) * (len(block.layers) + 2) + BOTTOM


def _draw_single(axis: Axes, block: Block, others: bool) -> None:
    """One block with each of its layers; the shortcut beside them, and where both are added."""
    middle = DETAIL_LEFT + DETAIL_WIDTH / 2
    title = f"the first {block.words}" + (f", {_in_words(block.shape)}" if block.shape else "")
    axis.text(DETAIL_LEFT, TOP - 0.12, title, va="center", fontsize=7, color=EDGE)
    *layers, last = block.layers
    y = TOP + GAP
    _arrow(axis, (middle, TOP), (middle, y))
    for layer in layers:
        y = _layer(axis, DETAIL_LEFT, y, layer)
    if block.shortcut:
        _draw_shortcut(axis, block.shortcut, y)
        axis.text(middle, y + ADDED / 2, "+", ha="center", va="center_baseline", fontsize=9)
        axis.plot([middle], [y + ADDED / 2], "o", markersize=ADDED * 72, color="white", markeredgecolor=EDGE, mew=0.6)
        y += ADDED + GAP
        _arrow(axis, (middle, y - GAP), (middle, y))
    y = _layer(axis, DETAIL_LEFT, y, last)
    if block.shortcut and others:
        words = "Later blocks of a size add what they are\ngiven, as it is (shortcut by the identity)."
        axis.text(DETAIL_LEFT, y + 0.18, words, va="center", fontsize=SMALL, color=EDGE)


def _draw_shortcut(axis: Axes, layers: Sequence[Layer], end: float) -> None:
    """From the block's input around the other layers to the sum, which is at `end`."""
    left, right = DETAIL_LEFT + DETAIL_WIDTH / 2, SHORTCUT_LEFT + DETAIL_WIDTH / 2
    begin = TOP + 0.03
    top = (begin + end) / 2 - len(layers) * (LOW + GAP) / 2
    axis.plot([left, right], [begin, begin], color=EDGE, linewidth=0.7)
    _arrow(axis, (right, begin), (right, top))
    y = top
    for layer in layers[:-1]:
        y = _layer(axis, SHORTCUT_LEFT, y, layer)
    _box(axis, SHORTCUT_LEFT, y, DETAIL_WIDTH, LOW, _layer_words(layers[-1]), "")
    axis.plot([right, right], [y + LOW, end + ADDED / 2], color=EDGE, linewidth=0.7)
    _arrow(axis, (right, end + ADDED / 2), (left + ADDED / 2, end + ADDED / 2))


def _layer(axis: Axes, left: float, y: float, layer: Layer) -> float:
    """A box with an arrow out of it; returns where that ends."""
    _box(axis, left, y, DETAIL_WIDTH, LOW, _layer_words(layer), "")
    middle = left + DETAIL_WIDTH / 2
    _arrow(axis, (middle, y + LOW), (middle, y + LOW + GAP))
    return y + LOW + GAP


def _layer_words(layer: Layer) -> str:
    return layer.words.replace(" convolution", f" conv, {layer.shape[0]}").replace("batch normalisation", "batch norm")


def _in_words(shape: Sequence[int]) -> str:
    return " × ".join(map(str, shape))


def _box(axis: Axes, left: float, top: float, width: float, height: float, words: str, detail: str) -> None:
    from matplotlib.patches import FancyBboxPatch

    fill = next((colour for kind, colour in FILLS.items() if kind in words), "white")
    style = "round,pad=0,rounding_size=0.05"
    axis.add_patch(
        FancyBboxPatch((left, top), width, height, boxstyle=style, facecolor=fill, edgecolor=EDGE, linewidth=0.6)
    )  # fmt: skip
    middle, line = left + width / 2, top + height * (0.3 if detail else 0.5)
    axis.text(middle, line, words, ha="center", va="center", fontsize=7)
    if detail:
        axis.text(middle, top + height * 0.72, detail, ha="center", va="center", fontsize=SMALL, color=EDGE)


def _arrow(axis: Axes, begin: tuple[float, float], end: tuple[float, float]) -> None:
    style = {"arrowstyle": "-|>,head_width=0.12,head_length=0.2", "color": EDGE, "lw": 0.7, "shrinkA": 0, "shrinkB": 0}
    axis.annotate("", end, begin, arrowprops=style)

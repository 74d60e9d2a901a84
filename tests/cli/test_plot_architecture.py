"""The figure of the network."""

from __future__ import annotations

from collections import Counter

import pytest
from helpers import INFO, PROJECT
from matplotlib.patches import FancyBboxPatch

from cifar_hpc.cli.figures.architecture import Row, architecture_figure, rows_of
from cifar_hpc.config.spec import ModelSpec
from cifar_hpc.models.summary import describe


def test_rows_put_blocks_together_that_are_alike() -> None:
    assert rows_of(describe(ModelSpec(blocks=(3, 1), widths=(64, 128), activation="relu", dropout=0.25), INFO)) == [
        Row("images", "", (3, 32, 32), None),
        Row("stem", "3×3, 32", (32, 32, 32), 928),
        Row("bottleneck, shortcut by 1×1 convolution", "1×1, 64 → 3×3, 64 → 1×1, 256", (256, 32, 32), 64_768),
        Row("2 × bottleneck", "1×1, 64 → 3×3, 64 → 1×1, 256", (256, 32, 32), 140_800),
        Row("dropout 0.25", "", (256, 32, 32), 0),
        Row(
            "bottleneck, shortcut by 1×1 convolution",
            "1×1, 128 → 3×3, 128, stride 2 → 1×1, 512",
            (512, 16, 16),
            379_392,
        ),
        Row("dropout 0.25", "", (512, 16, 16), 0),
        Row("global average pooling", "", (512,), 0),
        Row("linear", "", (10,), 5_130),
    ]


def test_the_figure_has_all_words_and_numbers() -> None:
    figure = architecture_figure(ModelSpec(), INFO, PROJECT)
    (axis,) = figure.axes
    texts = Counter(text.get_text() for text in axis.texts)
    for number in ("928", "64,768", "2,234,368", "10,250", "4,903,082", "1024 × 8 × 8", "output", "parameters", "+"):
        assert texts[number] >= 1, number
    assert texts["dropout 0.2"] == 3
    assert texts["2 × bottleneck"] == 3
    assert texts["1×1 conv, 64"] == texts["3×3 conv, 64"] == 1
    assert texts["batch norm"] == 4
    assert texts["leaky ReLU"] == 3


@pytest.mark.parametrize(
    "spec", [ModelSpec(), ModelSpec(blocks=(1,), widths=(4,)), ModelSpec(blocks=(1,) * 5, widths=(8,) * 5)]
)
def test_everything_is_within_the_figure(spec: ModelSpec) -> None:
    figure = architecture_figure(spec, INFO, PROJECT)
    (axis,) = figure.axes
    width, height = figure.get_size_inches()
    for box in (patch.get_bbox() for patch in axis.patches if isinstance(patch, FancyBboxPatch)):
        assert 0 <= box.x0 < box.x1 <= width
        assert 0 <= box.y0 < box.y1 <= height
    drawn = [text.get_window_extent() for text in axis.texts if text.get_text()]
    assert all(b.x0 >= 0 and b.x1 <= width * figure.dpi and b.y0 >= 0 and b.y1 <= height * figure.dpi for b in drawn)


def test_a_network_of_first_blocks_says_nothing_of_later_ones() -> None:
    (axis,) = architecture_figure(ModelSpec(blocks=(1,), widths=(4,)), INFO, PROJECT).axes
    assert not any("Later blocks" in text.get_text() for text in axis.texts)

"""Style of all figures: colours, sizes, legends, and files of the same figure as PNG and SVG."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cifar_hpc.files import DIRECTORY_MODE, write_atomic

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# The palette of Okabe and Ito, distinguishable with any colour vision (jfly.uni-koeln.de/color).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
PNG_DPI = 300  # what journals ask for
# Inches: figures are drawn in the size in which they are printed, so that their text keeps its size.
SINGLE_COLUMN, DOUBLE_COLUMN = 3.5, 7.0
LETTERS_AN_INCH = 18  # in a legend
SAMPLE_LETTERS = 8  # the width of a legend's sample and of the gap to the next column
MOST_COLUMNS = 4
LEGEND_MARGIN = 0.1  # inches, above and below together
STYLE: dict[Any, dict[str, Any]] = {  # matplotlib's rcParams by group
    "font": {"size": 8},
    "axes": {"titlesize": 8, "linewidth": 0.6, "grid": True, "axisbelow": True, "xmargin": 0.03},
    "axes.spines": {"top": False, "right": False},
    "grid": {"color": "#dddddd", "linewidth": 0.5},
    "xtick": {"labelsize": 7, "major.width": 0.6},
    "ytick": {"labelsize": 7, "major.width": 0.6},
    "lines": {"linewidth": 1.2},
    "hatch": {"linewidth": 0.4},
    "legend": {"frameon": False, "fontsize": 7, "title_fontsize": 7, "labelspacing": 0.3, "handlelength": 2.4},
    "text": {"parse_math": False},  # names and values with a $ are shown as they are
    "svg": {"hashsalt": "cifar_hpc", "fonttype": "none"},  # the same figure is the same file
}


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of `width` x `height` inches in this style, without a display or pyplot's state."""
    import matplotlib
    from matplotlib.figure import Figure

    for group, values in STYLE.items():
        matplotlib.rc(group, **values)
    return Figure(figsize=(width, height), dpi=PNG_DPI, layout="constrained")


def add_legend(figure: Figure, entries: Sequence[tuple[Any, str, str]], title: str = "") -> None:
    """Put a legend below the axes of a figure, in as many columns as fit, and make the figure as much higher.

    Args:
        entries: sample (as matplotlib's legends take it), name and values; a long name loses its middle, values
            are never cut.
    """
    width, height = figure.get_size_inches()
    letters = int(width * LETTERS_AN_INCH)
    texts = [shorten(name, letters - SAMPLE_LETTERS - len(values)) + values for _, name, values in entries]
    columns = min(MOST_COLUMNS, letters // (max(map(len, texts)) + SAMPLE_LETTERS), len(texts))
    legend = figure.legend(
        [sample for sample, _, _ in entries],
        texts,
        loc="outside lower center",
        ncols=max(1, columns),
        title=title or None,
        alignment="left",
    )
    figure.set_size_inches(width, height + legend.get_window_extent().height / figure.dpi + LEGEND_MARGIN)


def shorten(text: str, letters: int) -> str:
    """`text` of at most so many letters, without its middle where it is longer: names often differ in their ends."""
    if len(text) <= letters:
        return text
    head = (letters - 1) // 2
    return f"{text[:head]}…{text[len(text) - (letters - 1 - head) :]}"


def save_figure(figure: Figure, folder: Path, name: str, title: str = "") -> list[Path]:
    """Write `name`.png and `name`.svg into a folder, with a title in their metadata; return their paths.

    Raises:
        OSError: a file cannot be written.
    """
    folder.mkdir(DIRECTORY_MODE, parents=True, exist_ok=True)
    paths = []
    for form, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
        content = io.BytesIO()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)  # a folder's name in another script
            figure.savefig(content, format=form, metadata={"Title": title or name, **metadata})
        paths.append(folder / f"{name}.{form}")
        write_atomic(paths[-1], content.getvalue())
    return paths

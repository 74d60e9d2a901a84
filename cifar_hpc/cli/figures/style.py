"""Style of all figures: colours, sizes, legends, and files of the same figure as PNG and SVG."""

import io
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cifar_hpc.cli import terminal
from cifar_hpc.files import write_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes as Axes
    from matplotlib.figure import Figure as Figure
else:  # loaded only to draw
    Axes = Figure = Any

# The palette of Okabe and Ito, distinguishable with any colour vision (jfly.uni-koeln.de/color).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
PNG_DPI = 300  # what journals ask for
# Inches: figures are drawn in the size in which they are printed, so that their text keeps its size.
SINGLE_COLUMN, DOUBLE_COLUMN = 3.5, 7.0
LETTERS_AN_INCH = 18  # in a legend
SAMPLE_LETTERS = 8  # the width of a legend's sample and of the gap to the next column
MOST_COLUMNS = 4
LEGEND_MARGIN = 0.1  # inches, above and below together


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of `width` x `height` inches in this style, without a display or pyplot's state."""
    os.environ["MPLBACKEND"] = "agg"  # Jupyter's own, say, may not be known to this Python; figures are only saved
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rc_file(Path(__file__).with_name("figures.mplstyle"), use_default_template=False)
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
    columns = max(1, min(MOST_COLUMNS, letters // (max(map(len, texts)) + SAMPLE_LETTERS), len(texts)))
    place: Any = {"loc": "outside lower center", "alignment": "left"}
    legend = figure.legend([entry[0] for entry in entries], texts, ncols=columns, title=title or None, **place)
    figure.set_size_inches(width, height + legend.get_window_extent().height / figure.dpi + LEGEND_MARGIN)


def shorten(text: str, letters: int) -> str:
    """`text` of at most so many letters, without its middle where it is longer: names often differ in their ends."""
    return terminal.shorten(text, letters, keep_end=letters // 2)


def save_figure(figure: Figure, folder: Path, name: str, title: str) -> list[Path]:
    """Write `name`.png and `name`.svg into a folder, with a title in their metadata; return their paths.

    Raises:
        OSError: a file cannot be written.
    """
    paths = [folder / f"{name}.png", folder / f"{name}.svg"]
    for path, unwanted in zip(paths, ("Software", "Date"), strict=True):
        content = io.BytesIO()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)  # a folder's name in another script
            figure.savefig(content, format=path.suffix[1:], metadata={"Title": title, unwanted: None})
        write_atomic(path, content.getvalue())
    return paths

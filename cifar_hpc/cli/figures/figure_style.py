"""How figures look: matplotlib without a display, colours for all eyes, PNG and SVG of the same figure."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cifar_hpc.files import DIRECTORY_MODE, write_atomic

if TYPE_CHECKING:
    from matplotlib.figure import Figure


# Okabe and Ito's palette, which people with any colour vision can tell apart (jfly.uni-koeln.de/color).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
PNG_DPI = 300  # what journals ask for
# Inches: figures are drawn in the size in which they are printed, so that their text keeps its size.
SINGLE_COLUMN, DOUBLE_COLUMN = 3.5, 7.0
_STYLE: dict[str, Any] = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.5,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "lines.linewidth": 1.2,
    "hatch.linewidth": 0.4,
    "legend.frameon": False,
    "legend.fontsize": 7,
    "text.parse_math": False,  # names and values with a $ are shown as they are
    "svg.hashsalt": "cifar_hpc",  # the same figure is the same file
    "svg.fonttype": "none",
}


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of `width` x `height` inches, in this style, without a display or pyplot's state."""
    import matplotlib

    matplotlib.use("agg")
    parameters: Any = matplotlib.rcParams  # its stubs know only literal keys
    parameters.update(_STYLE)
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Figure, folder: Path, name: str, title: str = "") -> list[Path]:
    """Write `name`.png and `name`.svg into a folder; returns their paths.

    Args:
        title: what the figure is of, for the files' metadata.

    Raises:
        OSError: a file cannot be written.
    """
    folder.mkdir(DIRECTORY_MODE, parents=True, exist_ok=True)
    paths = []
    for form, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
        content = io.BytesIO()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)  # a folder's name in another script
            figure.savefig(content, format=form, dpi=PNG_DPI, metadata={"Title": title or name, **metadata})
        paths.append(folder / f"{name}.{form}")
        write_atomic(paths[-1], content.getvalue())
    return paths

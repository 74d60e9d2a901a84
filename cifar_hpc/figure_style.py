"""How figures look: matplotlib without a display, colours for all eyes, PNG and SVG of the same figure."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's palette, which people with any colour vision can tell apart (jfly.uni-koeln.de/color).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
# Told apart without colour as well, in print and beyond the seventh line.
LINES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
PNG_DPI = 200
_STYLE: dict[str, Any] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.4,
    "legend.frameon": False,
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


def line_style(index: int) -> dict[str, Any]:
    """Colour, dashes and marker of the line number `index`, from 0."""
    return {
        "color": COLOURS[index % len(COLOURS)],
        "linestyle": LINES[index // len(COLOURS) % len(LINES)],
        "marker": MARKERS[index % len(MARKERS)],
    }


def save_figure(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Write `name`.png and `name`.svg into `folder`; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.{form}" for form in ("png", "svg")]
    for path in paths:
        metadata = {"Date": None} if path.suffix == ".svg" else {"Software": None}
        figure.savefig(path, dpi=PNG_DPI, metadata=metadata)
    return paths

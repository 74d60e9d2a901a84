"""Style of all figures: colours, sizes, legends, and files of the same figure as PNG, SVG and PDF."""

import io
import logging
import os
import textwrap
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cifar_hpc.cli import terminal
from cifar_hpc.errors import UserError
from cifar_hpc.files import write_atomic
from cifar_hpc.text import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes as Axes
    from matplotlib.figure import Figure as Figure
else:  # loaded only to draw
    Axes = Figure = Any

# The palette of Okabe and Ito, distinguishable with any colour vision (jfly.uni-koeln.de/color).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
PNG_DPI = 300  # what journals ask for
# By form, the metadata that would make two files of one figure differ.
FORMS = {"png": "Software", "svg": "Date", "pdf": "CreationDate"}
# Inches: figures are drawn in the size in which they are printed, so that their text keeps its size.
SINGLE_COLUMN, DOUBLE_COLUMN = 3.5, 7.0
LETTERS_AN_INCH = 18  # in a legend
SAMPLE_LETTERS = 8  # the width of a legend's sample and of the gap to the next column
MOST_COLUMNS = 4
MOST_LINES = 3  # of an entry
# Inches around the axes, whatever the labels and the legend have: axes of figures of one width can be lined up.
LEFT, RIGHT, ABOVE, BELOW = 0.55, 0.08, 0.22, 0.42


def load_matplotlib() -> None:
    """Load it in this style, without a display or pyplot's state.

    Raises:
        UserError: it, or a package that it needs, does not load.
    """
    # Where HOME cannot be written to, its cache is a temporary folder, and it warns of that each time.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    os.environ["MPLBACKEND"] = "agg"  # Jupyter's own, say, may not be known to this Python; figures are only saved
    try:
        import matplotlib
    except ImportError as error:
        hint = "HINT: make setup && . .venv/bin/activate; plot --terminal and compare work without it."
        raise UserError(f"figures take matplotlib, which does not load here: {error}. {hint}") from None
    matplotlib.rc_file(Path(__file__).with_name("figures.mplstyle"), use_default_template=False)


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of `width` x `height` inches."""
    load_matplotlib()
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=PNG_DPI, layout="constrained")


def add_legend(
    figure: Figure, entries: Sequence[tuple[Any, str, str]], title: str = "", left: float = LEFT, gap: float = 0.06
) -> None:
    """Place the axes of a figure, and a legend below them, by which the figure gets higher and the axes no smaller.

    Args:
        entries: sample (as matplotlib's legends take it), name and values. A long name is wrapped, and loses its
            middle where that is not enough; values are never cut.
        left: inches left of the axes.
        gap: between axes, as a part of their size.
    """
    width, height = figure.get_size_inches()
    letters = int(width * LETTERS_AN_INCH)
    texts = [_wrapped(name, values, letters - SAMPLE_LETTERS) for _, name, values in entries]
    longest = max((len(line) for text in texts for line in text.split("\n")), default=0)
    columns = max(1, min(MOST_COLUMNS, letters // (longest + SAMPLE_LETTERS), len(texts)))
    below = BELOW
    if entries:
        place: Any = {"loc": "lower center", "bbox_to_anchor": (0.5, 0), "borderaxespad": 0.2, "alignment": "left"}
        legend = figure.legend([entry[0] for entry in entries], texts, ncols=columns, title=title or None, **place)
        below += legend.get_window_extent().height / figure.dpi
    height += below - BELOW
    figure.set_size_inches(width, height)
    figure.set_layout_engine(None)
    edges = {"left": left / width, "right": 1 - RIGHT / width, "bottom": below / height, "top": 1 - ABOVE / height}
    figure.subplots_adjust(**edges, wspace=gap, hspace=gap)


def _wrapped(name: str, values: str, letters: int) -> str:
    """`name` and `values` in lines of at most so many letters, if the values fit in one."""
    fixed = values.replace(" ", "\N{NO-BREAK SPACE}")
    lines = textwrap.wrap(printable(name) + fixed, letters, break_long_words=False, break_on_hyphens=False)
    if len(lines) > MOST_LINES or any(len(line) > letters for line in lines):
        return shorten(name, letters - len(values)) + values
    return "\n".join(lines).replace("\N{NO-BREAK SPACE}", " ")


def shorten(text: str, letters: int) -> str:
    """`text` of at most so many letters, without its middle where it is longer: names often differ in their ends."""
    return terminal.shorten(printable(text), letters, keep_end=letters // 2)


def render(figure: Figure, form: str, title: str) -> bytes:
    """The content of a file in one of FORMS, with a title in its metadata."""
    content = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)  # a folder's name in another script
        figure.savefig(content, format=form, metadata={"Title": title, FORMS[form]: None})
    return content.getvalue()


def save_figure(
    figure: Figure, folder: Path, name: str, title: str, forms: Sequence[str] = ("png", "svg")
) -> list[Path]:
    """Write `name`.png and so on into a folder; return their paths.

    Raises:
        OSError: a file cannot be written.
    """
    paths = [folder / f"{name}.{form}" for form in forms]
    for path, form in zip(paths, forms, strict=True):
        write_atomic(path, render(figure, form, title))
    return paths

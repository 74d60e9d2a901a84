"""python -m cifar_hpc plot: figures of runs, into files or in the terminal."""

import argparse
import shutil
import string
import sys
from collections.abc import Iterator, Sequence
from itertools import cycle

from cifar_hpc.cli import terminal
from cifar_hpc.cli.figures import curves, style
from cifar_hpc.cli.figures.architecture import architecture_figure
from cifar_hpc.cli.figures.timeline import MOST_ROWS, timeline_figure
from cifar_hpc.config.spec import ModelSpec
from cifar_hpc.errors import UserError
from cifar_hpc.runs.frozen_spec import read_frozen
from cifar_hpc.runs.paths import RunPaths, find_runs, project_root
from cifar_hpc.runs.results import group_runs, labels
from cifar_hpc.runs.timeline import read_timeline
from cifar_hpc.text import printable

DESCRIPTION = """\
Draws architecture, accuracy, loss, learning rate and timeline (waiting,
training, preemptions), each as PNG and SVG. Several runs share the axes; runs
that differ in nothing but the seed become one curve, their mean, with a band;
restarts are marked."""
EXAMPLES = ("improved_resnet-1a2b3c4d", "'dropout-*' --out figures", "improved_resnet-1a2b3c4d --terminal")

MOST_ARCHITECTURES = 8
# In the terminal: of xterm's 256 colours those next to Okabe and Ito's; without colours, letters.
COLOURS, LETTERS = (74, 208, 36, 175, 214, 25), string.ascii_letters.swapcase()
LEAST_WIDTH, LEAST_HEIGHT, MOST_HEIGHT = 40, 10, 22
LEARNING_RATE = "learning rate"
Labelled = tuple[str, str, curves.Curve]  # label, its values, curve
_ASCII = str.maketrans("┌┐└┘─│┤├┬┴┼", "++++-||++++")  # the frame on a terminal without UTF-8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", metavar="RUN", nargs="+", help="names or patterns such as 'dropout-*'")
    parser.add_argument("--out", metavar="DIR", default="figures", help="where the files go (default: figures)")
    parser.add_argument("--terminal", action="store_true", help="draw curves in the terminal instead")


def main(arguments: argparse.Namespace) -> int:
    """Write the figures of runs into the folder --out and print their paths, or draw them in the terminal.

    Raises:
        SpecError: there is no such run, or the folder cannot be made or written to.
        UserError: none of them has finished an epoch.
    """
    found = find_runs(project_root(), arguments.runs)
    groups = group_runs(found)
    series = curves.read_series(groups)
    for group in groups:
        if group.problem:
            _note(f"{group.runs[0].name}: its spec cannot be read: {group.problem}")
    shown = {member.run for one in series for member in one.members}
    if empty := [run.name for run in found if run not in shown]:
        words = f"no epoch is finished yet in {_some(empty)}"
        if not shown:
            hint = f"HINT: python -m cifar_hpc status {' '.join(empty[:3])}"
            raise UserError(f"{words}, so there is nothing to draw. {hint}")
        _note(words)
    if arguments.terminal:
        size = shutil.get_terminal_size()
        ascii_only = not (sys.stdout.encoding or "").lower().startswith("utf")
        print(draw(series, *size, colours=terminal.use_colour(sys.stdout), ascii_only=ascii_only))
        return 0
    folder = terminal.output_folder(arguments.out)
    for name, figure in _figures(found, series):
        for path in style.save_figure(figure, folder, name, _some([run.name for run in found])):
            print(printable(str(path)), flush=True)
    return 0


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _note(text: str) -> None:
    print(f"NOTE {printable(text)}", file=sys.stderr, flush=True)


def _figures(runs: Sequence[RunPaths], series: Sequence[curves.Series]) -> Iterator[tuple[str, style.Figure]]:
    """Each figure with the name of its file, one after the other: they take memory."""
    yield from _architectures(series)
    for score in ("accuracy", "loss"):
        yield score, curves.score_figure(series, score)
    yield "learning_rate", curves.learning_rate_figure(series)
    groups = group_runs(runs, each=True)
    if left_out := max(0, len(groups) - MOST_ROWS):
        _note(f"the timeline shows the first {MOST_ROWS} runs of {len(groups)}")
    rows = zip(groups[:MOST_ROWS], labels(groups), strict=False)
    shown = [(life, label) for group, label in rows if (life := read_timeline(group.runs[0])).end]
    if shown:
        yield "timeline", timeline_figure([life for life, _ in shown], [label for _, label in shown], left_out)


def _architectures(series: Sequence[curves.Series]) -> Iterator[tuple[str, style.Figure]]:
    """One for each different model, named after the first run that has it."""
    models: dict[ModelSpec, str] = {}
    for run in (one.group.runs[0] for one in series if not one.group.problem):
        if spec := read_frozen(run):
            models.setdefault(spec.model, run.name)
    if len(models) > MOST_ARCHITECTURES:
        _note(f"the runs have {len(models)} different models, of which {MOST_ARCHITECTURES} are drawn")
    for model, name in list(models.items())[:MOST_ARCHITECTURES]:
        try:
            yield ("architecture" if len(models) == 1 else f"architecture-{name}"), architecture_figure(model)
        except ImportError as error:
            _note(f"the architecture is left out, since drawing it takes PyTorch, which does not load here: {error}")
            return


def draw(series: Sequence[curves.Series], width: int, height: int, *, colours: bool, ascii_only: bool = False) -> str:
    """Three charts below each other as text: accuracy, loss and learning rate.

    Args:
        series: of a single one training and test are drawn; of several the test, of the best where they are many.
        width: columns of the terminal.
        height: its lines, as many as a chart has at most.
        colours: with escape codes; without them letters tell the lines apart.
        ascii_only: no characters beyond ASCII.
    """
    shown = [one for one, look in curves.looks(series) if look is not curves.OTHERS]
    width, alone = max(width, LEAST_WIDTH), len(shown) == 1
    charts = []
    for title, what in (("accuracy (%)", "accuracy"), ("loss", "loss")):
        lines = [(one.label, _values(one, what, alone), one.line(f"test_{what}").mean) for one in shown]
        if alone:
            lines = [("training", "", shown[0].line(f"train_{what}").mean), ("test", *lines[0][1:])]
        charts.append(_chart(title if alone else f"test {title}", lines, width, height, colours, alone))
    rates = [(label, "", curve) for label, curve in curves.merge_equal(shown)]
    charts.append(_chart(LEARNING_RATE, rates, width, height, colours, False))
    if len(shown) < len(series):
        charts.append(f"{len(series) - len(shown)} with lower test accuracy are not shown.")
    text = "\n\n".join(charts)
    return text.translate(_ASCII).encode("ascii", "replace").decode() if ascii_only else text


def _values(one: curves.Series, what: str, alone: bool) -> str:
    score = one.score() if what == "accuracy" else None
    at = f" at epoch {score.epoch}" if score and alone else ""
    return f": {score.last_text}{at}, best {score.best:.2f}" if score else ""


def _chart(title: str, lines: Sequence[Labelled], width: int, height: int, colours: bool, pair: bool) -> str:
    """A chart, and below it a legend where there are several lines; labels are cut to the width.

    Args:
        pair: the lines are training and test of one series.
    """
    import plotext  # type: ignore[import-untyped]

    plotext.terminal.limit(False, False)  # it would cut to what it takes for the terminal's size
    figure = plotext.figure
    figure.clear()
    figure.theme("colorless")
    figure.canvas("default")
    figure.plot_size(width, max(LEAST_HEIGHT, min(MOST_HEIGHT, height - 2 - len(lines))))
    figure.title(title)
    figure.label("epoch", "x")
    if title != LEARNING_RATE and (limits := curves.steep_part_left_out([curve for *_, curve in lines])):
        figure.ruler("y").lim(*limits)
    ticks = _ticks([epoch for *_, curve in lines for epoch in curve], width)
    figure.ruler("x").ticks(ticks, list(map(str, ticks)))
    letters, palette = (".*", COLOURS[1::-1]) if pair else (LETTERS, COLOURS)
    fine = colours and len(lines) <= 2
    legend = []
    for (label, values, curve), letter, colour in zip(lines, cycle(letters), cycle(palette), strict=False):
        if curve:
            marker = plotext.marker("braille" if fine else letter, colour if colours else None)
            figure.draw(figure.signal(list(curve), list(curve.values()), marker=marker).lines())
        sign = "──" if fine else letter
        name = style.shorten(printable(label), width - 4 - len(sign) - len(values))
        legend.append(f"  \x1b[38;5;{colour}m{sign}\x1b[0m {name}{values}" if colours else f"  {sign} {name}{values}")
    text: str = figure.build().string(colorless=not colours)
    return "\n".join([line.rstrip() for line in text.splitlines()] + (legend if len(lines) > 1 else []))


def _ticks(epochs: Sequence[int], width: int) -> list[int]:
    """Round numbers, with the first and the last epoch."""
    first, last = min(epochs, default=1), max(epochs, default=1)
    most = max(2, width // 12)
    step = next(n * 10**power for power in range(7) for n in (1, 2, 5) if last - first <= most * n * 10**power)
    inside = [e for e in range(-(-first // step) * step, last, step) if e - first >= step / 2 and last - e >= step / 2]
    return sorted({first, *inside, last})

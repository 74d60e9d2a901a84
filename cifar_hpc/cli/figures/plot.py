"""python -m cifar_hpc plot: figures of runs, into files or in the terminal.

Draws accuracy, loss, learning rate and timeline (waiting, training,
preemptions), each as PNG and SVG; the architecture where the runs differ in
its shape or --only asks for it. Several runs share the axes; runs that differ
in nothing but the seed become one curve, the mean of those that have finished,
in a band of one sample standard deviation; restarts are marked.
"""

import argparse
import shutil
import string
import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import cycle
from typing import Any

from cifar_hpc.cli import terminal
from cifar_hpc.cli.figures import curves, style
from cifar_hpc.cli.figures.architecture import architecture_figure
from cifar_hpc.cli.figures.timeline import MOST_ROWS, fits, timeline_figure
from cifar_hpc.cli.parser import note
from cifar_hpc.config.spec import Spec
from cifar_hpc.errors import SpecError, UserError, nearest
from cifar_hpc.runs.frozen_spec import read_frozen
from cifar_hpc.runs.paths import RunPaths, find_runs, project_root
from cifar_hpc.runs.results import group_runs, labels
from cifar_hpc.runs.timeline import read_timeline
from cifar_hpc.text import printable
from cifar_hpc.text import shown as quoted

EXAMPLES = (
    "improved_resnet-1a2b3c4d",
    "'dropout-*' --only accuracy,loss --format pdf --no-restarts",
    "'dropout-*' --label dropout-1a2b3c4d='no dropout' --label dropout-5e6f7a8b='dropout 0.2'",
    "improved_resnet-1a2b3c4d --terminal",
)
FIGURES = ("accuracy", "loss", "learning_rate", "timeline", "architecture")
TITLES = {"accuracy": "accuracy (%)", "loss": "loss", "learning_rate": "learning rate"}  # in the terminal
NO_SHAPE: dict[str, Any] = {"dropout": 0.0, "activation": "relu"}  # keys of a model that leave all sizes as they are

MOST_ARCHITECTURES = 8
# In the terminal: of xterm's 256 colours those next to Okabe and Ito's; without colours, letters.
COLOURS, LETTERS = (74, 208, 36, 175, 214, 25), string.ascii_letters.swapcase()
LEAST_WIDTH, LEAST_HEIGHT, MOST_HEIGHT = 40, 10, 22
Labelled = tuple[str, str, curves.Curve]  # label, its values, curve
_ASCII = str.maketrans("┌┐└┘─│┤├┬┴┼", "++++-||++++")  # the frame on a terminal without UTF-8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", metavar="RUN", nargs="+", help="names or patterns such as 'dropout-*'")
    parser.add_argument("--out", metavar="DIR", default="figures", help="where the files go (default: figures)")
    parser.add_argument("--only", metavar="NAMES", help=f"some of {','.join(FIGURES)}")
    parser.add_argument("--format", metavar="FORMS", default="png,svg", help="some of png,svg,pdf (default: png,svg)")
    text = "name a run's line; may be repeated, and one of several seeds stands for all"
    parser.add_argument("--label", metavar="RUN=TEXT", action="append", default=[], help=text)
    parser.add_argument("--no-restarts", action="store_true", help="leave out the marks of restarts on the curves")
    parser.add_argument("--terminal", action="store_true", help="draw curves in the terminal instead")


def main(arguments: argparse.Namespace) -> int:
    """Write the figures of runs into the folder --out and print their paths, or draw them in the terminal.

    Raises:
        SpecError: an option is used wrongly, there is no such run, or the folder cannot be made or written to.
        UserError: none of them has finished an epoch, or matplotlib is missing.
    """
    only = _listed("--only", arguments.only, TITLES if arguments.terminal else FIGURES)
    forms = _listed("--format", arguments.format, style.FORMS)
    found = find_runs(project_root(), arguments.runs)
    groups = group_runs(found)
    series = _labelled(curves.read_series(groups), arguments.label)
    if arguments.no_restarts:
        series = [one._replace(members=tuple(m._replace(restarts=()) for m in one.members)) for one in series]
    for group in groups:
        if group.problem:
            note(f"{group.runs[0].name}: its spec cannot be read: {group.problem}")
    shown = {member.run for one in series for member in one.members}
    others = {run.name: curves.read_curves(run).done for run in found if run not in shown}
    if again := [name for name, done in others.items() if done]:
        note(f"not drawn, since another run of the same settings and seed is: {some(again)}")
    if empty := [name for name, done in others.items() if not done]:
        words = f"no epoch is finished yet in {some(empty)}"
        if not shown:
            hint = f"HINT: python -m cifar_hpc status {' '.join(empty[:3])}"
            raise UserError(f"{words}, so there is nothing to draw. {hint}")
        note(words)
    if arguments.terminal:
        size = shutil.get_terminal_size()
        ascii_only = not (sys.stdout.encoding or "").lower().startswith("utf")
        print(draw(series, *size, colours=terminal.use_colour(sys.stdout), ascii_only=ascii_only, only=only or TITLES))
        return 0
    style.load_matplotlib()  # before the folder is made
    folder = terminal.output_folder(arguments.out)
    for name, figure in figures(found, series, only):
        for path in style.save_figure(figure, folder, name, some([run.name for run in found]), forms):
            print(printable(str(path)), flush=True)
    return 0


def _listed(option: str, text: str, allowed: Iterable[str]) -> list[str]:
    """The words of an option, which are separated by commas."""
    words = text.split(",") if text else []
    for word in words:
        if word not in allowed:
            known = ", ".join(allowed)
            raise SpecError(f"{option}: {quoted(word)} is not allowed; allowed: {known}.{nearest(word, allowed)}")
    return words


def _labelled(series: Sequence[curves.Series], texts: Sequence[str]) -> list[curves.Series]:
    """The series with the labels of --label; a run stands for all seeds of its line."""
    given: dict[str, str] = {}
    lines = {run.name: one.label for one in series for run in one.group.runs}
    for label in texts:
        name, _, text = label.partition("=")
        if name not in lines or not text.strip():
            hint = nearest(name, lines) or " HINT: --label dropout-1a2b3c4d='no dropout'"
            known = some(list(lines)) or "none here"
            raise SpecError(f"--label: {quoted(label)} is not allowed; allowed: RUN=TEXT, runs: {known}.{hint}")
        if (other := given.setdefault(lines[name], text)) != text:
            raise SpecError(f"--label: {quoted(label)}: its line is labelled {other!r}; allowed: one for all seeds.")
    return [one._replace(label=given.get(one.label, one.label)) for one in series]


def some(names: Sequence[str]) -> str:
    """The first of many names."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def figures(
    runs: Sequence[RunPaths], series: Sequence[curves.Series], only: Sequence[str]
) -> Iterator[tuple[str, style.Figure]]:
    """Each figure with the name of its file, one after the other: they take memory.

    Args:
        runs: the rows of the timeline.
        only: the figures that are wanted; if empty, all but an architecture that the runs share.
    """
    if not only or "architecture" in only:
        yield from _architectures(series, asked=bool(only))
    only = only or FIGURES
    for score in ("accuracy", "loss"):
        if score in only:
            yield score, curves.score_figure(series, score)
    if "learning_rate" in only:
        yield "learning_rate", curves.learning_rate_figure(series)
    if "timeline" not in only:
        return
    groups = group_runs(runs, each=True)
    if left_out := max(0, len(groups) - MOST_ROWS):
        note(f"the timeline shows the first {MOST_ROWS} runs of {len(groups)}")
    own = {
        run: one.label + (f", seed {seed}" if len(one.group.runs) > 1 else "")
        for one in series
        if len(series) > 1 and len(set(one.group.seeds)) == len(one.group.runs)
        for run, seed in zip(one.group.runs, one.group.seeds, strict=True)
    }
    rows = zip(groups[:MOST_ROWS], labels(groups), strict=False)
    named = ((g.runs[0], own.get(g.runs[0], label)) for g, label in rows)
    named = ((run, label if fits(label) else run.name) for run, label in named)
    shown = [(life, label) for run, label in named if (life := read_timeline(run)).end]
    if shown:
        yield "timeline", timeline_figure([life for life, _ in shown], [label for _, label in shown], left_out)


def _architectures(series: Sequence[curves.Series], asked: bool) -> Iterator[tuple[str, style.Figure]]:
    """One for each different shape, named after the first run that has it; of a single one only if asked for."""
    shapes: dict[str, tuple[RunPaths, Spec]] = {}
    models = set()
    for run in (one.group.runs[0] for one in series if not one.group.problem):
        if spec := read_frozen(run):
            model = spec.model if spec.model.target else replace(spec.model, **NO_SHAPE)
            models.add(repr(spec.model))
            shapes.setdefault(repr((model, spec.data.label)), (run, spec))
    if len(shapes) == 1 and not asked:
        return
    if len(shapes) > MOST_ARCHITECTURES:
        note(f"the runs have {len(shapes)} different models, of which {MOST_ARCHITECTURES} are drawn")
    for run, spec in list(shapes.values())[:MOST_ARCHITECTURES]:
        try:
            from cifar_hpc.training.trained_model import dataset_info

            figure = architecture_figure(spec.model, dataset_info(run, spec), run.user_code)
        except ImportError as error:
            note(f"the architecture is left out, since drawing it takes PyTorch, which does not load here: {error}")
            return
        except UserError as error:
            if asked:
                raise
            note(f"the architecture of {run.name} is left out: {error}")
            continue
        yield ("architecture" if len(models) == 1 else f"architecture-{run.name}"), figure


def draw(
    series: Sequence[curves.Series],
    width: int,
    height: int,
    *,
    colours: bool,
    ascii_only: bool = False,
    only: Collection[str] = TITLES,
) -> str:
    """Charts below each other as text: accuracy, loss and learning rate, or those of them in `only`.

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
    for what in [word for word in ("accuracy", "loss") if word in only]:
        lines = [(one.label, _values(one, what, alone), one.line(f"test_{what}").mean) for one in shown]
        if alone:
            lines = [("training", "", shown[0].line(f"train_{what}").mean), ("test", *lines[0][1:])]
        charts.append(_chart("" if alone else "test ", what, lines, width, height, colours, alone))
    if "learning_rate" in only:
        rates = [(label, "", curve) for label, curve in curves.merge_equal(shown)]
        charts.append(_chart("", "learning_rate", rates, width, height, colours, False))
    if len(shown) < len(series):
        charts.append(f"{len(series) - len(shown)} with lower test accuracy are not shown.")
    text = "\n\n".join(charts)
    return text.translate(_ASCII).encode("ascii", "replace").decode() if ascii_only else text


def _values(one: curves.Series, what: str, alone: bool) -> str:
    score = one.score() if what == "accuracy" else None
    at = f" at epoch {score.epoch}" if score and alone else ""
    return f": {score.last_text}{at}, best {score.best:.2f}" if score else ""


def _chart(of: str, what: str, lines: Sequence[Labelled], width: int, height: int, colours: bool, pair: bool) -> str:
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
    figure.title(of + TITLES[what])
    figure.label("epoch", "x")
    if what != "learning_rate" and (limits := curves.steep_part_left_out([curve for *_, curve in lines])):
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

"""python -m cifar_hpc plot: figures of runs, into files or in the terminal."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from cifar_hpc.cli.figures.architecture import architecture_figure
from cifar_hpc.cli.figures.curves import learning_rate_figure, score_figure
from cifar_hpc.cli.figures.series import Series, read_series
from cifar_hpc.cli.figures.style import save_figure
from cifar_hpc.cli.figures.terminal import draw
from cifar_hpc.cli.figures.timeline import MOST_ROWS, timeline_figure
from cifar_hpc.cli.terminal import output_folder, use_colour
from cifar_hpc.config.spec import ModelSpec
from cifar_hpc.errors import UserError
from cifar_hpc.runs.frozen_spec import read_frozen
from cifar_hpc.runs.groups import Group, group_runs, labels
from cifar_hpc.runs.paths import RunPaths, find_runs, project_root
from cifar_hpc.runs.timeline import read_timeline
from cifar_hpc.text import printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure


HELP = "figures of runs: accuracy, loss, learning rate, architecture, timeline"
DESCRIPTION = """\
Draws architecture, accuracy, loss, learning rate and timeline (waiting,
training, preemptions), each as PNG and SVG. Several runs share the axes; runs
that differ in nothing but the seed become one curve, their mean, with a band;
restarts are marked."""
EXAMPLES = ("improved_resnet-1a2b3c4d", "'dropout-*' --out figures", "improved_resnet-1a2b3c4d --terminal")

MOST_ARCHITECTURES = 8


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
    series = read_series(groups)
    _report_missing(found, groups, series)
    if arguments.terminal:
        size = shutil.get_terminal_size()
        ascii_only = not (sys.stdout.encoding or "").lower().startswith("utf")
        print(draw(series, size.columns, size.lines, colours=use_colour(sys.stdout), ascii_only=ascii_only))
        return 0
    folder = output_folder(arguments.out)
    for name, figure in _figures(found, series):
        for path in save_figure(figure, folder, name, _some([run.name for run in found])):
            print(printable(str(path)), flush=True)
    return 0


def _report_missing(runs: Sequence[RunPaths], groups: Sequence[Group], series: Sequence[Series]) -> None:
    for group in groups:
        if group.problem:
            _note(f"{group.runs[0].name}: its spec cannot be read: {group.problem}")
    shown = {member.run for one in series for member in one.members}
    empty = [run.name for run in runs if run not in shown]
    if not shown:
        raise UserError(
            f"no epoch is finished yet in {_some(empty)}, so there is nothing to draw. "
            f"HINT: python -m cifar_hpc status {' '.join(empty[:3])}"
        )
    if empty:
        _note(f"no epoch is finished yet in {_some(empty)}")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _note(text: str) -> None:
    print(f"NOTE {printable(text)}", file=sys.stderr, flush=True)


def _figures(runs: Sequence[RunPaths], series: Sequence[Series]) -> Iterator[tuple[str, Figure]]:
    """Each figure with the name of its file, one after the other: they take memory."""
    yield from _architectures(series)
    yield "accuracy", score_figure(series, "accuracy")
    yield "loss", score_figure(series, "loss")
    yield "learning_rate", learning_rate_figure(series)
    yield from _timeline(runs)


def _architectures(series: Sequence[Series]) -> Iterator[tuple[str, Figure]]:
    """One for each different model, named after the first run that has it."""
    models: dict[ModelSpec, str] = {}
    for run in (one.group.runs[0] for one in series if not one.group.problem):
        if spec := read_frozen(run):
            models.setdefault(spec.model, run.name)
    if len(models) > MOST_ARCHITECTURES:
        _note(f"the runs have {len(models)} different models, of which {MOST_ARCHITECTURES} are drawn")
    for model, name in list(models.items())[:MOST_ARCHITECTURES]:
        try:
            figure = architecture_figure(model)
        except ImportError as error:
            _note(f"the architecture is left out, since drawing it takes PyTorch, which does not load here: {error}")
            return
        yield ("architecture" if len(models) == 1 else f"architecture-{name}"), figure


def _timeline(runs: Sequence[RunPaths]) -> Iterator[tuple[str, Figure]]:
    groups = group_runs(runs, each=True)
    left_out = max(0, len(groups) - MOST_ROWS)
    if left_out:
        _note(f"the timeline shows the first {MOST_ROWS} runs of {len(groups)}")
    rows = zip(groups[:MOST_ROWS], labels(groups), strict=False)
    shown = [(timeline, label) for group, label in rows if (timeline := read_timeline(group.runs[0])).end]
    if shown:
        yield "timeline", timeline_figure([timeline for timeline, _ in shown], [label for _, label in shown], left_out)

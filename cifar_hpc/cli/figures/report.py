"""python -m cifar_hpc report: runs in one HTML file: results, figures, spec, restarts, hardware and last log lines.

To send to an adviser or colleague: the table of compare, the figures of plot,
restarts, hardware and versions, what differs from the default spec, and the
last lines of each log. The file needs no server and no internet.
"""

import argparse
import re
from collections.abc import Container, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from html import escape

from cifar_hpc import __version__
from cifar_hpc.cli.compare import NOTE, ORIGINS, all_columns, read_groups
from cifar_hpc.cli.figures import curves, style
from cifar_hpc.cli.figures.plot import FIGURES, figures, some
from cifar_hpc.cli.figures.timeline import CHECKPOINT
from cifar_hpc.cli.status import CAUSES
from cifar_hpc.cli.terminal import output_file
from cifar_hpc.config.io import flatten, in_words, to_plain, to_yaml
from cifar_hpc.config.spec import Spec
from cifar_hpc.files import write_atomic
from cifar_hpc.runs.frozen_spec import read_frozen
from cifar_hpc.runs.logs import output_of_start
from cifar_hpc.runs.paths import RunPaths, find_runs, project_root
from cifar_hpc.runs.results import Group, Row, base_in_words, group_runs, labels
from cifar_hpc.runs.timeline import read_timeline
from cifar_hpc.text import printable

EXAMPLES = ("improved_resnet-1a2b3c4d --out report.html", "'dropout-*' --out dropout.html")

LOG_LINES = 30
HEAD = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
body { font: 16px/1.45 system-ui, sans-serif; max-width: 60rem; margin: 1rem auto; padding: 0 1rem;
  overflow-wrap: anywhere; color: #111; background: #fff; color-scheme: light }
h1 { font-size: 1.5rem } figure { margin: 1rem 0 } div, figure { overflow-x: auto }
table { border-collapse: collapse; font-size: .875rem; overflow-wrap: normal }
th, td { padding: .2rem .7rem .2rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid #ddd }
.number { text-align: right; white-space: nowrap }
svg * { stroke-linejoin: round; stroke-linecap: butt }
pre { font-size: .75rem; white-space: pre-wrap; background: #f4f4f4; padding: .5rem }
@media print { body { max-width: none } svg, tr { break-inside: avoid } svg { max-width: 100%; height: auto } }
</style>
</head>
<body>
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", metavar="RUN", nargs="+", help="names or patterns such as 'dropout-*'")
    parser.add_argument("--out", metavar="FILE.html", required=True, help="the file to write")


def main(arguments: argparse.Namespace) -> int:
    """Write the report and print its path.

    Raises:
        SpecError: there is no such run, or --out is no file name that can be written.
        UserError: matplotlib is missing.
    """
    path = output_file(arguments.out, ".html")
    style.load_matplotlib()
    runs = find_runs(project_root(), arguments.runs)
    write_atomic(path, "".join(_page(runs)).encode())
    print(printable(arguments.out))
    return 0


def _page(runs: Sequence[RunPaths]) -> Iterator[str]:
    groups = group_runs(runs)
    title = _text(some([run.name for run in runs]))
    yield HEAD.replace("{title}", title)
    yield f"<h1>{title}</h1>\n<p>{datetime.now(UTC):%Y-%m-%d %H:%M} UTC, cifar_hpc {_text(__version__)}</p>\n"
    rows = read_groups(groups)
    columns = [column for column in all_columns(rows, each=False) if column.shown and column.name != "run"]
    names = ["\n".join(member.name for member in row.members) for row in rows]
    cells = zip(names, *(column.cells for column in columns), strict=True)
    numbers = {place for place, column in enumerate(columns, 1) if column.right}
    yield "<h2>Results</h2>\n" + _table(["runs", *(column.heading for column in columns)], cells, numbers)
    yield from (f"<p>{_text(words)}</p>\n" for words in (base_in_words(groups), NOTE) if words)
    yield from (f"<p>{_text(f'{g.runs[0].name}: {g.problem}')}</p>\n" for g in groups if g.problem)
    yield "<h2>Curves and timeline</h2>\n"
    series = curves.read_series(groups)
    for name, figure in figures(runs, series, FIGURES[:4] if series else ("timeline",)):
        yield f"<figure>{_inline(style.render(figure, 'svg', name).decode(), name)}</figure>\n"
    yield "" if series else "<p>No epoch is finished yet.</p>\n"
    yield "<h2>What happened, and where</h2>\n"
    for row, label in zip(rows, labels(groups), strict=True):
        yield f"<h3>{_text(label)}</h3>\n" + _table((), _life(row))
    yield "<h2>Spec</h2>\n"
    yield from _specs(groups)
    yield "<h2>Last lines of the logs</h2>\n"
    for run in runs:
        text = "\n".join(output_of_start(run.train_log)[-LOG_LINES:]) or "There is no log yet."
        yield _folded(run.name, text, opened=len(runs) == 1)
    yield "</body>\n</html>\n"


def _text(text: str) -> str:
    """Text from anywhere, to be shown as it is."""
    return escape(printable(text))


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]], numbers: Container[int] = ()) -> str:
    """A table that scrolls by itself where it is too wide; lines of a cell stay lines. `numbers` are at the right."""

    def line(tag: str, cells: Iterable[str]) -> str:
        texts = [(' class="number"' * (i in numbers), _text(cell)) for i, cell in enumerate(cells)]
        row = "".join(f"<{tag}{side}>{text}</{tag}>" for side, text in texts)
        return f"<tr>{row}</tr>\n".replace("\n", "<br>", row.count("\n"))

    head = line("th", headings) if headings else ""
    return f"<div><table>\n{head}{''.join(line('td', row) for row in rows)}</table></div>\n"


def _folded(title: str, text: str, *, opened: bool = False) -> str:
    return f"<details{' open' * opened}><summary>{_text(title)}</summary>\n<pre>{_text(text)}</pre></details>\n"


def _inline(svg: str, name: str) -> str:
    """An SVG file as a part of a page: without its own header and style, and only with ids that something refers to,
    which begin with `name`, since those of all figures share the page."""
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    known = set(re.findall(r'(?:url\(|href=")#([^")]+)', svg))
    svg = re.sub(r' id="([^"]*)"', lambda found: f' id="{name}-{found[1]}"' if found[1] in known else "", svg)
    svg = re.sub(r'(url\(|href=")#', rf"\1#{name}-", svg)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{name}" ', 1)


def _life(row: Row) -> Iterator[tuple[str, str]]:
    """Moments of the runs of a group but for checkpoints, and how and where they were made."""
    for run in row.group.runs:
        marks = sorted((at, kind) for kind, at in read_timeline(run).marks if kind != CHECKPOINT)
        moments = [f"{datetime.fromtimestamp(at, UTC):%Y-%m-%d %H:%M:%S} UTC {kind}" for at, kind in marks]
        yield run.name, "\n".join(moments) or "nothing yet"
    causes = [f"{count} {CAUSES.get(cause, cause)}" for cause, count in row.causes().items()]
    yield "restarts by cause", ", ".join(causes) or "none"
    for name in ORIGINS:
        yield name, "\n".join([row.data] if name == "data" else row.all_of(name)) or "-"


def _specs(groups: Sequence[Group]) -> Iterator[str]:
    """Values of each group that differ from the defaults, and the whole spec of its first run, folded."""
    default = flatten(to_plain(Spec()))
    for group, label in zip(groups, labels(groups), strict=True):
        spec = None if group.problem else read_frozen(group.runs[0])
        if spec is None:
            continue
        values = flatten(to_plain(spec))
        own = [(k, in_words(v), in_words(default.get(k))) for k, v in values.items() if v != default.get(k)]
        yield f"<h3>{_text(label)}</h3>\n" + _table(("key", "value", "default"), own)
        yield _folded("all keys", to_yaml(spec, f"spec of {group.runs[0].name}"))

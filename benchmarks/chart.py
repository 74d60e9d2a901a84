"""A chart of a results file: how many times as fast as each peer, with quartiles and targets.

    python -m benchmarks.chart [FILE]        default: the newest full results in benchmarks/results

Writes docs/speed.png and docs/speed.svg.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import RESULTS, ROOT, Row
from benchmarks.suite import PARTS

# Okabe and Ito's colours, which colour-blind people can tell apart; the shapes differ as well, for print.
MET = {"color": "#0072b2", "marker": "o", "label": "target met (median)"}
MISSED = {"color": "#d55e00", "marker": "X", "label": "target missed"}
SHOWN = {"color": "#555555", "marker": "s", "label": "no target"}
INCHES_A_ROW = 0.48
LABEL_WIDTH = 68


def chosen(rows: Sequence[Row]) -> list[Row]:
    """What is drawn: ratios to a peer. Those of "scaling" compare ours with ours; a target in seconds is no ratio's."""
    return [row for row in rows if row.ratio and row.peer and row.part != "scaling" and not row.target[-1:].isalpha()]


def look(row: Row) -> dict[str, str]:
    """Colour, marker and label of a row's point."""
    return {True: MET, False: MISSED, None: SHOWN}[row.met]


def less_is_better(row: Row) -> bool:
    """By its target, or without one by its unit: of all but a rate."""
    return row.target.startswith("<") if row.target else not row.unit.endswith("/s")


def draw(rows: Sequence[Row], where: Mapping[str, Any], path: Path) -> None:
    """Write the chart to `path` with the suffixes .png and .svg.

    Raises:
        ValueError: where no row has a ratio.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    if not rows:
        raise ValueError("no row has a ratio to a peer")
    pyplot.rcParams["svg.hashsalt"] = "cifar_hpc"
    figure, axis = pyplot.subplots(figsize=(10.5, 1.7 + INCHES_A_ROW * len(rows)), layout="constrained")
    for place, row in enumerate(rows):
        _draw_row(axis, place, row)
        _label(axis, place, row)
    _name_parts(axis, rows)
    axis.axvline(1, color="#333333", lw=1.2, zorder=1)
    axis.set_yticks([])
    axis.set_ylim(len(rows) - 0.4, -0.6)
    _scale(axis, rows)
    axis.set_xlabel("ratio of ours to the peer's figure, logarithmic; the line is equality")
    figure.suptitle(_title(where), fontsize=11)
    used = [one for one in (MET, MISSED, SHOWN) if any(look(row) == one for row in rows)]
    entries = [axis.plot([], [], ls="", ms=8, **one)[0] for one in used]
    target = axis.plot([], [], ls="", marker="$[$", ms=9, color="black", label="target: met on the open side")
    figure.legend(handles=[*entries, *target], loc="outside lower center", ncols=4, frameon=False, fontsize=9.5)
    for suffix, metadata in ((".png", None), (".svg", {"Date": None})):
        figure.savefig(path.with_suffix(suffix), dpi=150, metadata=metadata)
    pyplot.close(figure)


def _draw_row(axis: Any, place: int, row: Row) -> None:
    low, middle, high = row.ratio
    style = look(row)
    axis.plot([low, high], [place, place], color=style["color"], lw=2.6, solid_capstyle="butt", zorder=2)
    axis.plot([middle], [place], ls="", ms=8, zorder=3, **style)
    axis.annotate(
        f"{middle:.2f}" if middle < 10 else f"{middle:,.0f}",
        (middle, place),
        (0, 7),
        textcoords="offset points",
        ha="center",
        fontsize=9,
    )
    goal = re.match(r"([<>])=? *([0-9.]+)", row.target)
    if goal is not None:
        bracket = "[" if goal[1] == ">" else "]"
        axis.annotate(bracket, (float(goal[2]), place), ha="center", va="center_baseline", fontsize=17, weight="bold")


def _label(axis: Any, place: int, row: Row) -> None:
    """What was measured, and beside what, left of the axis."""
    beside = f"against {row.peer}" + (" (less is better)" if less_is_better(row) else "")
    for text, size, colour, side in ((row.what, 9.5, "black", "bottom"), (beside, 8.5, "#555555", "top")):
        lines = textwrap.fill(text, LABEL_WIDTH)
        axis.text(
            -0.012, place, lines, size=size, color=colour, ha="right", va=side, transform=axis.get_yaxis_transform()
        )  # fmt: skip


def _name_parts(axis: Any, rows: Sequence[Row]) -> None:
    """The name of each part right of the axis, and lines between them."""
    for part in dict.fromkeys(row.part for row in rows):
        places = [place for place, row in enumerate(rows) if row.part == part]
        middle = (places[0] + places[-1]) / 2
        axis.text(1.012, middle, part, size=10, weight="bold", va="center", transform=axis.get_yaxis_transform())
        if places[0] > 0:
            axis.axhline(places[0] - 0.5, color="#cccccc", lw=0.8)


def _scale(axis: Any, rows: Sequence[Row]) -> None:
    """A logarithmic axis with plain numbers at 1, 2 and 5 of each decade."""
    seen = [value for row in rows for value in row.ratio]
    seen += [float(number) for row in rows for number in re.findall(r"[0-9.]+", row.target)[:1]]
    low, high = min(*seen, 1.0) / 1.25, max(*seen, 1.0) * 1.25
    axis.set_xscale("log")
    axis.set_xlim(low, high)
    ticks = [digit * 10.0**power for power in range(-4, 6) for digit in (1, 2, 5)]
    ticks = [tick for tick in ticks if low <= tick <= high]
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.minorticks_off()
    axis.grid(axis="x", color="#e4e4e4", zorder=0)
    axis.spines[["top", "right", "left"]].set_visible(False)


def _title(where: Mapping[str, Any]) -> str:
    name = where["gpu"] or f"{where['cpu']}, {where['cores']} cores"
    return f"cifar_hpc beside what one would run instead: medians, with quartiles\n{name}, torch {where['torch']}"


def newest() -> Path:
    """The newest results of the whole suite.

    Raises:
        FileNotFoundError: where there are none.
    """
    partial = re.compile(rf"-(quick|{'|'.join(PARTS)})(-|$)")
    dated = [p for p in sorted(RESULTS.glob("2*.json")) if partial.search(p.stem) is None]
    if not dated:
        raise FileNotFoundError(f"no results of the whole suite in {RESULTS}. HINT: make bench")
    return dated[-1]


def main(argv: list[str] | None = None) -> int:
    """Draw; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("file", type=Path, nargs="?", help="results of benchmarks.suite")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "speed", help="without a suffix")
    options = parser.parse_args(argv)
    try:
        report = json.loads((options.file or newest()).read_text())
        rows = chosen([Row(**row) for row in report["rows"]])
        draw(rows, report["environment"], options.out)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What the benchmarks share: alternating repetitions, quartiles, rows of the table, and where it was measured."""

from __future__ import annotations

import argparse
import itertools
import json
import math
import operator
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
_deadline = math.inf  # of this process, by time.monotonic(); run_part sets it


@dataclass(frozen=True)
class Row:
    """One line of the table.

    ours, theirs, ratio: [first quartile, median, third quartile]; a single figure is given three times.
    theirs, ratio: empty where there is no peer; all three where nothing could be measured. `ratio` is better the larger
    it is where `target` says `>=`.
    target: such as ">= 4" or "< 2 s"; empty where the figure is only shown.
    met: whether the median meets the target; None without one.
    """

    part: str
    what: str
    unit: str
    ours: Sequence[float]
    peer: str = ""
    theirs: Sequence[float] = ()
    ratio: Sequence[float] = ()
    target: str = ""
    met: bool | None = None
    note: str = ""


def quartiles(values: Sequence[float]) -> list[float]:
    """[first, median, third], to four significant digits."""
    found = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return [float(f"{q:.4g}") for q in found]


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """Quartiles of the ratios of neighbouring repetitions, which whatever else the machine did met alike."""
    return quartiles([a / b for a, b in zip(above, below, strict=True)])


def meets(value: float, target: str) -> bool:
    """Whether `value` meets a target such as ">= 4" or "< 2 s", whose unit is that of the value.

    Raises:
        ValueError: for a target that does not begin with a comparison and a number.
    """
    found = re.match(r"(>=|<=|<|>) *([0-9.]+)", target)
    if found is None:
        raise ValueError(f"no target: {target!r}")
    compare = {">=": operator.ge, "<=": operator.le, "<": operator.lt, ">": operator.gt}[found[1]]
    return bool(compare(value, float(found[2])))


def rounds(count: int) -> Iterator[int]:
    """Numbers from 0: `count` of them, or as many as --seconds leaves time for, but one at least.

    One more is begun only where the longest so far would still fit.
    """
    longest = 0.0
    for number in range(count):
        began = time.monotonic()
        if number > 0 and began + longest > _deadline:
            return
        yield number
        longest = max(longest, time.monotonic() - began)


def alternate(
    works: Mapping[str, Callable[[], Any]], repetitions: int, warm_up: int = 1, wait: Callable[[], Any] = lambda: None
) -> dict[str, list[float]]:
    """Seconds of each repetition of each work. They take turns, each round in the other direction.

    Args:
        wait: called before each reading of the clock, such as torch.cuda.synchronize.
    """
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for turn, repetition in enumerate(itertools.chain(range(-warm_up, 0), rounds(repetitions))):
        names = list(works) if turn % 2 == 0 else list(reversed(works))
        for name in names:
            wait()
            began = time.perf_counter()
            works[name]()
            wait()
            if repetition >= 0:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def environment() -> dict[str, Any]:
    """Where and with what this is measured."""
    import torch

    cuda = torch.cuda.is_available()
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda if cuda else None,
        "python": platform.python_version(),
        "load_average_before": round(os.getloadavg()[0], 2),
    }


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def table(rows: Sequence[Row]) -> str:
    """The rows as a table of Markdown, which reads well as plain text, too; notes stand below it."""
    notes = list(dict.fromkeys(row.note for row in rows if row.note))
    head = ("part", "what", "ours", "peer", "theirs", "ratio", "its quartiles", "target", "met")
    cells = [head, *(_cells(row, notes) for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(head))]
    lines = [f"| {' | '.join(map(str.ljust, line, widths))} |" for line in cells]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    if notes:
        lines += ["", *(f"[{number}] {note}" for number, note in enumerate(notes, 1))]
    return "\n".join(lines)


def _cells(row: Row, notes: Sequence[str]) -> tuple[str, ...]:
    spread = "–"
    if row.ratio:
        spread = f"{row.ratio[0]:.2f} to {row.ratio[2]:.2f}"
    elif row.ours and row.ours[0] != row.ours[2]:
        spread = f"{_short(row.ours[0])} to {_short(row.ours[2])} {row.unit}"
    return (
        row.part,
        f"{row.what} [{notes.index(row.note) + 1}]" if row.note else row.what,
        f"{_short(row.ours[1])} {row.unit}" if row.ours else "–",
        row.peer or "–",
        f"{_short(row.theirs[1])} {row.unit}" if row.theirs else "–",
        f"{row.ratio[1]:.2f}" if row.ratio else "–",
        spread,
        row.target or "–",
        {True: "yes", False: "NO", None: "–"}[row.met],
    )


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def run_part(measure: Callable[..., list[Row]], text: str | None, **choices: Sequence[str]) -> None:
    """The command line of a part: measure, print the table and, with --json, write the rows.

    Args:
        choices: further options that `measure` takes by name, each with what is allowed; the first is the default.
    """
    global _deadline
    parser = argparse.ArgumentParser(description=(text or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer repetitions, smaller sizes")
    parser.add_argument("--seconds", type=float, default=math.inf, metavar="N", help="no further round after so long")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    for name, allowed in choices.items():
        parser.add_argument(f"--{name}", choices=allowed, default=allowed[0], help=f"default: {allowed[0]}")
    options = vars(parser.parse_args())
    _deadline = time.monotonic() + options["seconds"]
    rows = measure(options["quick"], **{name: options[name] for name in choices})
    print(table(rows))
    if options["json"]:
        options["json"].write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")

"""Runs as lines of text: everything where there is room for it, the most important on a narrow terminal."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from cifar_hpc.runs.state import WAITING, RunState
from cifar_hpc.slurm.reasons import expected
from cifar_hpc.text import printable

COLUMNS = ("RUN", "STATE", "EPOCH", "ACC", "BEST", "IMG/S", "ETA", "RESTARTS", "RANKS", "LOG AGE", "JOB", "DETAIL")
NUMBERS = ("EPOCH", "ACC", "BEST", "IMG/S", "ETA", "RANKS", "LOG AGE")  # flush right
# What goes first where the lines are too long for the terminal. RESTARTS loses its causes before anything else goes;
# RESTARTS and ETA then stand in DETAIL, in those lines that have any.
DROPPED = ("RANKS", "JOB", "LOG AGE", "IMG/S", "BEST", "RESTARTS", "ETA", "ACC")
# Fewer columns of characters than these are not enough for a reason, or for a run's name.
LEAST_DETAIL, LEAST_NAME = 20, 12
# The states that call for a look come first.
INTEREST = (
    *("hung", "running", "suspended", "stopping", "failed", "queued", "requeued", "unknown", "stopped", "unreadable"),
    *("cancelled", "not started", "finished"),
)
STYLES = {
    "running": "green",
    "hung": "bold red",
    "failed": "red",
    "unreadable": "red",
    "queued": "yellow",
    "requeued": "yellow",
    "suspended": "yellow",
    "unknown": "yellow",
    "stopping": "magenta",
    "stopped": "magenta",
    "finished": "dim",
    "cancelled": "dim",
    "not started": "dim",
}
_GAP = "  "


@dataclass(frozen=True)
class Line:
    """A line of the table in parts, so that its state can be painted: `before` + `state` + `after`."""

    before: str
    state: str
    after: str
    style: str

    @property
    def text(self) -> str:
        return self.before + self.state + self.after


def by_interest(states: Sequence[RunState], *, last: bool = False) -> list[RunState]:
    """Those first, or last, that call for a look; by name where they are in one state."""
    sign = -1 if last else 1
    return sorted(states, key=lambda state: (sign * INTEREST.index(state.state), state.run))


def summary(states: Sequence[RunState]) -> str:
    """`24 runs: 3 running, 2 queued, 19 finished`."""
    counts = {name: sum(state.state == name for state in states) for name in INTEREST}
    words = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    return f"{len(states)} run{'s' * (len(states) != 1)}: {words}"


def lines(states: Sequence[RunState], width: int | None = None) -> list[Line]:
    """The head and a line a run.

    Args:
        width: of the terminal, in columns of characters; None for everything in full.
    """
    rows = [cells(state) for state in states]
    columns = list(COLUMNS)
    if width is not None:
        _fit(rows, columns, width)
        room = width - _used(rows, columns)
        for row, state in zip(rows, states, strict=True):
            row["DETAIL"] = _detail(row, state, columns, room)
    widths = [max([len(column), *(len(row[column]) for row in rows)]) for column in columns]
    head = _line(columns, columns, widths, width, "")
    return [head, *(_line([row[c] for c in columns], columns, widths, width, STYLES[row["STATE"]]) for row in rows)]


def _fit(rows: Sequence[dict[str, str]], columns: list[str], width: int) -> None:
    """Leave out columns, and shorten names, until there is room for DETAIL."""
    longest = max(len("improved_resnet-01234567"), width // 5)
    for row in rows:
        row["RUN"] = shorten(row["RUN"], longest, keep_end=9)
    dropped = ["causes", *DROPPED]
    while _used(rows, columns) + LEAST_DETAIL > width and dropped:
        column = dropped.pop(0)
        if column == "causes":
            for row in rows:
                row["RESTARTS"] = row["RESTARTS"].partition(" ")[0]
        else:
            columns.remove(column)
    over = _used(rows, columns) + LEAST_DETAIL - width
    if over > 0:
        longest = max(LEAST_NAME, max((len(row["RUN"]) for row in rows), default=0) - over)
        for row in rows:
            row["RUN"] = shorten(row["RUN"], longest, keep_end=9)


def _detail(row: dict[str, str], state: RunState, columns: Sequence[str], room: int) -> str:
    """DETAIL for a line on which it has `room`: with what has no column, and in fewer words where it is too long."""
    eta = f"ETA {row['ETA']}" if state.eta_seconds is not None and "ETA" not in columns else ""
    many = "s" * (state.restarts > 1)
    restarts = (
        f"{row['RESTARTS']} restart{many}" if state.restarts and not state.ended and "RESTARTS" not in columns else ""
    )
    detail = row["DETAIL"].partition(" HINT: ")[0]
    if state.state == "queued" and state.reason and _columns(detail) > room:
        start = datetime.fromisoformat(state.start_time) if state.start_time else None
        soon = expected(start, datetime.now(UTC)).removeprefix("starts ")
        detail = ", ".join(filter(None, (printable(state.reason), soon)))
    parts = (detail, eta, restarts) if state.state in WAITING else (eta, restarts, detail)
    return ", ".join(filter(None, parts))


def _used(rows: Sequence[dict[str, str]], columns: Sequence[str]) -> int:
    """The width of all columns but DETAIL, with the gaps between."""
    return sum(max([len(c), *(len(row[c]) for row in rows)]) + len(_GAP) for c in columns if c != "DETAIL")


def _line(row: Sequence[str], columns: Sequence[str], widths: Sequence[int], width: int | None, style: str) -> Line:
    padded = [
        cell if column == "DETAIL" else cell.rjust(size) if column in NUMBERS else cell.ljust(size)
        for cell, column, size in zip(row, columns, widths, strict=True)
    ]
    before, state, after = padded[0] + _GAP, padded[1], _GAP.join(["", *padded[2:]])
    if width is not None:
        after = shorten(after, max(0, width - len(before + state)))
    return Line(before, state, after.rstrip(), style)


def shorten(text: str, width: int, keep_end: int = 0) -> str:
    """`text` in at most `width` columns of characters, with an ellipsis in place of what had to go.

    Args:
        keep_end: so many characters at its end stay: of a run's name, what tells it from others.
    """
    if _columns(text) <= width:
        return text
    end = text[len(text) - keep_end :] if keep_end else ""
    room, kept = width - len(end) - 1, ""
    for character in text:
        room -= _columns(character)
        if room < 0:
            break
        kept += character
    return f"{kept}…{end}"[: max(0, width)]


def _columns(text: str) -> int:
    """How many columns of a terminal the text takes (Unicode Standard Annex 11)."""
    if text.isascii():
        return len(text)
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return len(text) + wide - sum(unicodedata.combining(c) != 0 for c in text)


def cells(state: RunState) -> dict[str, str]:
    """What the columns say, each on one line whatever the files hold."""
    done = f"{state.epoch}"
    if state.epoch_progress is not None:
        done += f".{min(9, int(10 * state.epoch_progress))}"
    causes = [(count, _CAUSES.get(cause, cause)) for cause, count in sorted(state.restart_causes.items())]
    by_cause = causes[0][1] if len(causes) == 1 else ", ".join(f"{count} {cause}" for count, cause in causes)
    row = {
        "RUN": state.run,
        "STATE": state.state,
        "EPOCH": f"{done}/{state.epochs}",
        "ACC": _percent(state.test_accuracy),
        "BEST": _percent(state.best_accuracy),
        "IMG/S": "-" if state.images_per_second is None else f"{state.images_per_second:,.0f}",
        "ETA": duration(state.eta_seconds),
        "RESTARTS": f"{state.restarts}" + (f" ({by_cause})" if causes else ""),
        "RANKS": str(state.world_size or "-"),
        "LOG AGE": duration(state.log_age_seconds),
        "JOB": state.job_id or "-",
        "DETAIL": state.detail,
    }
    return {column: " ".join(printable(cell).split()) for column, cell in row.items()}


_CAUSES = {"submitted": "submitted again"}


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def duration(seconds: float | None) -> str:
    """`45s`, `12m`, `3h05m` or `2d04h`: two digits of what matters."""
    if seconds is None:
        return "-"
    if not math.isfinite(seconds) or seconds > 1e10:
        return "?"
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s" if whole < 600 else f"{whole // 60}m"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"

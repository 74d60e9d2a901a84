"""Findings of doctor's checks, as lines for people or as JSON."""

from __future__ import annotations

import json
import shutil
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Literal

from cifar_hpc.cli.terminal import paint, use_colour
from cifar_hpc.errors import SchedulerError, UserError, explain
from cifar_hpc.text import printable

Status = Literal["ok", "warning", "problem"]
COLOURS: dict[Status, str] = {"ok": "green", "warning": "yellow", "problem": "bold red"}  # from good to bad
STATUSES = tuple(COLOURS)


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    check: its name, which stays the same from version to version; `run_check` sets it.
    status: a warning is what runs can live with, a problem keeps them from working.
    advice: what to do about it; empty where there is nothing to do.
    """

    check: str
    status: Status
    found: str
    advice: str = ""


# Findings without a name yet: ok(found, advice) and so on.
ok, warning, problem = (partial(Finding, "", status) for status in STATUSES)


def run_check(name: str, check: Callable[..., Finding | Iterable[Finding]], *arguments: Any) -> list[Finding]:
    """The findings of `check(*arguments)`, under this name where they have none. Its failure is a finding, too."""
    try:
        found = check(*arguments)
        findings = [found] if isinstance(found, Finding) else list(found)
    except SchedulerError as error:
        findings = [warning(str(error), "so this is not known; sbatch will tell")]
    except Exception as error:
        if isinstance(error, UserError | OSError):
            words = explain(error)[0]
        else:
            traceback.print_exc()
            words = f"{type(error).__name__}: {error}"
        findings = [problem(f"it could not be checked: {words}", "fix that, and try again")]
    return [replace(finding, check=finding.check or name) for finding in findings]


def show(findings: Iterable[Finding], as_json: bool) -> int:
    """Print each finding as soon as it is there, or all as JSON; returns 1 where there is a problem."""
    found = []
    for finding in findings:
        found.append(finding)
        if not as_json:
            print(as_text(finding), flush=True)
    good, warnings, problems = (sum(finding.status == status for finding in found) for status in STATUSES)
    if as_json:
        print(json.dumps([asdict(finding) for finding in found], indent=1))
    else:
        print(f"\n{good} ok, {counted(warnings, 'warning')}, {counted(problems, 'problem')}")
    return 1 if problems else 0


def as_text(finding: Finding) -> str:
    """One line, and the advice below it; folded and coloured on a terminal only, so that grep finds whole lines."""
    indent = " " * len("problem  job file system  ")
    width = max(60, shutil.get_terminal_size().columns) if sys.stdout.isatty() else sys.maxsize
    wrap = textwrap.TextWrapper(width, break_long_words=False, break_on_hyphens=False, subsequent_indent=indent)
    lines = [f"{finding.status:7}  {finding.check:15}  {_one_line(finding.found)}"]
    lines += [f"{indent}-> {_one_line(finding.advice)}"] if finding.advice else []
    text = "\n".join(map(wrap.fill, lines))
    style = COLOURS[finding.status] if use_colour(sys.stdout) else ""
    return paint(finding.status, style) + text[len(finding.status) :]


def counted(number: int, noun: str) -> str:
    """`1 task` or `2 tasks`."""
    return f"{number} {noun}" + ("s" if number != 1 else "")


def _one_line(text: str) -> str:
    return " ".join(printable(text).split())

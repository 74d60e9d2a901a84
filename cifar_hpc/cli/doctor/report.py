"""Findings of doctor's checks, as lines for people or as JSON."""

from __future__ import annotations

import json
import shutil
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from cifar_hpc.cli.terminal import paint, use_colour
from cifar_hpc.errors import SchedulerError, UserError
from cifar_hpc.text import printable

Status = Literal["ok", "warning", "problem"]
STATUSES: tuple[Status, ...] = ("ok", "warning", "problem")  # from good to bad
_COLOURS = {"ok": "green", "warning": "yellow", "problem": "bold red"}
_STATUS_WIDTH, _CHECK_WIDTH = len("problem"), len("job file system")


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    check: its name, which stays the same from version to version; `run_check` sets it.
    advice: what to do about it; empty where there is nothing to do.
    """

    check: str
    status: Status
    found: str
    advice: str = ""


def ok(found: str, advice: str = "") -> Finding:
    """A finding that is as it should be."""
    return Finding("", "ok", found, advice)


def warning(found: str, advice: str = "") -> Finding:
    """A finding that runs can live with."""
    return Finding("", "warning", found, advice)


def problem(found: str, advice: str) -> Finding:
    """A finding that keeps runs from working."""
    return Finding("", "problem", found, advice)


def run_check(name: str, check: Callable[..., Finding | Iterable[Finding]], *arguments: Any) -> list[Finding]:
    """The findings of `check(*arguments)`, under this name where they have none. Its failure is a finding, too."""
    try:
        found = check(*arguments)
        findings = [found] if isinstance(found, Finding) else list(found)
    except SchedulerError as error:
        findings = [warning(str(error), "so this is not known; sbatch will tell")]
    except Exception as error:
        if not isinstance(error, UserError | OSError):
            traceback.print_exc()
        findings = [problem(f"it could not be checked: {error_text(error)}", "fix that, and try again")]
    return [replace(finding, check=finding.check or name) for finding in findings]


@dataclass
class Report:
    """Findings in the order of the checks, each printed as soon as it is there unless `as_json`."""

    as_json: bool = False
    findings: list[Finding] = field(default_factory=list)

    def run(self, name: str, check: Callable[..., Finding | Iterable[Finding]], *arguments: Any) -> None:
        """Add what a check finds; see `run_check`."""
        self.add(*run_check(name, check, *arguments))

    def add(self, *findings: Finding) -> None:
        """Take findings over."""
        for finding in findings:
            self.findings.append(finding)
            if not self.as_json:
                print(as_text(finding), flush=True)

    def status(self, check: str) -> Status | None:
        """The result of a check; None where it has not run."""
        return next((finding.status for finding in self.findings if finding.check == check), None)

    def close(self) -> int:
        """Print the rest; returns the exit status: 1 where there is a problem."""
        found = [finding.status for finding in self.findings]
        if self.as_json:
            print(json.dumps([asdict(finding) for finding in self.findings], indent=1))
        else:
            warnings, problems = counted(found.count("warning"), "warning"), counted(found.count("problem"), "problem")
            print(f"\n{found.count('ok')} ok, {warnings}, {problems}")
        return 1 if "problem" in found else 0


def say(words: str) -> None:
    """Print a line about progress on stderr, for people who wait; it is not part of the answer."""
    print(printable(words), file=sys.stderr, flush=True)


def as_text(finding: Finding) -> str:
    """One line, and the advice below it; folded and coloured on a terminal only, so that grep finds whole lines."""
    indent = " " * (_STATUS_WIDTH + _CHECK_WIDTH + 4)
    paragraphs = [f"{finding.status:{_STATUS_WIDTH}}  {finding.check:{_CHECK_WIDTH}}  {_one_line(finding.found)}"]
    if finding.advice:
        paragraphs.append(f"{indent}-> {_one_line(finding.advice)}")
    if sys.stdout.isatty():
        width = max(60, shutil.get_terminal_size().columns)
        paragraphs = [_fold(paragraph, width, indent) for paragraph in paragraphs]
        if use_colour(sys.stdout):
            paragraphs[0] = paint(finding.status, _COLOURS[finding.status]) + paragraphs[0][len(finding.status) :]
    return "\n".join(paragraphs)


def counted(number: int, noun: str) -> str:
    """`1 task` or `2 tasks`."""
    return f"{number} {noun}" + ("s" if number != 1 else "")


def error_text(error: Exception) -> str:
    """The message of an error, with the file that it is about, or its type."""
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    return str(error) if isinstance(error, UserError | OSError) else f"{type(error).__name__}: {error}"


def _fold(text: str, width: int, indent: str) -> str:
    return textwrap.fill(text, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def _one_line(text: str) -> str:
    return " ".join(printable(text).split())

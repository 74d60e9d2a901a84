"""What doctor has found, check by check, as lines for people or as JSON."""

from __future__ import annotations

import json
import shutil
import sys
import textwrap
from dataclasses import asdict, dataclass, field
from typing import Literal

from cifar_hpc.text import printable

Status = Literal["ok", "warning", "problem"]
_COLOURS = {"ok": "32", "warning": "33", "problem": "1;31"}  # SGR: green, yellow, bold red
_STATUS_WIDTH, _CHECK_WIDTH = len("problem"), len("job file system")


@dataclass(frozen=True)
class Finding:
    """What one check has found.

    check: its name, which stays the same from version to version.
    advice: what to do about it; empty where there is nothing to do.
    """

    check: str
    status: Status
    found: str
    advice: str = ""


@dataclass
class Report:
    """Findings in the order of the checks, each printed as soon as it is there unless `as_json`."""

    as_json: bool = False
    findings: list[Finding] = field(default_factory=list)

    def add(self, *findings: Finding) -> None:
        """Take findings over."""
        for finding in findings:
            self.findings.append(finding)
            if not self.as_json:
                print(as_text(finding), flush=True)

    def say(self, words: str) -> None:
        """A line about what is under way, for people who wait; it is not part of the answer."""
        print(printable(words), file=sys.stderr, flush=True)

    def close(self) -> int:
        """Print what is left to print; returns the exit status: 1 where there is a problem."""
        counts = {status: sum(f.status == status for f in self.findings) for status in _COLOURS}
        if self.as_json:
            print(json.dumps([asdict(finding) for finding in self.findings], indent=1))
        else:
            print("\n" + ", ".join(_counted(count, status) for status, count in counts.items()))
        return 1 if counts["problem"] else 0


def as_text(finding: Finding) -> str:
    """One line, and the advice below it; folded and coloured on a terminal only, so that grep finds whole lines."""
    terminal = sys.stdout.isatty()
    indent = " " * (_STATUS_WIDTH + _CHECK_WIDTH + 4)
    head = f"{finding.status:{_STATUS_WIDTH}}  {finding.check:{_CHECK_WIDTH}}  "
    paragraphs = [head + _one_line(finding.found)]
    if finding.advice:
        paragraphs.append(f"{indent}-> {_one_line(finding.advice)}")
    if terminal:
        width = max(60, shutil.get_terminal_size().columns)
        paragraphs = [_fold(p, width, indent) for p in paragraphs]
        paragraphs[0] = (
            f"\x1b[{_COLOURS[finding.status]}m{finding.status}\x1b[0m" + paragraphs[0][len(finding.status) :]
        )
    return "\n".join(paragraphs)


def _counted(count: int, status: str) -> str:
    return f"{count} {status}" + ("s" if status != "ok" and count != 1 else "")


def _fold(paragraph: str, width: int, indent: str) -> str:
    return textwrap.fill(
        paragraph, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False, tabsize=1
    )


def _one_line(text: str) -> str:
    return " ".join(printable(text).split())

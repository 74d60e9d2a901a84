"""Colours of the terminal, where they are wanted: never in a pipe or a file, nor against https://no-color.org."""

from __future__ import annotations

import os
from typing import TextIO

RESET = "\x1b[0m"
_CODES = {  # SGR parameters (ECMA-48)
    "bold": "1",
    "dim": "2",
    "red": "31",
    "bold red": "1;31",
    "green": "32",
    "yellow": "33",
    "magenta": "35",
    "cyan": "36",
    "bold cyan": "1;36",
}
_OF_LINES = {
    "banner": "bold cyan",
    "epoch": "green",
    "good": "bold",
    "trouble": "bold red",
    "warning": "yellow",
    "stop": "magenta",
    "note": "yellow",
}


def wanted(stream: TextIO) -> bool:
    """Whether text for `stream` may be coloured."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM", "dumb") != "dumb"


def paint(text: str, style: str) -> str:
    """`text` in a colour; as it is where `style` is empty or unknown."""
    code = _CODES.get(style)
    return f"\x1b[{code}m{text}{RESET}" if code and text else text


def style_of_line(kind: str) -> str:
    """The style of a line of train.log of this kind (`log_lines.kind_of_line`), or of a `note` about the run."""
    return _OF_LINES.get(kind, "")

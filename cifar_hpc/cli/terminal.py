"""Colours on terminals (https://no-color.org), and checks of output files."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TextIO

from cifar_hpc.errors import SpecError
from cifar_hpc.files import DIRECTORY_MODE, kind_of
from cifar_hpc.text import shown

RESET = "\x1b[0m"
_DATE = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d "
_KINDS_OF_LINES = (
    ("banner", re.compile(r"={20}|== ")),
    ("progress", re.compile(rf"{_DATE}epoch \d+/\d+ step ")),
    ("phase", re.compile(rf"{_DATE}(?:evaluating: |epoch \d+: measuring )")),
    ("epoch", re.compile(rf"(?:{_DATE})?epoch +\d+(?:/\d+ DONE)?  train loss ")),
    ("trouble", re.compile(rf"{_DATE}(?:FAILED|HUNG|OUT OF MEMORY|not requeued)|---- ")),
    ("warning", re.compile(rf"{_DATE}WARNING |WARNING ")),
    (
        "stop",
        re.compile(rf"{_DATE}(?:STOPPED|CANCELLED|JobState=|requeue|timeout|preemption|all processes were killed)"),
    ),
    ("good", re.compile(rf"{_DATE}FINISHED ")),
)
# SGR parameters (ECMA-48)
_CODES = {"bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33", "magenta": "35", "cyan": "36"}
_OF_LINES = {
    "banner": "bold cyan",
    "epoch": "green",
    "good": "bold",
    "trouble": "bold red",
    "warning": "yellow",
    "stop": "magenta",
    "note": "yellow",
}


def use_colour(stream: TextIO) -> bool:
    """Check that text for `stream` may be coloured."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM", "dumb") != "dumb"


def paint(text: str, style: str) -> str:
    """`text` in a style such as `bold red`; unchanged if that is empty."""
    codes = ";".join(_CODES[word] for word in style.split())
    return f"\x1b[{codes}m{text}{RESET}" if codes and text else text


def kind_of_line(line: str) -> str:
    """Kind of a line of train.log: one of `_OF_LINES`, progress, phase (of an epoch's end), or an empty string."""
    return next((kind for kind, pattern in _KINDS_OF_LINES if pattern.match(line)), "")


def style_of_line(kind: str) -> str:
    """The style of a line of this kind, or of a `note` about the run."""
    return _OF_LINES.get(kind, "")


def output_file(text: str, suffix: str = "") -> Path:
    """The file of --out, which may exist; of a symbolic link its target.

    Args:
        suffix: required end of its name.

    Raises:
        SpecError: its suffix differs, it is no regular file, or its folder is missing or not writable.
    """
    path = Path(text)
    if not text.endswith(suffix) or path.name in ("", suffix):
        raise SpecError(f"--out: {shown(text)} is not allowed; allowed: a file name that ends with {suffix}.")
    try:
        path = path.resolve()
        mode = path.stat().st_mode if path.exists() else None
    except (OSError, RuntimeError, ValueError) as error:  # a circle of symbolic links, or a NUL character
        raise SpecError(f"--out: {text} cannot be written: {error}.") from None
    if mode is not None and not path.is_file():
        raise SpecError(f"--out: {path} is no regular file but {kind_of(mode)}; allowed: a file.")
    _check_folder(path.parent)
    return path


def output_folder(text: str) -> Path:
    """The folder of --out, created if missing.

    Raises:
        SpecError: it cannot be created, or is not writable.
    """
    path = Path(text)
    try:
        path.mkdir(DIRECTORY_MODE, parents=True, exist_ok=True)
    except OSError as error:
        raise SpecError(f"--out: {path} cannot be made: {error.strerror}; allowed: a folder.") from None
    _check_folder(path)
    return path


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise SpecError(f"--out: there is no folder {folder}. HINT: mkdir -p it first.")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise SpecError(f"--out: the folder {folder} is not writable by you.")

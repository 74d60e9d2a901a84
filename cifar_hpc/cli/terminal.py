"""Colours of the terminal, where they are wanted (https://no-color.org), and checks of output files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TextIO

from cifar_hpc.errors import SpecError
from cifar_hpc.files import DIRECTORY_MODE, kind_of
from cifar_hpc.text import shown

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


def output_file(text: str, suffix: str = "") -> Path:
    """The file that --out names, at the end of a symbolic link if it is one. It may exist, and is then replaced.

    Args:
        suffix: what its name has to end with.

    Raises:
        SpecError: it has another suffix, is no regular file, or its folder is missing or not writable.
    """
    path = Path(text)
    if not text.endswith(suffix) or path.name in ("", suffix):
        raise SpecError(f"--out: {shown(text)} is not allowed; allowed: a file name that ends with {suffix}.")
    try:
        path = path.resolve()
        mode = path.stat().st_mode if path.exists() else None
    except (OSError, RuntimeError, ValueError) as error:  # of links that lead in a circle, and of NUL
        raise SpecError(f"--out: {text} cannot be written: {error}.") from None
    if mode is not None and not path.is_file():
        raise SpecError(f"--out: {path} is no regular file but {kind_of(mode)}; allowed: a file.")
    _check_folder(path.parent)
    return path


def output_folder(text: str) -> Path:
    """The folder that --out names, made where it is missing.

    Raises:
        SpecError: it cannot be made, or not be written to.
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

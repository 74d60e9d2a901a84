"""Text of unknown origin: what may go into a file of one value a line, and what may be shown on a terminal."""

import math
import re
from typing import Any

# C0, DEL and C1 controls (terminals obey them), line and paragraph separators, overrides of the writing direction
# (they make a line look like another one), and lone surrogates (which no file in UTF-8 can hold).
_CONTROL = "\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff"
_ANY = re.compile(f"[\t\n{_CONTROL}]")
_BUT_TAB_AND_NEWLINE = re.compile(f"[{_CONTROL}]")
_IN_LATEX = str.maketrans(
    {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "|": r"\textbar{}"}
    | {"<": r"\textless{}", ">": r"\textgreater{}", "±": r"$\pm$", "×": r"$\times$"}
    | {character: f"\\{character}" for character in "&%$#_{}"}
)
SHOWN_CHARACTERS = 200


def control_character(text: str) -> str | None:
    """The first character of `text` that a value of one line cannot have, or None."""
    found = _ANY.search(text)
    return found.group() if found else None


def printable(text: str) -> str:
    r"""`text` with control characters but tab and newline spelt out, such as \x1b: safe to print anywhere."""
    return _BUT_TAB_AND_NEWLINE.sub(lambda found: ascii(found.group())[1:-1], text)


def one_line(text: str) -> str:
    """`text` in printable characters, on one line with single spaces."""
    return " ".join(printable(text).split())


def in_markdown(text: str) -> str:
    """`text` as one line, with the characters escaped that Markdown would interpret."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", one_line(text))


def in_latex(text: str) -> str:
    """`text` as one line, as LaTeX shows it; two hyphens would become a dash."""
    return one_line(text).translate(_IN_LATEX).replace("--", "-{}-")


def shown(value: Any) -> str:
    """repr of a value in an error message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}... ({len(text):,} characters)"


def counted(number: int, noun: str) -> str:
    """`1 epoch`, `2 epochs`, `12,000 images`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}{'es' if noun.endswith('s') else 's'}"


def duration(seconds: float | None) -> str:
    """`45s`, `1m05s`, `12m`, `3h05m` or `2d04h`; `-` for None, `?` for no meaningful number."""
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

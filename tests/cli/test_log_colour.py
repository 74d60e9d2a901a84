"""Colours: on a terminal that wants them, and nowhere else."""

from __future__ import annotations

import io

import pytest

from cifar_hpc.cli.terminal import paint, style_of_line, wanted


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"TERM": "xterm"}, True),
        ({"TERM": "xterm", "NO_COLOR": ""}, True),  # https://no-color.org: not an empty string
        ({"TERM": "xterm", "NO_COLOR": "1"}, False),
        ({"TERM": "dumb"}, False),
        ({}, False),
    ],
)
def test_wanted(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], expected: bool) -> None:
    for name in ("TERM", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert wanted(Terminal()) is expected
    assert not wanted(io.StringIO())


def test_paint() -> None:
    assert paint("a", "bold red") == "\x1b[1;31ma\x1b[0m"
    assert paint("a", "") == "a" and paint("", "red") == ""
    assert paint("a", style_of_line("banner")).startswith("\x1b[1;36m")
    assert paint("a", style_of_line("progress")) == "a"

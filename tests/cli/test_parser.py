"""The help of every command: its examples can be given as they stand there, and its lines fit a terminal."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterator

import pytest

from cifar_hpc.cli import submit
from cifar_hpc.cli.parser import MANUAL, parser

PREFIX, SUBMIT = "python -m cifar_hpc ", "python submit.py "


def subparsers() -> dict[str, argparse.ArgumentParser]:
    action = next(a for a in parser()._actions if isinstance(a, argparse._SubParsersAction))
    choices: dict[str, argparse.ArgumentParser] = action.choices
    return choices


def examples(text: str | None, prefix: str) -> Iterator[str]:
    """The arguments of each example in a help text; a remark stands after several blanks."""
    for line in (text or "").splitlines():
        if line.strip().startswith(prefix.strip()):
            yield (line.strip() + " ").split("    ")[0].removeprefix(prefix).removeprefix(prefix.strip()).strip()


@pytest.mark.parametrize("command", sorted(subparsers()))
def test_every_command_has_a_manual_and_examples_that_parse(command: str) -> None:
    found = subparsers()[command]
    assert MANUAL[command] in (found.description or "")
    lines = list(examples(found.epilog, PREFIX))
    assert lines
    for line in lines:
        assert parser().parse_args(shlex.split(line)).command == command


def test_the_manual_knows_no_other_command() -> None:
    assert set(MANUAL) == set(subparsers())


def test_the_examples_of_the_two_programs_parse() -> None:
    top = list(examples(parser().epilog, PREFIX))
    assert len(top) >= 5
    for line in top:
        parser().parse_args(shlex.split(line))
    lines = list(examples(submit.EPILOG, SUBMIT))
    assert len(lines) >= 6
    for line in lines:
        submit.build_parser().parse_args(shlex.split(line))


@pytest.mark.parametrize("text", [*MANUAL.values(), submit.DESCRIPTION], ids=[*MANUAL, "submit.py"])
def test_lines_fit_a_terminal_of_80_columns(text: str) -> None:
    assert max(map(len, text.splitlines())) <= 79


@pytest.mark.parametrize("command", sorted(subparsers()))
def test_every_argument_but_the_run_is_explained(command: str) -> None:
    assert [a.dest for a in subparsers()[command]._actions if not a.help and a.dest not in ("run", "shell")] == []

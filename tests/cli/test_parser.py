"""The help of every command: its examples parse, and its lines fit a terminal."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Iterator
from importlib import import_module
from types import ModuleType

import pytest

from cifar_hpc import __version__
from cifar_hpc.__main__ import main
from cifar_hpc.cli import submit
from cifar_hpc.cli.parser import COMMANDS, build_parser

PREFIX, SUBMIT = "python -m cifar_hpc ", "python submit.py "


MODULES: dict[str, ModuleType] = {path.rpartition(".")[2]: import_module(f"cifar_hpc.cli.{path}") for path in COMMANDS}


def subparsers() -> dict[str, argparse.ArgumentParser]:
    action = next(a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    choices: dict[str, argparse.ArgumentParser] = action.choices
    return choices


def examples(text: str | None, prefix: str) -> Iterator[str]:
    """The arguments of each example in a help text; a remark stands after several blanks."""
    for line in (text or "").replace(" \\\n      ", " ").splitlines():
        if line.strip().startswith(prefix.strip()):
            yield (line.strip() + " ").split("    ")[0].removeprefix(prefix).removeprefix(prefix.strip()).strip()


@pytest.mark.parametrize("command", sorted(subparsers()))
def test_every_command_has_a_manual_and_examples_that_parse(command: str) -> None:
    found = subparsers()[command]
    description = found.description or ""
    line = next(text for path, text in COMMANDS.items() if path.endswith(command))
    assert line.casefold() in " ".join(description.split()).casefold()
    summary, text = (MODULES[command].__doc__ or "").split("\n\n", 1)
    assert description.endswith(text.strip()) and summary not in description
    lines = list(examples(found.epilog, PREFIX))
    assert lines
    for line in lines:
        arguments = build_parser().parse_args(shlex.split(line))
        assert arguments.command == command and arguments.main is MODULES[command].main


def test_the_commands_are_in_the_order_of_the_table() -> None:
    assert list(subparsers()) == list(MODULES)


@pytest.mark.parametrize("command", sorted(subparsers()))
def test_a_command_alone_has_the_same_help(command: str) -> None:
    (action,) = (a for a in build_parser([command])._actions if isinstance(a, argparse._SubParsersAction))
    assert list(action.choices) == list(MODULES)
    assert action.choices[command].format_help() == subparsers()[command].format_help()


def test_only_the_module_of_the_command_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    for path in COMMANDS:
        monkeypatch.delitem(sys.modules, f"cifar_hpc.cli.{path}", raising=False)
    build_parser(["--help"])
    assert [path for path in COMMANDS if f"cifar_hpc.cli.{path}" in sys.modules] == []
    build_parser(["cancel", "x"])
    assert [path for path in COMMANDS if f"cifar_hpc.cli.{path}" in sys.modules] == ["cancel"]


def test_the_examples_of_the_two_programs_parse() -> None:
    top = list(examples(build_parser().epilog, PREFIX))
    assert len(top) >= 5
    for line in top:
        build_parser().parse_args(shlex.split(line))
    lines = list(examples(submit.EPILOG, SUBMIT))
    assert len(lines) >= 6
    for line in lines:
        submit.build_parser().parse_args(shlex.split(line))


@pytest.mark.parametrize("name", [*MODULES, "", "submit.py"])
def test_help_fits_a_terminal_of_80_columns(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    parsers = {"": build_parser(), "submit.py": submit.build_parser(), **subparsers()}
    assert [line for line in parsers[name].format_help().splitlines() if len(line) > 79] == []


def test_the_list_of_commands_is_shown_where_none_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert capsys.readouterr().out == build_parser().format_help()
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"cifar_hpc {__version__}\n"
    assert main(["statu"]) == 2
    assert capsys.readouterr().err.endswith(" HINT: did you mean 'status'?\n")


@pytest.mark.parametrize("command", sorted(subparsers()))
def test_every_argument_but_the_run_is_explained(command: str) -> None:
    assert [a.dest for a in subparsers()[command]._actions if not a.help and a.dest not in ("run", "shell")] == []


def test_a_package_that_does_not_load_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(arguments: object) -> int:
        raise ImportError("libcudnn.so.9: cannot open shared object file")

    monkeypatch.setattr("cifar_hpc.cli.du.main", broken)
    assert main(["du"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: a Python package does not load here: libcudnn.so.9: ") and "HINT: load" in error

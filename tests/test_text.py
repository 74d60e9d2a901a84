"""What terminals obey never reaches them from a run's files: printable text, status, tail and error messages."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cifar_hpc import __main__
from cifar_hpc.__main__ import main
from cifar_hpc.cli import status, tail
from cifar_hpc.runs.paths import RunPaths
from cifar_hpc.text import (
    SHOWN_CHARACTERS,
    control_character,
    counted,
    duration,
    in_markdown,
    one_line,
    printable,
    shown,
)

ESCAPE = "\x1b]0;owned\x07\x1b[2J\x9b31m\r[/red][link=file:///x]"
ROW = {
    "epoch": 1,
    "train_loss": 1.0,
    "train_accuracy": 50.0,
    "test_loss": 1.0,
    "test_accuracy": 50.0,
    "lr": 0.1,
    "epoch_seconds": 1.0,
    "images_per_second": 9.0,
}


@given(st.text() | st.sampled_from([ESCAPE, "a\u202eb", "\ud800", "a\u2028b"]))
@settings(derandomize=True, deadline=None, database=None)
def test_printable_text_is_plain_and_loses_nothing_else(text: str) -> None:
    result = printable(text)
    assert all(control_character(c) is None or c in "\t\n" for c in result)
    if control_character(text.replace("\t", "").replace("\n", "")) is None:
        assert result == text


def test_control_characters_are_spelt_out() -> None:
    assert printable("a\x1b[31m\r\0\u202e\tb\n") == "a\\x1b[31m\\r\\x00\\u202e\tb\n"
    assert control_character("plain é日😀") is None
    assert control_character("a\tb") == "\t"


def test_text_for_a_cell_of_a_table_is_one_line_and_markdown_is_escaped() -> None:
    assert one_line(" a\n b\t\tc\x1b ") == r"a b c\x1b"
    assert in_markdown("a|b\n*c* <d> #1") == r"a\|b \*c\* \<d\> \#1"


def test_long_values_are_cut() -> None:
    assert shown("a") == "'a'"
    assert shown("a" * 10_000) == "'" + "a" * (SHOWN_CHARACTERS - 1) + "... (10,002 characters)"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "-"), (0.4, "0s"), (59, "59s"), (65, "1m05s"), (720, "12m"), (3900, "1h05m"), (180000, "2d02h"),
        (float("nan"), "?"), (float("inf"), "?"), (1e300, "?"), (-3.0, "0s"),
    ],
)  # fmt: skip
def test_durations(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text


@pytest.fixture
def paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunPaths:
    """A run with nothing in it, below a root of its own, without a Slurm."""
    monkeypatch.setenv("CIFAR_HPC_ROOT", str(tmp_path))
    monkeypatch.setattr("cifar_hpc.slurm.client.shutil.which", lambda name: None)
    run = RunPaths(tmp_path, "run")
    run.create()
    run.spec.write_text("train: {epochs: 3}\n")
    return run


def write_lines(path: Path, *rows: Any) -> None:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))


def failed(paths: RunPaths) -> None:
    write_lines(paths.events, {"event": "submitted"}, {"event": "failed", "error": ESCAPE, "job_id": ESCAPE})


def wrong_types(paths: RunPaths) -> None:
    write_lines(paths.metrics, ROW | {"epoch": ESCAPE, "test_accuracy": ESCAPE})


def no_numbers(paths: RunPaths) -> None:
    write_lines(paths.metrics, ROW | {"test_accuracy": ESCAPE, "images_per_second": [ESCAPE]})


def huge_numbers(paths: RunPaths) -> None:
    write_lines(paths.metrics, ROW | {"epoch_seconds": 1e300})


def wrong_events(paths: RunPaths) -> None:
    write_lines(paths.events, {"event": "submitted", "scheduler": "local", "job_id": [ESCAPE]}, {"event": ESCAPE})


def not_a_spec(paths: RunPaths) -> None:
    paths.spec.write_bytes(ESCAPE.encode())


def fifo(paths: RunPaths) -> None:
    paths.spec.unlink()
    os.mkfifo(paths.spec)


def planted_lock(paths: RunPaths) -> None:
    os.mkfifo(paths.lock)


@pytest.mark.parametrize(
    "damage", [failed, wrong_types, no_numbers, huge_numbers, wrong_events, not_a_spec, fifo, planted_lock]
)
def test_status_shows_all_runs_on_a_line_each_whatever_their_files_hold(
    paths: RunPaths, capsys: pytest.CaptureFixture[str], damage: Callable[[RunPaths], None]
) -> None:
    other = RunPaths(paths.root, "other")
    other.create()
    other.spec.write_text("train: {epochs: 7}\n")
    strange = paths.root / "logs" / f"x{ESCAPE.replace('/', '')}"
    strange.mkdir()
    (strange / "spec.yaml").touch()
    damage(paths)
    assert main(["status"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["RUN", "other", "run"]
    assert "0/7" in lines[1] and all(control_character(line) is None for line in lines)
    assert main(["status", "--json"]) == 0
    assert [s["run"] for s in json.loads(capsys.readouterr().out)] == ["other", "run"]


def test_watching_takes_no_text_for_markup(
    paths: RunPaths, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    failed(paths)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr(status.Screen, "wait", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "300")
    assert main(["status", "--watch"]) == 0
    out = capsys.readouterr().out
    assert "[/red]" in out and "\x07" not in out and "\x1b]0;" not in out


def test_tail_prints_no_control_characters(
    paths: RunPaths, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tail, "STATE_SECONDS", 0.0)
    failed(paths)
    paths.train_log.write_bytes(f"one\ttwo {ESCAPE}\n".encode() + b"\xff\n")
    assert main(["tail", "run"]) == 1
    captured = capsys.readouterr()
    assert captured.out.startswith("one\ttwo \\x1b]0;owned\\x07")
    for line in [*captured.out.split("\n"), *captured.err.split("\n")]:
        assert control_character(line.replace("\t", "")) is None
    assert "failed: \\x1b]0;owned" in captured.err


@pytest.mark.parametrize("damage", [wrong_types, planted_lock])
def test_tail_ends_where_a_run_is_unreadable(
    paths: RunPaths,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    damage: Callable[[RunPaths], None],
) -> None:
    monkeypatch.setattr(tail, "STATE_SECONDS", 0.0)
    monkeypatch.setattr(tail, "LOG_SECONDS", 0.0)
    damage(paths)
    assert main(["tail", "run"]) == 1
    assert "[unreadable: its files make no sense" in capsys.readouterr().err


def test_tail_of_epochs_leaves_out_what_is_no_row(
    paths: RunPaths, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tail, "STATE_SECONDS", 0.0)
    failed(paths)
    write_lines(paths.metrics, ROW, ROW | {"lr": ESCAPE}, {"epoch": 2}, [1], ROW | {"epoch": "3"}, ROW | {"epoch": 4})
    assert main(["tail", "run", "--epochs"]) == 1
    assert [line.split()[:2] for line in capsys.readouterr().out.splitlines()] == [["epoch", "1"], ["epoch", "4"]]


def test_commands_name_a_planted_log_instead_of_waiting_for_it(
    paths: RunPaths, capsys: pytest.CaptureFixture[str]
) -> None:
    os.mkfifo(paths.train_log)
    assert __main__.main(["tail", "run"]) == 2
    assert "train.log: is no regular file but a FIFO" in capsys.readouterr().err


def test_errors_carry_no_control_characters(paths: RunPaths, capsys: pytest.CaptureFixture[str]) -> None:
    assert __main__.main(["train", f"{ESCAPE}.yaml"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and control_character(error.rstrip("\n")) is None


def test_numbers_have_their_plurals() -> None:
    assert [counted(number, "epoch") for number in (0, 1, 12000)] == ["0 epochs", "1 epoch", "12,000 epochs"]
    assert [counted(number, "process") for number in (1, 2)] == ["1 process", "2 processes"]

"""The three logs: whole lines, half lines, and metrics.jsonl cut back to a checkpoint."""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest

from cifar_hpc.files import write_atomic
from cifar_hpc.runs.events import Requeued, Signal, append_event
from cifar_hpc.runs.logs import (
    KEPT_LINES,
    TrainLog,
    append_line,
    metrics_text,
    parse_jsonl,
    read_jsonl,
    restore_metrics,
    utc_now,
    write_metrics,
)

ROWS = [{"epoch": n, "test_accuracy": 10.1 * n, "job_id": None} for n in (1, 2, 3)]


@pytest.fixture
def metrics(tmp_path: Path) -> Path:
    path = tmp_path / "metrics.jsonl"
    for row in ROWS:
        append_line(path, json.dumps(row))
    return path


def test_rows_beyond_the_checkpoint_are_cut_in_place(metrics: Path) -> None:
    inode = metrics.stat().st_ino
    assert restore_metrics(metrics, ROWS[:1]) == 2
    assert read_jsonl(metrics) == ROWS[:1]
    assert metrics.stat().st_ino == inode  # a `tail -F` goes on


@pytest.mark.parametrize("tail", ['{"epoch": 4, "test_acc', "\0" * 500, '{"epoch": 4}\0\0\0', "[]\n7\n"])
def test_what_is_no_row_is_cut_and_is_no_lost_row(metrics: Path, tail: str) -> None:
    with metrics.open("a") as file:
        file.write(tail)
    assert restore_metrics(metrics, ROWS) == tail.startswith('{"epoch": 4}')
    assert metrics.read_text() == metrics_text(ROWS)


def test_nothing_to_do(metrics: Path) -> None:
    before = metrics.stat()
    assert restore_metrics(metrics, ROWS) == 0
    assert metrics.stat() == before


@pytest.mark.parametrize("damage", ["lost", "half a row", "last row lost"])
def test_what_is_lacking_at_the_end_is_appended(metrics: Path, damage: str) -> None:
    text, inode = metrics.read_text(), metrics.stat().st_ino
    if damage == "lost":
        metrics.unlink()
    elif damage == "half a row":
        os.truncate(metrics, len(text) - 9)
    else:
        metrics.write_text("".join(text.splitlines(keepends=True)[:-1]))
    assert restore_metrics(metrics, ROWS) == 0
    assert metrics.read_text() == metrics_text(ROWS) == text
    assert metrics.stat().st_ino == inode or damage == "lost"  # a `tail -F` goes on


@pytest.mark.parametrize("damage", ["another row", "first row lost", "NUL bytes", "a row twice"])
def test_a_damaged_file_is_written_anew_and_the_rows_beyond_are_counted(metrics: Path, damage: str) -> None:
    text = metrics.read_text()
    lines = text.splitlines(keepends=True)
    metrics.write_text(
        {
            "another row": text.replace('"epoch": 2', '"epoch": 7'),  # 3 and 7 are beyond the checkpoint
            "first row lost": "".join(lines[1:]),
            "NUL bytes": "\0" * len(lines[0]) + "".join(lines[1:]),
            "a row twice": "".join([lines[0], *lines]),
        }[damage]
    )
    assert restore_metrics(metrics, ROWS[:1]) == 2
    assert metrics.read_text() == lines[0]


def test_metrics_that_cannot_be_written_end_nothing_but_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    assert restore_metrics(tmp_path / "metrics.jsonl", ROWS) == 0
    assert "metrics.jsonl: is no regular file but a directory" in capsys.readouterr().err
    with pytest.raises(OSError, match="a directory"):
        write_metrics(tmp_path / "metrics.jsonl", ROWS)


def test_a_new_run_empties_the_file(metrics: Path, tmp_path: Path) -> None:
    assert restore_metrics(metrics, []) == 3
    assert metrics.read_text() == ""
    assert restore_metrics(tmp_path / "none.jsonl", []) == 0


def test_events_are_read_back_in_order(tmp_path: Path) -> None:
    path = tmp_path / "logs" / "events.jsonl"
    append_event(path, Signal(signal="SIGTERM", seconds=None, step=3), job_id="7", restart=0, world_size=2)
    append_event(path, Requeued(reason="timeout"), job_id="7", restart=0, world_size=2)
    first, second = read_jsonl(path)
    assert list(first) == ["time", "event", "host", "job_id", "restart", "world_size", "signal", "seconds", "step"]
    assert list(first.values())[3:] == ["7", 0, 2, "SIGTERM", None, 3], "a field without a default is always there"
    assert {"event": "requeued", "reason": "timeout"}.items() <= second.items() and "delay_seconds" not in second
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", first["time"])
    assert first["time"] <= second["time"] <= utc_now()


def test_half_a_line_is_left_out_and_swallows_no_other(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    append_line(path, '{"event": "started"}')
    with path.open("a") as file:
        file.write('{"event": "chec')  # as a full disk cuts it
    assert read_jsonl(path) == [{"event": "started"}]
    append_line(path, '{"event": "resumed"}')
    assert read_jsonl(path) == [{"event": "started"}, {"event": "resumed"}]


def test_what_is_no_row_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(b'[1]\n3\n\n\xff\xfe\n{"event": "x"}\n' + b"[" * 100_000 + b"\n")
    assert read_jsonl(path) == [{"event": "x"}]
    assert read_jsonl(tmp_path / "none") == []
    assert read_jsonl(tmp_path) == []
    os.mkfifo(tmp_path / "fifo")
    assert read_jsonl(tmp_path / "fifo") == []


@pytest.mark.parametrize("holes", [b"\0" * 4096, b'{"event": "a"}\n\0\0\0'])
def test_the_nul_bytes_of_a_crashed_machine_swallow_no_line(tmp_path: Path, holes: bytes) -> None:
    """As ext4 and XFS leave a file that had grown when the machine went down."""
    path = tmp_path / "events.jsonl"
    path.write_bytes(holes)
    append_line(path, '{"event": "resumed"}')
    assert read_jsonl(path)[-1] == {"event": "resumed"}
    assert len(read_jsonl(path)) == holes.count(b"event") + 1
    path.write_bytes(holes + b'{"event": "in the same block"}\n')
    assert read_jsonl(path)[-1] == {"event": "in the same block"}


def test_only_an_enabled_log_writes(tmp_path: Path) -> None:
    path = tmp_path / "train.log"
    TrainLog(path, enabled=False).line("silent")
    TrainLog(path, enabled=False).banner(["silent"])
    assert not path.exists()
    log = TrainLog(path, enabled=True)
    log.banner(["run a"])
    log.line("text")
    lines = path.read_text().splitlines()
    assert lines[1] == "== run a"
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d text", lines[2])


def test_a_log_that_cannot_be_written_ends_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "logs").write_text("a file where a folder should be")
    append_line(tmp_path / "logs" / "train.log", "what was to be said")
    assert "what was to be said" in capsys.readouterr().err


def test_lines_that_found_no_room_come_when_there_is_some(tmp_path: Path) -> None:
    """With a real limit on the length of files, in this process's standard error as well: where should they go?"""
    path = tmp_path / "events.jsonl"
    append_line(path, '{"line": 0}')
    whole = resource.getrlimit(resource.RLIMIT_FSIZE)
    with (tmp_path / "err").open("w") as full, contextlib.redirect_stderr(full):
        resource.setrlimit(resource.RLIMIT_FSIZE, (18, whole[1]))
        try:
            for number in range(1, 4):
                append_line(path, json.dumps({"line": number}))
            assert path.stat().st_size == 18  # half of line 1
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, whole)
        append_line(path, '{"line": 4}')
    assert [row["line"] for row in read_jsonl(path)] == [0, 1, 2, 3, 4]


def test_what_is_kept_for_later_is_bounded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "logs").write_text("a file where a folder should be")
    path = tmp_path / "logs" / "train.log"
    for number in range(KEPT_LINES + 5):
        append_line(path, str(number))
    (tmp_path / "logs").unlink()
    append_line(path, "last")
    assert path.read_text().splitlines() == [*(str(n) for n in range(6, KEPT_LINES + 5)), "last"]
    assert capsys.readouterr().err.count("\n") == KEPT_LINES + 5, "each of them was told at once"


@pytest.mark.parametrize("kind", ["link", "FIFO"])
def test_logs_are_written_to_files_only(tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    """A link that somebody else has planted would let a run write wherever its user may; a FIFO would hold it up."""
    path, target = tmp_path / "train.log", tmp_path / "somebody's"
    target.write_text("mine\n")
    if kind == "link":
        path.symlink_to(target)
    else:
        os.mkfifo(path)
    append_line(path, "a line")
    restore_metrics(path, ROWS)
    assert target.read_text() == "mine\n"
    words = "is a symbolic link, through which nothing is written" if kind == "link" else "FIFO"
    assert words in capsys.readouterr().err


def test_a_log_that_was_removed_is_made_again_and_says_so(tmp_path: Path) -> None:
    log = TrainLog(tmp_path / "logs" / "train.log", enabled=True)
    log.banner(["run a"])
    log.line("one")
    shutil.rmtree(tmp_path / "logs")
    log.line("two")
    first, second = log.path.read_text().splitlines()
    assert "WARNING" in first
    assert "was gone; it is made again" in first
    assert second.endswith("two")


def test_no_log_is_writable_to_all(tmp_path: Path) -> None:
    umask = os.umask(0)
    try:
        append_line(tmp_path / "logs" / "train.log", "x")
        write_metrics(tmp_path / "new" / "metrics.jsonl", ROWS)
        write_atomic(tmp_path / "logs" / "a.json", b"{}")
    finally:
        os.umask(umask)
    paths = list(tmp_path.rglob("*"))
    assert len(paths) == 5
    assert [p for p in paths if p.stat().st_mode & 0o002] == []


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ('{"a": 1}\n{"b": 2}\n', [{"a": 1}, {"b": 2}]),
        ('{"a": 1}\n{"b": 2}', [{"a": 1}, {"b": 2}]),
        ('{"a": 1}\n\n{"b"', [{"a": 1}]),
        ('{"a": [1\n2]}\n{"b": 2}\n', [{"b": 2}]),  # two halves that would be one row
        ('{"a": 1},{"b": 2}\n', []),  # two rows in one line
        ('[1]\n{"b": 2}\n', [{"b": 2}]),
        ("", []),
    ],
)
def test_rows_are_lines(text: str, rows: list[Any]) -> None:
    assert parse_jsonl(text.encode()) == rows

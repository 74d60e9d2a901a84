"""The three logs: whole lines, half lines, and metrics.jsonl cut back to a checkpoint."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from cifar_hpc.runlog import (
    TrainLog,
    append_event,
    append_line,
    count_requeues,
    count_starts,
    metrics_text,
    read_jsonl,
    restore_metrics,
    since_submission,
    utc_now,
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


def test_half_a_line_beyond_the_checkpoint_is_cut(metrics: Path) -> None:
    with metrics.open("a") as file:
        file.write('{"epoch": 4, "test_acc')
    assert restore_metrics(metrics, ROWS) == 0
    assert metrics.read_text() == metrics_text(ROWS)


def test_nothing_to_do(metrics: Path) -> None:
    before = metrics.stat()
    assert restore_metrics(metrics, ROWS) == 0
    assert metrics.stat() == before


@pytest.mark.parametrize("damage", ["lost", "half a row", "another row", "row lost"])
def test_what_the_checkpoint_has_and_the_file_has_not_is_written_anew(metrics: Path, damage: str) -> None:
    text = metrics.read_text()
    if damage == "lost":
        metrics.unlink()
    elif damage == "half a row":
        os.truncate(metrics, len(text) - 9)
    elif damage == "another row":
        metrics.write_text(text.replace('"epoch": 2', '"epoch": 7'))
    else:
        metrics.write_text("".join(text.splitlines(keepends=True)[1:]))
    assert restore_metrics(metrics, ROWS) == 0
    assert metrics.read_text() == metrics_text(ROWS) == text


def test_a_new_run_empties_the_file(metrics: Path, tmp_path: Path) -> None:
    assert restore_metrics(metrics, []) == 3
    assert metrics.read_text() == ""
    assert restore_metrics(tmp_path / "none.jsonl", []) == 0


def test_events_are_read_back_in_order(tmp_path: Path) -> None:
    path = tmp_path / "logs" / "events.jsonl"
    append_event(path, "started", job_id="7", restart=0, world_size=2, step=3)
    append_event(path, "requeued", job_id="7", restart=0, world_size=2, reason="timeout")
    first, second = read_jsonl(path)
    assert {k: first[k] for k in ("event", "job_id", "restart", "world_size", "step")} == {
        "event": "started", "job_id": "7", "restart": 0, "world_size": 2, "step": 3,
    }  # fmt: skip
    assert second["reason"] == "timeout"
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
    path.write_bytes(b'[1]\n3\n\n\xff\xfe\n{"event": "x"}\n')
    assert read_jsonl(path) == [{"event": "x"}]
    assert read_jsonl(tmp_path / "none") == []


def test_counts() -> None:
    events = [{"event": e} for e in ("submitted", "started", "resumed", "evaluated", "resumed")]
    events += [{"event": "requeued", "reason": r} for r in ("preemption", "timeout", "preemption")]
    assert count_starts(events) == 3
    assert count_requeues(events) == {"preemption": 2, "timeout": 1}


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
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d text", lines[3])


def test_a_log_that_cannot_be_written_ends_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "logs").write_text("a file where a folder should be")
    append_line(tmp_path / "logs" / "train.log", "what was to be said")
    assert "what was to be said" in capsys.readouterr().err


def test_limits_begin_anew_with_each_submission() -> None:
    rows = [{"event": e} for e in ("submitted", "requeued", "submitted", "started")]
    assert [row["event"] for row in since_submission(rows)] == ["submitted", "started"]
    assert since_submission(rows[1:2]) == rows[1:2]

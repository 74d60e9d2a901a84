"""The facts of a run from few of its rows are those from all of them, whatever the files hold."""

from __future__ import annotations

import itertools
import json
import math
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cifar_hpc.runs import history as run_facts
from cifar_hpc.runs.events import append_event
from cifar_hpc.runs.history import TELLING, read_facts, restarts_of
from cifar_hpc.runs.logs import read_jsonl
from cifar_hpc.runs.metrics import metrics_text
from cifar_hpc.runs.paths import RunPaths

settings.register_profile("ci", derandomize=True, deadline=None, database=None)
settings.load_profile("ci")

KINDS = (*TELLING, "evaluated", "signal", "mended", "checkpoint", "evaluated")


def facts_of_all_rows(paths: RunPaths) -> dict[str, Any]:
    """What `read_facts` is to find, from every row of both files."""
    events, rows = read_jsonl(paths.events), read_jsonl(paths.metrics)
    starts = [e for e in events if e.get("event") in ("started", "resumed")]
    submitted = [e for e in events if e.get("event") == "submitted"]
    requeues = [str(e.get("reason")) for e in events if e.get("event") == "requeued"]
    known = [e for e in events if e.get("event") in TELLING]
    word: Mapping[str, Any] = known[-1] if known else {}
    since = itertools.takewhile(lambda e: e["event"] not in ("submitted", "resumed"), reversed(known))
    cancelled = [e for e in since if e["event"] == "cancelled"]
    if cancelled and word["event"] != "finished":
        word = cancelled[0]
    last = rows[-1] if rows else {}
    restarts = restarts_of(events)
    return {
        "last_word": {k: word[k] for k in run_facts._USED_OF_LAST_WORD if k in word},
        "submitted": {k: submitted[-1][k] for k in ("scheduler", "job_id") if k in submitted[-1]} if submitted else {},
        "starts": len(starts),
        "requeues": {reason: requeues.count(reason) for reason in requeues},
        "causes": restarts.causes,
        "lost_seconds": restarts.lost_seconds,
        "up_seconds": restarts.up_seconds,
        "world_size": starts[-1].get("world_size") if starts else None,
        "job_id": next((e["job_id"] for e in reversed(events) if e.get("job_id")), None),
        "last_row": {k: last[k] for k in ("epoch", "test_accuracy", "images_per_second") if k in last},
        "epoch_seconds": [
            r["epoch_seconds"]
            for r in rows[-5:]
            if "epoch_seconds" in r and r.get("world_size") == last.get("world_size")
        ],
        "best_accuracy": max((r["test_accuracy"] for r in rows if "test_accuracy" in r), default=None),
    }


def outcome(work: Any) -> Any:
    """What it returns, or the type of what it raises; NaN, which equals nothing, as text."""
    try:
        return repr(work())
    except TypeError as error:
        return type(error)


values = st.one_of(st.none(), st.integers(-5, 5), st.floats(), st.text(max_size=3), st.just([1]))
accuracies = st.one_of(st.floats(0, 100), st.sampled_from([100.0, 0.0, 1e-7, 95, math.nan]), values)
event_rows = st.fixed_dictionaries(
    {"time": st.integers(0, 59).map("2026-01-01T00:00:{:02d}.000Z".format), "event": st.sampled_from(KINDS)},
    optional={"job_id": st.sampled_from(["7", "8", None, "", 9]), "world_size": values, "reason": values, "by": values},
)
metrics_rows = st.fixed_dictionaries(
    {"epoch": st.integers(0, 9)},
    optional={
        "world_size": st.sampled_from([1, 1, 2, None]),
        "test_accuracy": accuracies,
        "lr": st.just(0.1),
        "epoch_seconds": values,
        "images_per_second": values,
    },
)


@st.composite
def file_contents(draw: st.DrawFn, rows: st.SearchStrategy[dict[str, Any]]) -> bytes:
    """A log as it is written, or one that was cut, overwritten, joined, or written by something else."""
    separators = st.sampled_from([None, None, None, (",", ":")])
    lines = [json.dumps(row, separators=draw(separators)).encode() for row in draw(st.lists(rows, max_size=12))]
    content = b"".join(line + b"\n" for line in lines)
    for _ in range(draw(st.sampled_from([0, 0, 1, 2]))):
        at, length = draw(st.integers(0, len(content))), draw(st.integers(0, 40))
        filler = draw(st.sampled_from([b"", b"\0" * 9, b"\n", b"\r\n", b"{", b'"', b"\xff", b"[]\n", b"9"]))
        content = content[:at] + filler + content[at + length :]
    return content


@given(file_contents(event_rows), file_contents(metrics_rows))
@example(b"", b"\n")
@example(b"\n\n", b"\xef\xbb\xbf{}\n")
@settings(max_examples=400)
def test_whatever_the_logs_hold(events: bytes, metrics: bytes) -> None:
    with tempfile.TemporaryDirectory() as root:
        paths = RunPaths(Path(root), "run")
        paths.create()
        paths.events.write_bytes(events)
        paths.metrics.write_bytes(metrics)
        assert outcome(lambda: vars(read_facts(paths))) == outcome(lambda: facts_of_all_rows(paths))


@pytest.fixture
def paths(tmp_path: Path) -> RunPaths:
    """A run of 40 epochs, requeued once, written as runs write; its best epoch is 7."""
    result = RunPaths(tmp_path, "run")
    result.create()

    def emit(event: str, job_id: str | None = "7", **details: Any) -> None:
        append_event(result.events, event, job_id=job_id, restart=0, world_size=2, **details)

    rows = [
        {"epoch": e, "test_accuracy": 90.5 if e == 7 else 50.0 + e / 10, "lr": 0.1, "epoch_seconds": 1.0}
        for e in range(1, 41)
    ]
    emit("submitted", scheduler="local")
    emit("started")
    for row in rows:
        emit("evaluated", epoch=row["epoch"])
        emit("checkpoint", epoch=row["epoch"])
        if row["epoch"] == 20:
            emit("signal")
            emit("requeued", reason="timeout")
            emit("resumed")
    result.metrics.write_text(metrics_text(rows))
    return result


def test_few_rows_are_parsed(paths: RunPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[bytes] = []

    def counting(line: bytes) -> dict[str, Any] | None:
        parsed.append(line)
        return parse(line)

    parse = run_facts.parse_row
    monkeypatch.setattr(run_facts, "parse_row", counting)
    facts = read_facts(paths)
    assert vars(facts) == facts_of_all_rows(paths)
    assert (facts.best_accuracy, facts.starts, facts.requeues) == (90.5, 2, {"timeout": 1})
    assert len([line for line in parsed if line]) <= 12  # of 125


def test_the_best_row_counts_only_if_it_is_a_row(paths: RunPaths) -> None:
    whole = paths.metrics.read_bytes()
    paths.metrics.write_bytes(whole.replace(b'{"epoch": 7, ', b'{"epoch": 7, \0'))
    assert read_facts(paths).best_accuracy == 54.0
    paths.metrics.write_bytes(whole.replace(b'{"epoch": 7, ', b'{"epoch": 7, "test_accuracy": 99.5, "lr": 1, '))
    assert read_facts(paths).best_accuracy == 90.5  # as json reads it: the last of two


def test_what_is_no_regular_file_is_empty(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path, "run")
    paths.create()
    nothing = read_facts(paths)
    assert (nothing.last_word, nothing.starts, nothing.last_row, nothing.best_accuracy) == ({}, 0, {}, None)
    os.mkfifo(paths.events)
    paths.metrics.mkdir()
    assert read_facts(paths) == nothing

"""progress.json: what it holds, and that it never says anything but what the logs do."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import tiny_spec
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cifar_hpc.runs import progress as progress_file
from cifar_hpc.runs.events import Cancelled, Checkpoint, FirstStep, Requeued, Signal, Submitted
from cifar_hpc.runs.frozen_spec import freeze
from cifar_hpc.runs.history import History
from cifar_hpc.runs.logs import append_line, read_jsonl
from cifar_hpc.runs.paths import RunPaths
from cifar_hpc.runs.progress import EpochSummary, Progress, read_progress, record_event, update_progress
from cifar_hpc.runs.state import read_state

ROW: dict[str, Any] = {
    "epoch": 1, "step": 9, "train_loss": 2.0, "train_accuracy": 30.0, "test_accuracy": 40.0, "lr": 0.1,
    "epoch_seconds": 10.0, "images_per_second": 5.0,
}  # fmt: skip
START = '{"time": "2026-01-01T00:00:00Z", "event": "started", "job_id": "7", "restart": 0, "world_size": 2, "step": 0}'


@pytest.fixture
def paths(tmp_path: Path) -> RunPaths:
    """A run of 4 epochs with one behind it."""
    run = RunPaths(tmp_path, "run")
    run.create()
    freeze(run, tiny_spec(train={"epochs": 4}))
    append_line(run.events, START)
    append_line(run.metrics, json.dumps(ROW))
    return run


def written(paths: RunPaths) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(paths.progress.read_text())
    return found


def emit(paths: RunPaths, event: Any) -> None:
    record_event(paths, event, job_id="7", restart=0, world_size=2)


def check(paths: RunPaths) -> None:
    """What is read is what the logs hold."""
    found = read_progress(paths)
    assert found.history == History.read(paths.events)
    assert found.summary == EpochSummary.of(read_jsonl(paths.metrics))


def test_the_fields_for_programs(paths: RunPaths) -> None:
    update_progress(
        paths, tiny_spec(train={"epochs": 4}), step=13, epoch=13 / 9, loss=1.5, accuracy=45.0, lr=0.2,
        images_per_second=8.0, peak_memory_bytes={"0": 100, "1": 90},
    )  # fmt: skip
    emit(paths, Checkpoint(file="step_00000012.pt", step=12, epoch=1, step_in_epoch=3, bytes=1))
    found = written(paths)
    expected = {
        "state": "running", "step": 13, "epoch": 13 / 9, "epochs": 4, "loss": 1.5, "accuracy": 45.0, "best": 40.0,
        "test_accuracy": 40.0, "lr": 0.2, "images_per_second": 8.0, "world_size": 2, "attempt": 1, "job_id": "7",
        "peak_memory_bytes": {"0": 100, "1": 90},
    }  # fmt: skip
    assert {key: found[key] for key in expected} == expected
    assert found["eta_seconds"] == pytest.approx((4 - 13 / 9) * 10)
    assert found["checkpoint"]["step"] == 12 and found["checkpoint"]["epoch"] == pytest.approx(12 / 9)
    assert found["checkpoint"]["time"].endswith("Z") and found["host"] and found["time"]


@pytest.mark.parametrize(
    ("event", "state"),
    [
        (Submitted(scheduler="slurm", code="", command=""), "queued"),
        (Requeued(reason="preemption"), "requeued"),
        (Cancelled(by="me"), "cancelled"),
        (Signal(signal="SIGTERM", seconds=None), "running"),
    ],
)
def test_each_event_changes_the_state(paths: RunPaths, event: Any, state: str) -> None:
    emit(paths, event)
    assert written(paths)["state"] == state


def test_a_run_without_it_is_read_from_its_logs_and_gets_one(paths: RunPaths) -> None:
    assert not paths.progress.exists()
    found = read_progress(paths)
    assert (found.epochs, found.epoch, found.step, found.loss, found.eta_seconds) == (4, 1.0, 9, 2.0, 30.0)
    assert read_progress(paths) == found
    assert written(paths)["epochs"] == 4


def test_what_was_appended_since_is_added(paths: RunPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    read_progress(paths)
    append_line(paths.events, START.replace("started", "resumed"))
    append_line(paths.metrics, json.dumps(ROW | {"epoch": 2, "test_accuracy": 60.0}))
    read: list[int] = []
    monkeypatch.setattr(progress_file, "parse_jsonl", lambda text: read.append(len(text)) or progress_rows(text))
    check(paths)
    assert read[0] == len(START) + 1, "only the news of events.jsonl is read"
    assert read_progress(paths).summary.best_accuracy == 60.0


progress_rows = progress_file.parse_jsonl


def test_half_a_line_counts_when_it_is_whole(paths: RunPaths) -> None:
    read_progress(paths)
    with paths.events.open("a") as file:
        file.write('{"event": "requeued", "rea')
    assert read_progress(paths).history.requeues == {}
    with paths.events.open("a") as file:
        file.write('son": "timeout"}\n')
    assert read_progress(paths).history.requeues == {"timeout": 1}


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def replace(path: Path) -> None:
    path.write_text('{"event": "a longer row that is another one", "epoch": 3, "text": "' + "x" * 300 + '"}\n')


@pytest.mark.parametrize("change", [cut, replace, Path.unlink, lambda path: path.write_text("")])
@pytest.mark.parametrize("name", ["events", "metrics"])
def test_a_log_that_was_cut_or_replaced_is_read_again(
    paths: RunPaths, change: Callable[[Path], Any], name: str
) -> None:
    read_progress(paths)
    change(getattr(paths, name))
    check(paths)


def test_a_spec_that_was_written_since_counts(paths: RunPaths) -> None:
    assert read_progress(paths).epochs == 4
    freeze(paths, tiny_spec(train={"epochs": 9}))
    assert read_progress(paths).epochs == 9
    assert written(paths)["epochs"] == 9


@pytest.mark.parametrize("damage", [cut, replace, lambda path: path.write_text("[]"), os.unlink])
def test_a_damaged_file_is_made_again(paths: RunPaths, damage: Callable[[Path], Any]) -> None:
    before = read_progress(paths)
    damage(paths.progress)
    assert read_progress(paths) == before
    assert written(paths)["epochs"] == 4


def test_one_of_another_version_is_made_again(paths: RunPaths) -> None:
    before = read_progress(paths)
    paths.progress.write_text(json.dumps(written(paths) | {"format": 0, "epochs": 77}))
    assert read_progress(paths) == before


@pytest.mark.parametrize("obstacle", ["a folder in its place", "a log that makes no sense", "no folder"])
def test_a_failure_to_write_it_ends_nothing(paths: RunPaths, obstacle: str) -> None:
    if obstacle == "a folder in its place":
        paths.progress.mkdir()
    elif obstacle == "a log that makes no sense":
        paths.metrics.write_text('{"epoch": "x"}\n')
    else:
        shutil.rmtree(paths.logs)
    update_progress(paths, tiny_spec(), step=3)
    emit(paths, FirstStep(step=1, startup={}))
    assert not list(paths.logs.glob(".*.tmp"))


def test_no_number_that_json_does_not_know_is_written(paths: RunPaths) -> None:
    update_progress(paths, loss=float("nan"), eta_seconds=float("inf"))
    assert written(paths)["loss"] is None and written(paths)["eta_seconds"] is None


def test_rows_that_were_cut_off_leave_the_position_of_the_attempt(paths: RunPaths) -> None:
    append_line(paths.metrics, json.dumps(ROW | {"epoch": 2, "step": 18}))
    assert read_progress(paths).epoch == 2.0
    paths.metrics.write_text(json.dumps(ROW) + "\n")
    update_progress(paths, step=12, epoch=12 / 9)
    assert (written(paths)["step"], written(paths)["metrics"]["epoch"]) == (12, 1)


EVENTS = ("submitted", "started", "resumed", "checkpoint", "signal", "requeued", "failed", "cancelled", "finished")
contents = st.lists(st.sampled_from(EVENTS), max_size=8).map(
    lambda names: b"".join(b'{"event": "%s", "job_id": "7", "step": 3}\n' % name.encode() for name in names)
)
fillers = st.sampled_from([b"", b"\0" * 9, b"\n", b"\r\n", b"{", b'"', b"\xff", b"[]\n", b"9"])


@given(contents, contents, st.integers(0, 300), fillers)
@settings(derandomize=True, database=None, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_reading_in_two_parts_is_reading_all(
    tmp_path: Path, first: bytes, second: bytes, at: int, filler: bytes
) -> None:
    """Also where the log holds what is no row, or a line that was ended later."""
    path = tmp_path / "events.jsonl"
    content = (first + second)[:at] + filler + (first + second)[at:] + b"\n"
    found = Progress()
    for size in (len(first), len(content)):
        path.write_bytes(content[:size])
        found.add_events(path)
    assert found.history == History.read(path)


@pytest.mark.parametrize("wrong", [{"epoch": None}, {"events_bytes": "x"}, {"metrics": {"epoch": "many"}}])
def test_wrong_types_in_the_file_are_read_from_the_logs_instead(paths: RunPaths, wrong: dict[str, Any]) -> None:
    read_progress(paths)
    paths.progress.write_text(json.dumps(written(paths) | wrong))
    append_line(paths.metrics, json.dumps(ROW | {"epoch": 2, "step": 18}))
    emit(paths, Checkpoint(file="step_00000018.pt", step=18, epoch=2, step_in_epoch=0, bytes=1))
    check(paths)
    assert read_progress(paths).epoch == 2


def test_the_time_left_follows_a_run_that_does_not_write_the_file(paths: RunPaths) -> None:
    assert read_progress(paths).eta_seconds == pytest.approx(30)
    append_line(paths.metrics, json.dumps(ROW | {"epoch": 2, "step": 18}))
    append_line(paths.metrics, json.dumps(ROW | {"epoch": 3, "step": 27}))
    assert read_progress(paths).eta_seconds == pytest.approx(10)


def test_a_spec_that_is_gone_leaves_the_epochs_open(paths: RunPaths) -> None:
    assert read_progress(paths).epochs == 4
    paths.spec.unlink()
    found = read_progress(paths)
    assert (found.epochs, found.log_seconds, found.eta_seconds) == (0, None, None)


CHECKPOINT = {"event": "checkpoint", "file": "step_00000004.pt", "step": 4, "epoch": 0, "step_in_epoch": 4, "bytes": 1}


@pytest.mark.parametrize(
    ("data", "position"),
    [({"train_size": 264}, 4 / 9), ({"train_size": 264, "holdout": 40, "test_size": None}, 4 / 7),
     ({"source": "cifar10", "train_size": None}, 4 / 1563), ({"train_size": None}, None)],
)  # fmt: skip
def test_the_first_checkpoint_before_any_line_of_progress_is_a_position(
    tmp_path: Path, data: dict[str, Any], position: float | None
) -> None:
    run = RunPaths(tmp_path, "run")
    run.create()
    freeze(run, tiny_spec(data=data))
    append_line(run.events, START)
    append_line(run.events, json.dumps(CHECKPOINT))
    assert read_progress(run).saved_epoch == position and read_progress(run).step == (4 if position else 0)
    assert read_state(run, {}).position == (position or 0.0)
    run.progress.unlink()
    append_line(run.metrics, json.dumps(ROW))  # what is measured counts
    assert read_progress(run).saved_epoch == 4 / 9


def test_a_checkpoint_that_is_written_in_the_first_epoch_is_a_position_at_once(tmp_path: Path) -> None:
    run, spec = RunPaths(tmp_path, "run"), tiny_spec()
    run.create()
    freeze(run, spec)
    append_line(run.events, START)
    update_progress(run, spec, step=1, epoch=1 / 9)  # after the first step
    record_event(
        run, Checkpoint(file="x", step=4, epoch=0, step_in_epoch=4, bytes=1), spec, job_id="7", restart=0, world_size=2
    )
    assert written(run)["checkpoint"]["epoch"] == pytest.approx(4 / 9)


@pytest.mark.parametrize(
    ("data", "epoch"), [({}, 5 / 391), ({"source": "cifar100"}, 5 / 391), ({"target": "mine.py:load"}, 0)]
)
def test_a_position_within_the_first_epoch_needs_the_number_of_images(
    tmp_path: Path, data: dict[str, Any], epoch: float
) -> None:
    """Of images from a user's function, only the job knows it."""
    run = RunPaths(tmp_path, "run")
    run.create()
    run.spec.write_text(json.dumps({"data": data, "train": {"batch_size": 128}}))
    append_line(run.events, START)
    emit(run, Checkpoint(file="step_00000005.pt", step=5, epoch=0, step_in_epoch=5, bytes=1))
    assert read_progress(run).epoch == pytest.approx(epoch)

"""Trackers show each epoch once, whatever happened on the way; and nothing they do or lack touches the run."""

from __future__ import annotations

import json
import os
import signal
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import tiny_spec
from processes import Runs
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto.wandb_internal_pb2 import Record

from cifar_hpc.config.io import check_resumable, from_plain, run_name, to_plain
from cifar_hpc.config.spec import Spec
from cifar_hpc.runs.frozen_spec import freeze
from cifar_hpc.runs.logs import read_jsonl
from cifar_hpc.runs.metrics import restore_metrics
from cifar_hpc.runs.paths import RunPaths
from cifar_hpc.training.trackers import SCALARS
from cifar_hpc.training.tracking import Tracking

LIMIT_SECONDS = 60  # only bounds how long a hang lasts
BOTH = ("tracking.tensorboard=true", "tracking.wandb=offline")


def tensorboard_shows(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Steps and values by tag, as TensorBoard itself reads them."""
    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    return {tag: [(e.step, e.value) for e in accumulator.Scalars(tag)] for tag in accumulator.Tags()["scalars"]}


def wandb_records(folder: Path) -> list[Record]:
    """The records in the only file of an offline run: LevelDB's log format with wandb's protocol buffers."""
    (path,) = folder.glob("offline-run-*/run-*.wandb")
    content, found, part, at = path.read_bytes(), [], b"", 7  # after wandb's own header
    while at + 7 <= len(content):
        _, length, kind = struct.unpack("<IHB", content[at : at + 7])
        part += content[at + 7 : at + 7 + length]
        if kind in (1, 4):  # a whole record, or the last part of one
            found.append(Record.FromString(part))
            part = b""
        at += 7 + length
        if 32768 - at % 32768 < 7:  # the rest of a block is too short for another header
            at += -at % 32768
    return found


def wandb_shows(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Steps and values by tag."""
    shown: dict[str, list[tuple[int, float]]] = {}
    for record in wandb_records(folder):
        if record.HasField("history"):
            values = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
            for tag in SCALARS.keys() & values.keys():
                shown.setdefault(tag, []).append((values["_step"], values[tag]))
    return shown


def expected(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {tag: [(row["epoch"], pytest.approx(row[field])) for row in rows] for tag, field in SCALARS.items()}


def wait_for_trackers(root: Path) -> None:
    """Until no process of a tracker of runs under `root` is left."""
    end = time.monotonic() + LIMIT_SECONDS
    while any(
        b"cifar_hpc.training.trackers" in words and bytes(root) in words
        for path in Path("/proc").glob("[0-9]*/cmdline")
        if (words := read(path).split(b"\0"))
    ):
        assert time.monotonic() < end, "a tracker does not end"
        time.sleep(0.05)


def read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def test_each_epoch_once_after_a_kill_and_a_resume_from_before(runs: Runs) -> None:
    runs.kill("killed", 1, "train.epochs=3", *BOTH, interrupt="SIGKILL@step:20")
    wait_for_trackers(runs.root)
    for path in (runs.root / "checkpoints" / "killed").glob("step_*"):
        if int(path.stem.partition("_")[2]) > 10:
            path.unlink()
    runs.finish("killed", 1, "train.epochs=3", *BOTH)
    assert runs.events("killed", "resumed")[-1]["metrics_cut"] == 1
    logs = runs.root / "logs" / "killed"
    rows = read_jsonl(logs / "metrics.jsonl")
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert tensorboard_shows(logs / "tracking") == expected(rows)
    sizes = sorted(path.stat().st_size > 0 for path in (logs / "tracking").glob("events.out.tfevents.*"))
    assert sizes == [False, True]  # whoever reads them without TensorBoard's rules finds each epoch once, too
    assert wandb_shows(logs / "tracking" / "wandb") == expected(rows)
    assert runs.events("killed", "tracking_failed") == []


def test_what_is_told_to_stop_and_begun_without_trackers_shows_all_of_it(runs: Runs) -> None:
    runs.stop("stopped", 1, interrupt="SIGTERM@step:10")
    frozen = runs.root / "logs" / "stopped" / "spec.yaml"
    text = frozen.read_text()
    assert "tracking:\n" in text
    frozen.write_text(text.partition("tracking:\n")[0] + text[text.index("resources:\n") :])  # as of an older version
    runs.finish("stopped", 2, *BOTH)
    logs = runs.root / "logs" / "stopped"
    assert tensorboard_shows(logs / "tracking") == expected(read_jsonl(logs / "metrics.jsonl"))
    records = wandb_records(logs / "tracking" / "wandb")
    assert [r.exit.exit_code for r in records if r.HasField("exit")] == [0]


def test_a_tracker_that_is_down_leaves_the_run_as_it_would_be(
    runs: Runs, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))  # no key there, so wandb refuses
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    runs.finish("without", 1)
    runs.finish("down", 1, "tracking.wandb=online", "tracking.tensorboard=true")
    (failed,) = runs.events("down", "tracking_failed")
    assert failed["tracker"] == "wandb"
    assert "key" in failed["error"]
    assert runs.log("down").count("WARNING tracking.wandb: ") == 1
    rows, others = (read_jsonl(runs.root / "logs" / name / "metrics.jsonl") for name in ("down", "without"))
    assert [row["train_loss"] for row in rows] == [row["train_loss"] for row in others]
    assert tensorboard_shows(runs.root / "logs" / "down" / "tracking") == expected(rows)


class Watched:
    """A run's folder with rows, and its trackers, whose failures are noted."""

    def __init__(self, root: Path) -> None:
        self.paths = RunPaths(root, "run")
        self.paths.create()
        self.failures: list[tuple[str, str]] = []
        self.tracking = Tracking(self.paths, Spec().tracking, lambda *_: None)
        self.rows: list[dict[str, Any]] = []

    def start(self, **tracking: Any) -> None:
        spec = tiny_spec(tracking=tracking)
        freeze(self.paths, spec)
        self.tracking = Tracking(self.paths, spec.tracking, lambda *words: self.failures.append(words))
        self.tracking.start()

    def add(self, value: float) -> None:
        """One more epoch."""
        epoch = len(self.rows) + 1
        row = dict.fromkeys(SCALARS.values(), value) | {"epoch": epoch, "time": f"2026-01-01T00:00:{epoch:02}.000Z"}
        self.rows.append(row)
        restore_metrics(self.paths.metrics, self.rows)
        self.tracking.update()

    def wait(self) -> None:
        """Until all processes have ended by themselves."""
        for process in self.tracking._running.values():
            process.wait(LIMIT_SECONDS)


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[Watched]:
    made = Watched(tmp_path)
    yield made
    made.tracking.finish(0.0)
    wait_for_trackers(tmp_path)


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Puts a package of the given text in the place of an installed one, for the trackers' processes."""

    def put(package: str, text: str) -> None:
        (tmp_path / f"{package}.py").write_text(text)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    return put


def test_a_tensorboard_that_is_open_forgets_what_is_computed_again(watched: Watched) -> None:
    watched.start(tensorboard=True)
    for value in (1.0, 2.0, 3.0):
        watched.add(value)
    watched.tracking.finish(LIMIT_SECONDS)
    accumulator = EventAccumulator(str(watched.paths.tracking))
    accumulator.Reload()
    assert [e.value for e in accumulator.Scalars("loss/train")] == [1, 2, 3]
    del watched.rows[1:]  # back to the first epoch
    restore_metrics(watched.paths.metrics, watched.rows)
    watched.start(tensorboard=True)
    watched.add(20.0)
    watched.tracking.finish(LIMIT_SECONDS)
    accumulator.Reload()
    shown = [(e.step, e.value, e.wall_time) for e in accumulator.Scalars("loss/train")]
    assert shown == [(1, 1, 1767225601), (2, 20, 1767225602)]
    assert watched.failures == []


def test_signals_to_the_whole_job_do_not_end_a_tracker_before_the_run(watched: Watched, stand_in: Any) -> None:
    watched.start(tensorboard=True)
    watched.add(1.0)
    output = watched.paths.tracking
    end = time.monotonic() + LIMIT_SECONDS
    while not list(output.glob("events.out.tfevents.*")):  # until it has taken the signals over
        assert time.monotonic() < end
        time.sleep(0.02)
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT):
        watched.tracking._running["tensorboard"].send_signal(number)
    watched.add(2.0)
    watched.tracking.finish(LIMIT_SECONDS)
    assert tensorboard_shows(output) == expected(watched.rows)


def test_a_run_that_is_not_finished_is_shown_as_preempted(watched: Watched) -> None:
    watched.start(wandb="offline", project="mine")
    watched.add(1.0)
    watched.tracking.finish(LIMIT_SECONDS)
    records = wandb_records(watched.paths.tracking / "wandb")
    assert any(record.HasField("preempting") for record in records)
    assert [record.exit.exit_code for record in records if record.HasField("exit")] == [1]
    (run,) = (record.run for record in records if record.HasField("run"))
    assert (run.project, run.run_id, run.display_name) == ("mine", "run", "run")
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert config["model"] == to_plain(tiny_spec())["model"]


def test_a_package_that_is_missing(watched: Watched, stand_in: Any) -> None:
    stand_in("wandb", "raise ModuleNotFoundError('No module named wandb')")
    watched.start(wandb="offline")
    watched.wait()
    watched.add(1.0)
    watched.add(2.0)
    watched.tracking.finish()
    ((tracker, reason),) = watched.failures
    assert tracker == "wandb"
    assert "No module named wandb" in reason
    assert "requirements-trackers.txt" in reason


def test_a_tracker_that_raises_says_so_once_in_one_line(watched: Watched, stand_in: Any) -> None:
    stand_in("wandb", "def Settings(**_): pass\ndef init(**_): raise OSError('the disk \\x1b[1m\\nis full')")
    watched.start(wandb="offline", tensorboard=True)
    watched.add(1.0)
    watched.tracking.finish(LIMIT_SECONDS)
    assert watched.failures == [("wandb", "OSError: the disk \\x1b[1m is full")]
    assert tensorboard_shows(watched.paths.tracking) == expected(watched.rows)


def test_a_tracker_that_hangs_never_holds_the_run_up(watched: Watched, stand_in: Any) -> None:
    stand_in("wandb", "import time\ntime.sleep(1000)")
    watched.start(wandb="offline")
    watched.add(1.0)
    for _ in range(100_000):  # more than fits in a pipe
        watched.tracking.update()
    assert watched.failures == []
    watched.tracking.finish(0.1)
    assert watched.failures == [("wandb", "it was not done 0.1 s after the run")]
    wait_for_trackers(watched.paths.root)


def test_a_tracker_that_hangs_is_ended_by_its_alarm(watched: Watched, stand_in: Any) -> None:
    stand_in("wandb", "import signal, time\nassert signal.alarm(1) == 60\ntime.sleep(1000)")
    watched.start(wandb="offline")
    watched.wait()
    watched.add(1.0)
    assert watched.failures == [("wandb", "it got nothing done for a minute")]


def test_a_process_that_cannot_be_started(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(watched.paths.root / "python"))
    watched.start(wandb="offline")
    watched.add(1.0)
    watched.tracking.finish()
    ((tracker, reason),) = watched.failures
    assert tracker == "wandb"
    assert "No such file" in reason


def a_fifo(path: Path, target: Path) -> None:
    os.mkfifo(path)


def a_link(path: Path, target: Path) -> None:
    path.symlink_to(target)


@pytest.mark.parametrize(("plant", "words"), [(a_fifo, "No such device"), (a_link, "is a symbolic link")])
def test_what_stands_in_the_place_of_a_trackers_log_is_neither_waited_for_nor_written_to(
    watched: Watched, tmp_path: Path, plant: Any, words: str
) -> None:
    mine = tmp_path / "mine"
    mine.write_text("precious")
    watched.paths.tracking.mkdir()
    plant(watched.paths.tracking / "tensorboard.log", mine)
    signal.alarm(LIMIT_SECONDS)  # whoever waits for the FIFO's other end waits for ever
    watched.start(tensorboard=True)
    signal.alarm(0)
    ((tracker, reason),) = watched.failures
    assert tracker == "tensorboard" and words in reason
    assert mine.read_text() == "precious"


def test_nothing_is_started_unless_it_is_asked_for(watched: Watched) -> None:
    watched.start()
    watched.add(1.0)
    watched.tracking.finish()
    assert not watched.paths.tracking.exists()


def test_trackers_are_no_part_of_a_run() -> None:
    plain = to_plain(Spec())
    del plain["tracking"]  # as of a version that had none
    tracked = tiny_spec(tracking={"tensorboard": True, "wandb": "offline", "project": "other"})
    check_resumable(from_plain(plain), Spec(), "run")
    check_resumable(tiny_spec(), tracked, "run")
    assert run_name("job", tracked) == run_name("job", tiny_spec())

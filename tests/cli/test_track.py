"""track: each epoch is shown once, whatever happened on the way."""

from __future__ import annotations

import json
import struct
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
from helpers import tiny_spec
from processes import Runs
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto.wandb_internal_pb2 import Record

from cifar_hpc.__main__ import main
from cifar_hpc.cli.track import SCALARS, TrackedRun
from cifar_hpc.config.io import check_resumable, from_plain, run_name, to_plain
from cifar_hpc.config.spec import Spec
from cifar_hpc.runs.frozen_spec import freeze
from cifar_hpc.runs.logs import restore_metrics
from cifar_hpc.runs.paths import RunPaths
from cifar_hpc.runs.queue import QueuePoller


def tensorboard_shows(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Steps and values by tag, as TensorBoard itself reads them."""
    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    return {tag: [(e.step, e.value) for e in accumulator.Scalars(tag)] for tag in accumulator.Tags()["scalars"]}


def wandb_records(folder: Path) -> list[Record]:
    """The records in the only file of an offline run, once wandb's own process has written the last of them."""
    (path,) = folder.glob("offline-run-*/run-*.wandb")
    deadline = time.monotonic() + 60
    found = read_records(path.read_bytes())
    while not any(record.HasField("exit") for record in found):
        assert time.monotonic() < deadline, "no exit record"
        time.sleep(0.1)
        found = read_records(path.read_bytes())
    return found


def read_records(content: bytes) -> list[Record]:
    """The whole records in a file of wandb: LevelDB's log format with protocol buffers."""
    found, part, at = [], b"", 7  # after wandb's own header
    while at + 7 <= len(content):
        _, length, kind = struct.unpack("<IHB", content[at : at + 7])
        if at + 7 + length > len(content):
            break
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


class Run:
    """A run's folder with rows of metrics.jsonl, and what has happened to it."""

    def __init__(self, root: Path) -> None:
        self.paths = RunPaths(root, "run")
        self.paths.create()
        freeze(self.paths, tiny_spec(train={"epochs": 3}))
        self.rows: list[dict[str, Any]] = []

    def add(self, *values: float) -> None:
        """Complete an epoch for each value."""
        for value in values:
            epoch = len(self.rows) + 1
            row = dict.fromkeys(SCALARS.values(), value) | {"epoch": epoch, "time": f"2026-01-01T00:00:{epoch:02}.000Z"}
            self.rows.append(row)
        restore_metrics(self.paths.metrics, self.rows)

    def go_back(self, epoch: int) -> None:
        """Resume from the checkpoint at the end of `epoch`."""
        del self.rows[epoch:]
        restore_metrics(self.paths.metrics, self.rows)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("CIFAR_HPC_ROOT", str(tmp_path))
    monkeypatch.setattr("cifar_hpc.slurm.client.shutil.which", lambda name: None)
    return Run(tmp_path)


def follow(run: Run, folder: Path) -> TrackedRun:
    """The run, shown in folder/run."""
    return TrackedRun(run.paths, Namespace(tensorboard=str(folder), wandb=None), QueuePoller(run.paths.root, 0.0))


def test_a_finished_run_is_shown_at_once_and_once_by_each_call(run: Run, tmp_path: Path) -> None:
    run.add(1.0, 2.0, 3.0)
    for _ in range(2):
        assert main(["track", "run", "--tensorboard", str(tmp_path / "board"), "--wandb", "offline"]) == 0
    assert tensorboard_shows(tmp_path / "board" / "run") == expected(run.rows)
    sizes = sorted(path.stat().st_size > 0 for path in (tmp_path / "board" / "run").glob("events.out.tfevents.*"))
    assert sizes == [False, True]  # whoever reads them without TensorBoard's rules finds each epoch once, too
    assert wandb_shows(run.paths.tracking / "wandb") == expected(run.rows)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tensorboard", "~nobody-here/tb"], "--tensorboard: '~nobody-here/tb' names no user"),
        (["--wandb", "offline", "--project", "my/lab"], "--wandb offline: "),
        (["--wandb", "online"], "HINT: wandb login"),
    ],
)
def test_a_trackers_refusal_is_one_line(
    run: Run, words: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(run.paths.root))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # where nothing answers
    run.add(1.0)
    assert main(["track", "run", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and "Traceback" not in error


def test_epochs_that_are_computed_again_take_the_place_of_the_first_ones(run: Run, tmp_path: Path) -> None:
    run.add(1.0, 2.0, 3.0)
    tracked = follow(run, tmp_path / "board")
    tracked.poll()
    tracked.close()
    accumulator = EventAccumulator(str(tmp_path / "board" / "run"))  # a TensorBoard that is open all the time
    accumulator.Reload()
    assert [e.value for e in accumulator.Scalars("loss/train")] == [1, 2, 3]
    run.go_back(1)
    tracked = follow(run, tmp_path / "board")
    tracked.poll()
    run.add(20.0)
    tracked.poll()
    tracked.close()
    accumulator.Reload()
    shown = [(e.step, e.value, e.wall_time) for e in accumulator.Scalars("loss/train")]
    assert shown == [(1, 1, 1767225601), (2, 20, 1767225602)]


def test_a_run_that_goes_back_while_it_is_followed_is_shown_from_the_first_epoch_on(run: Run, tmp_path: Path) -> None:
    run.add(1.0, 2.0)
    tracked = follow(run, tmp_path / "board")
    tracked.poll()
    run.go_back(1)
    run.add(5.0)
    tracked.poll()
    tracked.close()
    assert tensorboard_shows(tmp_path / "board" / "run") == expected(run.rows)


def test_a_run_that_is_not_finished_is_shown_as_preempted(run: Run) -> None:
    run.add(1.0)
    assert main(["track", "run", "--wandb", "offline", "--project", "mine"]) == 0
    records = wandb_records(run.paths.tracking / "wandb")
    assert any(record.HasField("preempting") for record in records)
    assert [record.exit.exit_code for record in records if record.HasField("exit")] == [1]
    (shown,) = (record.run for record in records if record.HasField("run"))
    assert (shown.project, shown.run_id, shown.display_name) == ("mine", "run", "run")
    config = {item.key: json.loads(item.value_json) for item in shown.config.update}
    assert config["model"] == to_plain(tiny_spec())["model"]


def test_a_package_that_is_missing_is_named_with_what_to_install(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert main(["track", "run", "--wandb", "offline"]) == 2
    assert "pip install -r requirements-trackers.txt" in capsys.readouterr().err


def test_a_tracker_has_to_be_chosen(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["track", "run"]) == 2
    assert "--tensorboard DIR" in capsys.readouterr().err


def test_old_keys_are_accepted_with_a_hint(runs: Runs) -> None:
    runs.finish("old", 1, "tracking.tensorboard=true", "tracking.wandb=offline")
    assert "HINT: python -m cifar_hpc track old --tensorboard DIR" in runs.log("old")
    assert not (runs.root / "logs" / "old" / "tracking").exists()


def test_trackers_are_no_part_of_a_run() -> None:
    plain = to_plain(Spec())
    del plain["tracking"]  # as of a version that had none
    tracked = tiny_spec(tracking={"tensorboard": True, "wandb": "offline", "project": "other"})
    check_resumable(from_plain(plain), Spec(), "run")
    check_resumable(tiny_spec(), tracked, "run")
    assert run_name("job", tracked) == run_name("job", tiny_spec())

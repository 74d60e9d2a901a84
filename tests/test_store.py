"""The folder of checkpoints: whole files only, whatever happens; retention, best.pt, the index, and failed writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import leftovers

from cifar_hpc import checkpoint, store
from cifar_hpc.errors import RunFailedError
from cifar_hpc.store import BEST, INDEX, CheckpointStore, candidates, newest_good, read_index


def state(step: int) -> dict[str, Any]:
    keys = [k for k in checkpoint.REQUIRED if k != "digest"]
    return dict.fromkeys(keys, 0) | {"format": checkpoint.FORMAT, "step": step, "model": torch.full((100,), step)}


class Recorder(CheckpointStore):
    """A store that remembers what it reported."""

    def __init__(self, directory: Path, keep: int = 3) -> None:
        self.written: list[str] = []
        self.failed: list[tuple[str, str]] = []
        super().__init__(
            directory, keep, lambda name, entry: self.written.append(name), lambda *what: self.failed.append(what)
        )

    def put(self, step: int, best: bool = False) -> str | None:
        self.save(state(step), best)
        return self.wait()


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_a_killed_writer_leaves_only_what_verifies(tmp_path: Path) -> None:
    script = Path(__file__).with_name("crashing_writer.py")
    environment = os.environ | {"PYTHONPATH": str(script.parent.parent)}
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)], capture_output=True, text=True, timeout=120, env=environment,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(done.stdout.splitlines()) == 16 + 2 + 12


def test_content_is_synced_before_the_name_and_the_name_before_it_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def seen_fsync(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))  # noqa: PTH115
        order.append("sync folder" if path.is_dir() else f"sync {path.suffix}")
        fsync(descriptor)

    def seen_replace(self: Path, target: Path) -> Path:
        order.append(f"rename to {target.name}")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", seen_fsync)
    monkeypatch.setattr(Path, "replace", seen_replace)
    writer = CheckpointStore(tmp_path, 3, lambda name, entry: order.append("reported"), lambda *what: None)
    writer.save(state(7))
    assert writer.wait() is None
    assert order[:3] == ["sync .tmp", "rename to step_00000007.pt", "sync folder"]
    assert order[-1] == "reported"


def test_retention_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    writer = Recorder(tmp_path, keep=2)
    for step in (5, 10, 15, 100, 20):
        assert writer.put(step, best=step == 5) is None
    assert names(tmp_path) == [BEST, INDEX, "step_00000020.pt", "step_00000100.pt"]
    assert checkpoint.read(tmp_path / BEST)["step"] == 5
    assert [p.name for p in candidates(tmp_path)] == ["step_00000100.pt", "step_00000020.pt"]
    assert writer.written == [f"step_{s:08d}.pt" for s in (5, 10, 15, 100, 20)]
    assert writer.failed == []


def test_the_index_names_what_is_there(tmp_path: Path) -> None:
    writer = Recorder(tmp_path, keep=2)
    for step in (1, 2, 3):
        writer.put(step, best=step < 3)
    index = json.loads((tmp_path / INDEX).read_text())
    assert list(index["checkpoints"]) == ["step_00000002.pt", "step_00000003.pt"]
    for name, entry in {**index["checkpoints"], BEST: index["best"]}.items():
        content = (tmp_path / name).read_bytes()
        assert (entry["sha256"], entry["bytes"]) == (sha256(content).hexdigest(), len(content))
    assert index["best"]["step"] == 2
    assert index["best"]["file"] == BEST


@pytest.mark.parametrize("content", ["", "{", "[]", '{"checkpoints": 3}', None])
def test_a_damaged_index_is_made_anew(tmp_path: Path, content: str | None) -> None:
    writer = Recorder(tmp_path)
    writer.put(1)
    if content is None:
        (tmp_path / INDEX).unlink()
    else:
        (tmp_path / INDEX).write_text(content)
    assert read_index(tmp_path) == {"checkpoints": {}, "best": None}
    assert writer.put(2) is None
    assert "step_00000002.pt" in read_index(tmp_path)["checkpoints"]


def test_the_same_step_is_replaced(tmp_path: Path) -> None:
    writer = Recorder(tmp_path)
    writer.put(4)
    writer.save({**state(4), "epoch": 1})
    writer.wait()
    found = newest_good(tmp_path)
    assert found is not None
    assert found.state["epoch"] == 1


def test_best_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    assert Recorder(tmp_path).put(3, best=True) is None
    assert checkpoint.read(tmp_path / BEST)["step"] == 3
    assert leftovers(tmp_path) == []


def test_leftovers_of_a_killed_writer_are_removed_and_nothing_else(tmp_path: Path) -> None:
    Recorder(tmp_path).put(1)
    (tmp_path / ".step_00000002.pt.77.tmp").write_bytes(b"half")
    (tmp_path / "mine.tmp").write_bytes(b"a person's")
    Recorder(tmp_path)
    assert names(tmp_path) == [INDEX, "mine.tmp", "step_00000001.pt"]


def test_falls_back_to_the_newest_good_one(tmp_path: Path) -> None:
    writer = Recorder(tmp_path)
    for step in (1, 2, 3):
        writer.put(step)
    (tmp_path / "step_00000003.pt").write_bytes(b"x")
    os.truncate(tmp_path / "step_00000002.pt", 100)
    found = newest_good(tmp_path)
    assert found is not None
    assert found.path.name == "step_00000001.pt"
    assert [p.name for p, _ in found.bad] == ["step_00000003.pt", "step_00000002.pt"]
    assert all("not readable" in reason for _, reason in found.bad)


def test_a_new_run_has_none(tmp_path: Path) -> None:
    (tmp_path / "step_x.pt").touch()
    (tmp_path / "step_00000001.pt.damaged").touch()
    assert newest_good(tmp_path) is None
    assert newest_good(tmp_path / "none") is None


def test_where_none_is_good_the_run_does_not_start_over(tmp_path: Path) -> None:
    for step in (1, 2):
        (tmp_path / f"step_{step:08d}.pt").write_bytes(b"x")
    with pytest.raises(RunFailedError, match=r"(?s)no checkpoint .* good.*step_00000002.*step_00000001.*HINT"):
        newest_good(tmp_path)


@pytest.mark.parametrize(
    ("owner", "name", "error"),
    [
        (torch, "save", OSError(28, "No space left on device")),
        (torch, "save", RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed")),
        (os, "fsync", OSError(5, "Input/output error")),
        (Path, "replace", PermissionError(13, "Permission denied")),
        (store, "write_atomic", OSError(28, "No space left on device")),
    ],
)
def test_a_failed_write_is_reported_and_the_old_ones_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, error: Exception
) -> None:
    writer = Recorder(tmp_path)
    writer.put(1, best=True)
    before = (tmp_path / "step_00000001.pt").read_bytes()

    def fail(*_: object, **__: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fail)
        reason = writer.put(2)
    assert reason == f"{type(error).__name__}: {error}"
    assert writer.failed == [("step_00000002.pt", reason)]
    assert writer.written == ["step_00000001.pt"]
    assert leftovers(tmp_path) == []
    assert (tmp_path / "step_00000001.pt").read_bytes() == before
    assert writer.put(3) is None  # and the next one goes through
    assert writer.written == ["step_00000001.pt", "step_00000003.pt"]


def test_a_full_disk(tmp_path: Path) -> None:
    """A real one: /dev/full answers every write with ENOSPC."""
    writer = Recorder(tmp_path)
    writer.put(1)
    (tmp_path / f".step_00000002.pt.{os.getpid()}.tmp").symlink_to("/dev/full")
    reason = writer.put(2)
    assert reason is not None
    assert names(tmp_path) == [INDEX, "step_00000001.pt"]


def test_writing_goes_on_in_the_background_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go, running = threading.Event(), []
    save = torch.save

    def slow_save(content: Any, file: Any) -> None:
        running.append(content["step"])
        assert go.wait(60)
        save(content, file)

    monkeypatch.setattr(torch, "save", slow_save)
    writer = Recorder(tmp_path)
    assert not writer.busy
    writer.save(state(1))
    assert writer.busy
    assert candidates(tmp_path) == []
    second = threading.Thread(target=writer.save, args=(state(2),))
    second.start()  # waits for the first
    go.set()
    second.join()
    assert writer.wait() is None
    assert not writer.busy
    assert running == [1, 2]
    assert writer.written == ["step_00000001.pt", "step_00000002.pt"]

"""The folder of checkpoints: whole files only, whatever happens; retention, best.pt, the index, and failed writes."""

from __future__ import annotations

import json
import os
import queue
import resource
import shutil
import subprocess
import sys
import threading
import weakref
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import PROJECT, TESTS, blank_state, leftovers

from cifar_hpc.errors import RunFailedError
from cifar_hpc.runs.events import Checkpoint, CheckpointFailed, Event
from cifar_hpc.training.checkpoints import store
from cifar_hpc.training.checkpoints.format import TrainingState, read_checkpoint
from cifar_hpc.training.checkpoints.store import (
    BEST,
    INDEX,
    CheckpointStore,
    candidates,
    misnamed,
    newest_good,
    read_index,
)


def state(step: int, epoch: int = 0) -> TrainingState:
    return blank_state(step, epoch, number=step)


class Recorder(CheckpointStore):
    """A store that remembers what it reported."""

    def __init__(self, directory: Path, keep: int = 3) -> None:
        self.written: list[str] = []
        self.failed: list[tuple[str, str]] = []
        self.notes: list[str] = []
        super().__init__(directory, keep, self._emit, self.notes.append)

    def _emit(self, event: Event) -> None:
        if isinstance(event, CheckpointFailed):
            self.failed.append((event.file, event.reason))
        else:
            assert isinstance(event, Checkpoint)
            self.written.append(event.file)

    def put(self, step: int, best: bool = False) -> str | None:
        self.save(state(step), best)
        return self.wait()


def flip(path: Path) -> None:
    """One bit in the middle of a file, in place: its hard links are flipped as well."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    with path.open("r+b") as file:
        file.write(content)


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


@pytest.mark.process
def test_a_killed_writer_leaves_only_what_verifies(tmp_path: Path) -> None:
    script = TESTS / "crashing_writer.py"
    environment = os.environ | {"PYTHONPATH": str(PROJECT)}
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
    writer = CheckpointStore(tmp_path, 3, lambda event: order.append("reported"), pytest.fail)
    writer.save(state(7))
    assert writer.wait() is None
    assert order[:3] == ["sync .tmp", "rename to step_00000007.pt", "sync folder"]
    assert order[-1] == "reported"


def test_retention_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    writer = Recorder(tmp_path, keep=2)
    for step in (5, 10, 15, 100, 20):
        assert writer.put(step, best=step == 5) is None
    assert names(tmp_path) == [BEST, INDEX, "step_00000020.pt", "step_00000100.pt"]
    assert read_checkpoint(tmp_path / BEST).step == 5
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


FOREIGN = ["", "{", "[]", '{"checkpoints": 3}', '{"checkpoints": {"step_00000001.pt": 3, "x": {}}, "best": "?"}', None]


ENTRY = {"step": True, "epoch": 0, "step_in_epoch": 1, "sha256": "", "bytes": 1, "mtime_ns": 1, "time": "\x1b[2J"}
CRAFTED = json.dumps({"checkpoints": {"step_00000001.pt": ENTRY}, "best": {**ENTRY, "step": 10.0**30}})
LONG = [pytest.param(" " * 2**22 + CRAFTED, id="long"), pytest.param('{"checkpoints": ' + "9" * 5000, id="number")]


@pytest.mark.parametrize("content", [*FOREIGN, CRAFTED, *LONG, "[" * 100_000, "\0" * 300])
def test_a_damaged_or_foreign_index_is_mended_by_the_next_save(tmp_path: Path, content: str | None) -> None:
    writer = Recorder(tmp_path)
    writer.put(1, best=True)
    writer.put(2)
    good = read_index(tmp_path)
    assert set(good) == {"step_00000001.pt", "step_00000002.pt", BEST}
    if content is None:
        (tmp_path / INDEX).unlink()
    else:
        (tmp_path / INDEX).write_text(content)
    assert read_index(tmp_path) == {}
    assert writer.put(3) is None
    mended = json.loads((tmp_path / INDEX).read_text())
    assert list(mended["checkpoints"]) == [f"step_0000000{n}.pt" for n in (1, 2, 3)]
    times = [mended["checkpoints"]["step_00000001.pt"].pop("time"), mended["best"].pop("time")]
    assert times[0] == times[1]
    assert mended["best"] == {"file": BEST, **mended["checkpoints"]["step_00000001.pt"]}
    assert mended["checkpoints"]["step_00000002.pt"]["sha256"] == good["step_00000002.pt"]["sha256"]


def test_a_stale_index_is_mended_by_the_next_save(tmp_path: Path) -> None:
    writer = Recorder(tmp_path)
    writer.put(1, best=True)
    stale = (tmp_path / INDEX).read_bytes()
    writer.put(2, best=True)
    writer.save(state(1, epoch=1))  # another file under the name that the stale index knows
    writer.wait()
    (tmp_path / INDEX).write_bytes(stale)
    writer.put(3)
    index = read_index(tmp_path)
    assert index["step_00000001.pt"]["epoch"] == 1
    for name, entry in index.items():
        assert entry["sha256"] == sha256((tmp_path / name).read_bytes()).hexdigest()
    assert index[BEST]["step"] == 2


@pytest.mark.parametrize("obstacle", ["folder", "FIFO"])
def test_an_index_that_cannot_be_read_or_written_loses_no_checkpoint(tmp_path: Path, obstacle: str) -> None:
    if obstacle == "folder":
        (tmp_path / INDEX).mkdir()
    else:
        os.mkfifo(tmp_path / INDEX)
    writer = Recorder(tmp_path)
    assert writer.put(1, best=True) is None
    assert writer.written == ["step_00000001.pt"]
    assert read_checkpoint(tmp_path / BEST).step == 1
    assert len(writer.notes) == (obstacle == "folder")  # a FIFO is simply replaced
    assert leftovers(tmp_path) == []


def test_the_same_step_is_replaced(tmp_path: Path) -> None:
    writer = Recorder(tmp_path)
    writer.put(4)
    writer.save(state(4, epoch=1))
    writer.wait()
    found = newest_good(tmp_path)
    assert found is not None
    assert found.state.epoch == 1


def test_best_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    assert Recorder(tmp_path).put(3, best=True) is None
    assert read_checkpoint(tmp_path / BEST).step == 3
    assert leftovers(tmp_path) == []


def test_what_a_killed_writer_did_not_get_to_is_done_at_the_next_start(tmp_path: Path) -> None:
    """Killed between the checkpoint and its index, or before the old ones were removed."""
    writer = Recorder(tmp_path, keep=9)
    for step in (1, 2, 3, 4):
        writer.put(step, best=step == 2)
    index = json.loads((tmp_path / INDEX).read_text())
    del index["checkpoints"]["step_00000004.pt"]
    (tmp_path / INDEX).write_text(json.dumps(index))
    Recorder(tmp_path, keep=2)
    assert names(tmp_path) == [BEST, INDEX, "step_00000003.pt", "step_00000004.pt"]
    assert list(read_index(tmp_path)) == ["step_00000003.pt", "step_00000004.pt", BEST]
    before = (tmp_path / INDEX).stat()
    Recorder(tmp_path, keep=2)
    assert (tmp_path / INDEX).stat() == before, "nothing to do"


def test_leftovers_of_a_killed_writer_are_removed_and_nothing_else(tmp_path: Path) -> None:
    Recorder(tmp_path).put(1)
    (tmp_path / ".step_00000002.pt.77.tmp").write_bytes(b"half")
    (tmp_path / "mine.tmp").write_bytes(b"a person's")
    Recorder(tmp_path)
    assert names(tmp_path) == [INDEX, "mine.tmp", "step_00000001.pt"]


def test_what_a_failed_write_could_not_remove_goes_with_the_next_one(tmp_path: Path) -> None:
    """A storage that fails lets nothing be removed either."""
    store = Recorder(tmp_path)
    (tmp_path / ".step_00000001.pt.77.tmp").write_bytes(b"half")
    store.put(2)
    assert names(tmp_path) == [INDEX, "step_00000002.pt"]


def test_falls_back_to_the_newest_good_one(tmp_path: Path) -> None:
    writer = Recorder(tmp_path, keep=9)
    for step in range(1, 11):
        writer.put(step)
    path = {step: tmp_path / f"step_{step:08d}.pt" for step in range(1, 12)}
    torch.save([1, 2], path[11])
    path[10].write_text("text")
    os.truncate(path[9], 100)
    flip(path[8])
    path[7].write_bytes(b"")
    for step in (6, 5, 4):
        path[step].unlink()
    path[6].mkdir()
    os.mkfifo(path[5])
    path[4].symlink_to("nowhere")
    path[3].write_bytes(path[2].read_bytes())
    found = newest_good(tmp_path)
    assert found is not None
    assert found.path == path[2]
    expected = {
        11: "not a checkpoint of cifar_hpc", 10: "no file of torch.save", 9: "cut short", 8: "damaged", 7: "empty",
        6: "a directory", 5: "a FIFO", 4: "a link to nothing", 3: "holds step 2, which is not what its name says",
    }  # fmt: skip
    assert [p for p, _ in found.bad] == [path[step] for step in expected]
    for (_, reason), words in zip(found.bad, expected.values(), strict=True):
        assert words in reason


def test_best_is_a_whole_state_and_the_last_resort(tmp_path: Path) -> None:
    writer = Recorder(tmp_path)
    for step in (1, 2, 3):
        writer.put(step, best=step == 2)
    best, (newest, middle, oldest) = tmp_path / BEST, candidates(tmp_path)

    def chosen() -> tuple[Path, list[Path]]:
        found = newest_good(tmp_path)
        assert found is not None
        return found.path, [path for path, _ in found.bad]

    assert chosen() == (newest, [])
    newest.write_bytes(b"x")
    assert chosen() == (middle, [newest])
    middle.unlink()
    middle.write_bytes(b"x")
    assert chosen() == (best, [newest, middle]), "best.pt is newer than what is left of the others"
    oldest.unlink()
    assert chosen() == (best, [newest, middle])
    for path in (newest, middle):
        path.unlink()
    assert chosen() == (best, [])
    best.write_bytes(b"x")
    with pytest.raises(RunFailedError, match=r"(?s)no checkpoint .* good.*best\.pt: no file of torch\.save"):
        newest_good(tmp_path)


def test_a_look_while_the_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The only file is removed between the listing and the reading, since a newer one has come."""
    writer = Recorder(tmp_path, keep=1)
    writer.put(1)
    looked: list[str] = []

    def late_read(path: Path) -> TrainingState:
        if not looked:
            looked.append(path.name)
            writer.put(2)
        return read_checkpoint(path)

    monkeypatch.setattr(store, "read_checkpoint", late_read)
    found = newest_good(tmp_path)
    assert looked == ["step_00000001.pt"]
    assert found is not None
    assert (found.path.name, found.bad) == ("step_00000002.pt", [])


def test_only_the_names_that_a_run_writes_count(tmp_path: Path) -> None:
    Recorder(tmp_path).put(18)
    other = tmp_path / "step_18.pt"
    other.write_bytes(b"another claim to step 18")
    assert [p.name for p in candidates(tmp_path)] == ["step_00000018.pt"]
    assert misnamed(tmp_path) == [other]
    found = newest_good(tmp_path)
    assert found is not None
    assert found.bad == []
    found.path.unlink()
    with pytest.raises(RunFailedError, match=r"step_18\.pt: not a name that a run gives"):
        newest_good(tmp_path)


def test_a_new_run_has_none(tmp_path: Path) -> None:
    (tmp_path / "step_x.pt").touch()
    (tmp_path / "step_00000001.pt.damaged").touch()
    assert newest_good(tmp_path) is None
    assert newest_good(tmp_path / "none") is None


def test_a_folder_that_cannot_be_read_is_no_new_run(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file in the folder's place")
    with pytest.raises(RunFailedError, match=r"run: cannot be read: Not a directory\. HINT"):
        newest_good(tmp_path / "run")


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
        writer.save(state(2))
        settled(writer)
        reason = f"{type(error).__name__}: {error}"
        assert writer.failed == [("step_00000002.pt", reason)]
        assert writer.wait() == reason
    assert writer.written == ["step_00000001.pt"]
    assert leftovers(tmp_path) == []
    assert (tmp_path / "step_00000001.pt").read_bytes() == before
    assert writer.put(3) is None  # and the next one goes through
    assert writer.written == ["step_00000001.pt", "step_00000003.pt"]


def test_a_failed_index_is_no_failed_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store, "write_atomic", fail)
    writer = Recorder(tmp_path)
    assert writer.put(1) is None
    assert (writer.written, writer.failed) == (["step_00000001.pt"], [])
    assert "No space left" in writer.notes[0]


def test_a_best_one_that_found_no_room_is_written_with_the_next(tmp_path: Path) -> None:
    """A real limit: RLIMIT_FSIZE answers every write beyond it with EFBIG, as a full disk or a quota does."""
    writer = Recorder(tmp_path)
    writer.put(1, best=True)
    whole = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, whole[1]))
    try:
        for step, best in ((2, True), (3, False)):
            writer.save(state(step), best)
            settled(writer)
        assert [(name, "File too large" in reason) for name, reason in writer.failed] == [
            ("step_00000002.pt", True), ("step_00000002.pt", True), ("step_00000003.pt", True),
        ]  # fmt: skip
        assert names(tmp_path) == [BEST, INDEX, "step_00000001.pt"]
        assert read_checkpoint(tmp_path / BEST).step == 1
        assert writer.best_error is not None
        assert "File too large" in str(writer.wait())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, whole)
    assert writer.put(4) is None
    assert writer.written == ["step_00000001.pt", "step_00000002.pt", "step_00000004.pt"]
    assert read_checkpoint(tmp_path / BEST).step == 2
    assert read_index(tmp_path)[BEST]["step"] == 2
    assert writer.best_error is None
    assert leftovers(tmp_path) == []


def test_a_held_state_is_written_with_the_next_one_or_at_the_end(tmp_path: Path) -> None:
    writer = Recorder(tmp_path)
    writer.put(1, best=True)
    for step in (2, 3):
        writer.hold(state(step))
        settled(writer)
    assert writer.written == ["step_00000001.pt"] and read_checkpoint(tmp_path / BEST).step == 1
    assert writer.put(4) is None
    assert writer.written[1:] == ["step_00000003.pt", "step_00000004.pt"], "the later one of both, and before the next"
    assert read_checkpoint(tmp_path / BEST).step == 3
    writer.hold(state(5))
    assert writer.wait() is None
    assert writer.written[3:] == ["step_00000005.pt"] and read_checkpoint(tmp_path / BEST).step == 5
    writer.hold(state(6))
    assert writer.put(7, best=True) is None
    assert writer.written[4:] == ["step_00000007.pt"] and read_checkpoint(tmp_path / BEST).step == 7


def test_waiting_tries_once_more(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file in the folder's place")
    writer = Recorder(tmp_path / "run")
    writer.save(state(1))
    settled(writer)
    assert "exists" in str(writer.wait())
    (tmp_path / "run").unlink()
    assert writer.wait() is None
    assert names(tmp_path / "run") == [INDEX, "step_00000001.pt"]


def test_what_stands_in_the_way_of_best_holds_up_nothing_else(tmp_path: Path) -> None:
    (tmp_path / BEST / "x").mkdir(parents=True)
    writer = Recorder(tmp_path)
    assert writer.put(1, best=True) is None
    assert "Is a directory" in str(writer.best_error)
    assert writer.written == ["step_00000001.pt"]
    assert {name for name, _ in writer.failed} == {BEST}
    (tmp_path / BEST / "x").rmdir()
    (tmp_path / BEST).rmdir()
    assert writer.put(2) is None
    assert writer.best_error is None
    assert read_checkpoint(tmp_path / BEST).step == 1


def test_a_folder_that_is_removed_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    writer = Recorder(folder)
    writer.put(1)
    assert writer.holds(1)
    shutil.rmtree(folder)
    assert not writer.holds(1)
    assert writer.put(2) is None
    assert [note.partition(" was gone")[0] for note in writer.notes] == [str(folder)]
    save = torch.save

    def remove_meanwhile(content: Any, file: Any) -> None:
        save(content, file)
        if folder.exists():
            shutil.rmtree(folder)
            monkeypatch.undo()

    monkeypatch.setattr(torch, "save", remove_meanwhile)
    assert writer.put(3) is None
    assert names(folder) == [INDEX, "step_00000003.pt"]
    assert writer.failed == []


class Slow:
    """A storage that finishes writing a checkpoint when the test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.began: queue.Queue[int] = queue.Queue()
        self.go_on = threading.Semaphore(0)
        self.states: list[weakref.ref[torch.Tensor]] = []
        save = torch.save

        def slow_save(content: Any, file: Any) -> None:
            self.began.put(content["step"])
            assert self.go_on.acquire(timeout=60)
            save(content, file)

        monkeypatch.setattr(torch, "save", slow_save)

    def state(self, step: int) -> TrainingState:
        made = state(step)
        self.states.append(weakref.ref(made.model["head.bias"]))
        return made

    def alive(self) -> int:
        return sum(made() is not None for made in self.states)


def test_slow_storage_stalls_nothing_and_piles_up_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Slow(monkeypatch)
    writer = Recorder(tmp_path, keep=9)
    assert not writer.busy
    threads = threading.active_count()
    writer.save(slow.state(1))
    assert slow.began.get(timeout=60) == 1
    assert writer.busy
    for step in range(2, 50):  # all of these return while the first is still being written
        writer.save(slow.state(step), best=step in (10, 20))
        assert slow.alive() <= 3
        assert threading.active_count() == threads + 1
    assert candidates(tmp_path) == []
    assert writer.holds(49)
    for _ in range(3):
        slow.go_on.release()
    assert writer.wait() is None
    assert not writer.busy
    assert writer.written == [f"step_{s:08d}.pt" for s in (1, 20, 49)], "in order, the best one first, the newest last"
    assert read_checkpoint(tmp_path / BEST).step == 20
    assert slow.alive() == 0


def test_a_newer_best_one_takes_the_place_of_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Slow(monkeypatch)
    writer = Recorder(tmp_path)
    for step in (1, 2, 3, 4):
        writer.save(slow.state(step), best=step in (2, 4))
        if step == 1:
            slow.began.get(timeout=60)
    slow.go_on.release(2)
    assert writer.wait() is None
    assert writer.written == ["step_00000001.pt", "step_00000004.pt"]
    assert read_checkpoint(tmp_path / BEST).step == 4


def test_waiting_tells_that_the_writing_gets_on(tmp_path: Path) -> None:
    writer = Recorder(tmp_path)
    writer.save(state(1))
    beats: list[int] = []
    assert writer.wait(lambda: beats.append(writer.bytes_written)) is None
    assert writer.bytes_written > 1000
    assert beats == sorted(set(beats)), "told only where something was written"


def settled(writer: CheckpointStore) -> None:
    """Until its thread is at an end, without the last try that `wait` makes."""
    while (thread := writer._thread) is not None:
        thread.join(0.01)

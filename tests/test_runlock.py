"""One writer a run, with real processes: whoever holds the lock, and however that process ends."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cifar_hpc.errors import RunBusyError
from cifar_hpc.runlock import RunLock, describe, holder, read_owner

HOLD = """
import sys
from pathlib import Path
from cifar_hpc.runlock import RunLock
lock = RunLock(Path(sys.argv[1]))
lock.acquire({"job_id": "17", "host": "node1", "pid": 4242})
print("held", flush=True)
sys.stdin.readline()
lock.release()
print("released", flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def other(tmp_path: Path) -> subprocess.Popen[str]:
    """Another process, which holds the lock until it reads a line."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run.lock")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parent.parent,
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process  # type: ignore[misc]
        process.kill()


def test_a_second_holder_is_refused_and_told_who(tmp_path: Path, other: subprocess.Popen[str]) -> None:
    path = tmp_path / "run.lock"
    with pytest.raises(RunBusyError, match=r"run\.lock: .*job 17 \(pid 4242 on node1\)") as caught:
        RunLock(path).acquire({})
    assert caught.value.exit_code == 4
    assert holder(path) == read_owner(path) == {"job_id": "17", "host": "node1", "pid": 4242}


def test_release_frees_it(tmp_path: Path, other: subprocess.Popen[str]) -> None:
    assert other.stdin is not None
    assert other.stdout is not None
    other.stdin.write("go\n")
    other.stdin.flush()
    assert other.stdout.readline() == "released\n"
    mine = RunLock(tmp_path / "run.lock")
    mine.acquire({"pid": 1})
    assert holder(mine.path) == read_owner(mine.path) == {"pid": 1}  # nothing is left of the longer text before
    mine.release()
    assert holder(mine.path) is None


def test_sigkill_frees_it(tmp_path: Path, other: subprocess.Popen[str]) -> None:
    os.kill(other.pid, signal.SIGKILL)
    other.wait()
    path = tmp_path / "run.lock"
    assert holder(path) is None
    assert read_owner(path)["pid"] == 4242  # the last one, for messages only
    mine = RunLock(path)
    mine.acquire({})
    mine.release()


def test_patience_waits_for_a_dying_holder(tmp_path: Path, other: subprocess.Popen[str]) -> None:
    os.kill(other.pid, signal.SIGTERM)  # it may or may not be gone when we ask
    mine = RunLock(tmp_path / "run.lock")
    mine.acquire({"pid": 1}, patience_seconds=60)
    mine.release()


def test_two_locks_of_one_process_exclude_each_other(tmp_path: Path) -> None:
    first, second = RunLock(tmp_path / "new" / "run.lock"), RunLock(tmp_path / "new" / "run.lock")
    first.acquire({})
    with pytest.raises(RunBusyError):
        second.acquire({})
    first.release()
    first.release()  # twice is fine
    second.acquire({})
    second.release()


def test_no_holder_of_a_lock_that_is_not_there(tmp_path: Path) -> None:
    assert holder(tmp_path / "none") is None
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("content", ["", "[1]", '{"pid": 1', "\0"])
def test_a_damaged_owner_is_unknown(tmp_path: Path, content: str) -> None:
    path = tmp_path / "run.lock"
    path.write_text(content)
    assert describe(read_owner(path)) == "a process outside any job (pid ? on ?)"


def test_two_who_look_at_once_see_no_holder(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    path.touch()
    with path.open() as other:
        fcntl.flock(other, fcntl.LOCK_SH)  # as somebody does who looks just now
        assert holder(path) is None


def test_a_file_system_without_locks_does_not_stop_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(descriptor: int, kind: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("cifar_hpc.runlock.fcntl.flock", flock)
    RunLock(tmp_path / "run.lock").acquire({"job_id": "1"})
    assert holder(tmp_path / "run.lock") is None

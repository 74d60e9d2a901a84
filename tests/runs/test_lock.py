"""One writer a run, with real processes: whoever holds the lock, and however that process ends."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import PROJECT

from cifar_hpc.__main__ import main
from cifar_hpc.errors import RunBusyError, RunFailedError, SpecError
from cifar_hpc.runs.lock import RunLock, WriterLock, claim, describe, holder, holder_pid, read_owner
from cifar_hpc.runs.paths import RunPaths

HOLD = """
import sys
from pathlib import Path
from cifar_hpc.runs.lock import RunLock
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
        cwd=PROJECT,
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process  # type: ignore[misc]
        process.kill()


@pytest.mark.process
def test_a_second_holder_is_refused_and_told_who(tmp_path: Path, other: subprocess.Popen[str]) -> None:
    path = tmp_path / "run.lock"
    with pytest.raises(RunBusyError, match=r"run\.lock: .*job 17 \(pid 4242 on node1\)") as caught:
        RunLock(path).acquire({})
    assert caught.value.exit_code == 4
    assert holder(path) == read_owner(path) == {"job_id": "17", "host": "node1", "pid": 4242}


@pytest.mark.process
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


@pytest.mark.process
def test_sigkill_frees_it(tmp_path: Path, other: subprocess.Popen[str]) -> None:
    os.kill(other.pid, signal.SIGKILL)
    other.wait()
    path = tmp_path / "run.lock"
    assert holder(path) is None
    assert read_owner(path)["pid"] == 4242  # the last one, for messages only
    mine = RunLock(path)
    mine.acquire({})
    mine.release()


@pytest.mark.process
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

    monkeypatch.setattr("cifar_hpc.runs.lock.fcntl.flock", flock)
    RunLock(tmp_path / "run.lock").acquire({"job_id": "1"})
    assert holder(tmp_path / "run.lock") is None


def two_with_one_folder(tmp_path: Path) -> tuple[RunPaths, RunPaths]:
    """Runs of one name in two projects that share the folder of checkpoints."""
    (tmp_path / "scratch").mkdir()
    runs = RunPaths(tmp_path / "a", "run"), RunPaths(tmp_path / "b", "run")
    for run in runs:
        run.root.mkdir()
        (run.root / "checkpoints").symlink_to(tmp_path / "scratch")
        run.create()
    return runs


def test_a_folder_of_checkpoints_belongs_to_one_run(tmp_path: Path) -> None:
    first, second = two_with_one_folder(tmp_path)
    lock, other = WriterLock(first), WriterLock(second)
    lock.acquire({"job_id": "5"})
    with pytest.raises(RunBusyError, match=r"checkpoints/run/owner\.lock: .*by job 5"):
        other.acquire({})
    assert not other.held and not second.lock.exists()  # nothing was written
    lock.release()
    claim(second)  # the first has no spec: its submission was refused
    claim(first)
    first.spec.touch()
    for use in (lambda: claim(second), lambda: WriterLock(second).acquire({})):
        with pytest.raises(
            SpecError, match=rf"holds the checkpoints of run run in {first.root}.*HINT: use another --name"
        ):
            use()
    claim(first)
    assert holder(first.owner) is None and not second.lock.exists()
    first.root.rename(tmp_path / "moved")  # whose own path is another now, as after an automounter's change
    claim(RunPaths(tmp_path / "moved", "run"))
    shutil.rmtree(tmp_path / "moved")
    claim(second)


def test_a_folder_of_a_project_that_one_may_not_look_into_is_refused_with_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = two_with_one_folder(tmp_path)
    claim(first)
    first.spec.touch()
    before, stat = first.owner.read_bytes(), Path.stat

    def denied(path: Path, **options: bool) -> os.stat_result:
        if path.is_relative_to(first.root):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return stat(path, **options)

    monkeypatch.setattr(Path, "stat", denied)
    with pytest.raises(SpecError, match=rf"run run in {first.root}.*HINT: use another --name"):
        claim(second)
    assert (second.owner.read_bytes(), holder(second.owner)) == (before, None)


def test_a_copy_of_a_project_and_old_owners_are_no_obstacle(tmp_path: Path) -> None:
    run = RunPaths(tmp_path / "a", "run")
    run.create()
    run.spec.touch()
    claim(run)
    shutil.copytree(run.root, tmp_path / "b")
    claim(RunPaths(tmp_path / "b", "run"))
    claim(run)
    (tmp_path / "link").symlink_to(run.root)
    claim(RunPaths(tmp_path / "link", "run"))
    claim(run)
    for content in ("", "[1]", '{"root": 5, "run": "run"}', '{"root": "/x"}', '{"root": "/\\u0000", "run": "run"}'):
        run.owner.write_text(content)
        claim(run)


@pytest.mark.parametrize("replaced", [False, True])
def test_the_holder_of_a_deleted_lock_takes_it_again(tmp_path: Path, replaced: bool) -> None:
    run = RunPaths(tmp_path, "run")
    run.create()
    lock, second = WriterLock(run), WriterLock(run)
    lock.acquire({"job_id": "5"})
    assert lock.renew() == []
    run.lock.unlink()
    if replaced:
        run.lock.write_text("{}")
    with pytest.raises(RunBusyError, match="by job 5"):
        second.acquire({"job_id": "6"})
    assert holder(run.lock) is None
    assert lock.renew() == [run.lock] and lock.renew() == []
    assert holder(run.lock) == {"job_id": "5"}
    shutil.rmtree(run.checkpoints)
    assert lock.renew() == [run.owner]
    for path in (run.lock, run.owner):
        path.unlink()
    second.acquire({"job_id": "6"})
    with pytest.raises(RunFailedError, match=r"by job 6 .* was deleted or replaced, so it ends"):
        lock.renew()
    second.release()
    lock.release()
    assert holder(run.lock) is None and holder(run.owner) is None


@pytest.mark.parametrize("what", ["", "logs", "logs/run", "checkpoints/run"])
def test_the_holder_of_a_lock_that_was_moved_ends_and_makes_no_folder(tmp_path: Path, what: str) -> None:
    run = RunPaths(tmp_path / "root", "run")
    run.create()
    lock, moved = WriterLock(run), tmp_path / "the new place"
    lock.acquire({"job_id": "5"})
    (run.root / what).rename(moved)
    words = r"run was moved or renamed under this process, to .*/the new place.*goes on from the newest checkpoint"
    with pytest.raises(RunFailedError, match=words):
        lock.renew()
    assert not (run.root / what).exists()
    lock.release()


def test_a_lock_that_is_deleted_while_it_is_taken_is_taken_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, deleted = tmp_path / "run.lock", []

    def flock(descriptor: int, kind: int) -> None:
        if not deleted:
            deleted.append(path.unlink())

    monkeypatch.setattr("cifar_hpc.runs.lock.fcntl.flock", flock)
    lock = RunLock(path)
    lock.acquire({"pid": 1})
    assert deleted and os.path.samestat(os.fstat(lock.descriptor or 0), path.stat())
    lock.release()


def planted_link(path: Path) -> None:
    (path.parent / "victim").write_text("precious")
    path.symlink_to(path.parent / "victim")


def planted_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))


@pytest.mark.parametrize(
    ("plant", "what"),
    [
        (planted_link, "link"),
        (os.mkfifo, "FIFO"),
        (os.mkdir, "directory"),
        (planted_socket, "No such device"),
    ],
)
def test_only_a_regular_file_is_a_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plant: Callable[[Path], None], what: str
) -> None:
    monkeypatch.chdir(tmp_path)  # a socket's path must be short
    path = Path("run.lock")
    plant(path)
    before = path.lstat().st_mode
    for use in (lambda: RunLock(path).acquire({"pid": 1}), lambda: holder(path)):
        with pytest.raises(SpecError, match=rf"^run\.lock: .*({what}|link).*HINT: find out who put it there"):
            use()
    assert read_owner(path) == {}
    assert path.lstat().st_mode == before
    if path.is_symlink():
        assert path.read_text() == "precious"


def test_not_everybody_may_write_a_lock(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        lock = RunLock(tmp_path / "run.lock")
        lock.acquire({})
    finally:
        os.umask(before)
    lock.release()
    assert lock.path.stat().st_mode & stat.S_IWOTH == 0


def test_a_signal_goes_to_the_process_that_has_the_lock_and_to_no_other(tmp_path: Path) -> None:
    lock = RunLock(tmp_path / "run.lock")
    here = socket.gethostname()
    lock.acquire({"pid": os.getpid(), "host": here})
    assert holder_pid(lock.path) == os.getpid()
    # kill(-1) is every process of the user, kill(0) the caller's group; the last one is ours but has no lock.
    for pid in (-1, 0, 1, True, "7", None, 1.5, 2**40, os.getppid()):
        lock.path.write_text(json.dumps({"pid": pid, "host": here}))
        assert holder_pid(lock.path) is None
    lock.path.write_text(json.dumps({"pid": os.getpid(), "host": "elsewhere"}))
    assert holder_pid(lock.path) is None
    lock.path.write_text(json.dumps({"pid": os.getpid(), "host": here}))
    lock.release()
    assert holder_pid(lock.path) is None


def test_a_full_disk_does_not_stop_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pwrite(descriptor: int, content: bytes, offset: int) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("cifar_hpc.runs.lock.os.pwrite", pwrite)
    lock = RunLock(tmp_path / "run.lock")
    lock.acquire({})
    assert holder(lock.path) == {}
    lock.release()


@pytest.mark.parametrize("command", ["cancel", "requeue"])
def test_a_planted_lock_brings_no_other_process_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    monkeypatch.setenv("CIFAR_HPC_ROOT", str(tmp_path))
    monkeypatch.setattr("cifar_hpc.slurm.client.shutil.which", lambda name: None)
    with subprocess.Popen(["sleep", "600"], start_new_session=True) as victim:
        lock = RunLock(tmp_path / "logs" / "run" / "run.lock")
        lock.acquire({"pid": victim.pid, "host": socket.gethostname()})
        assert main([command, "run"]) == 2
        assert "no process here" in capsys.readouterr().err
        lock.release()
        assert victim.poll() is None
        victim.kill()

"""What a start finds in its folders: the checkpoint it goes on from, best.pt mended, and what killed processes left."""

from __future__ import annotations

import dataclasses
import fcntl
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import BLANK, PROJECT, leftovers
from made_files import save, state

from cifar_hpc.errors import RunFailedError
from cifar_hpc.files import replacing
from cifar_hpc.runs.events import Checkpoint
from cifar_hpc.runs.logs import read_jsonl
from cifar_hpc.runs.paths import RunPaths
from cifar_hpc.training.checkpoints import recovery
from cifar_hpc.training.checkpoints.format import read_checkpoint
from cifar_hpc.training.checkpoints.recovery import Choice, choose, forget_damaged, set_aside, tidy_logs
from cifar_hpc.training.checkpoints.store import newest_good
from cifar_hpc.training.context import Context
from cifar_hpc.training.process import Launch, StopFlag


@pytest.fixture
def context(tmp_path: Path) -> Context:
    paths = RunPaths(tmp_path, "run")
    paths.create()
    spec = dataclasses.replace(BLANK, train=dataclasses.replace(BLANK.train, epochs=9))
    return Context(paths, spec, Launch(), StopFlag())


def events(context: Context, *kinds: str) -> list[dict[str, Any]]:
    return [e for e in read_jsonl(context.paths.events) if e["event"] in kinds]


def chosen(context: Context) -> str:
    choice = choose(context)
    assert choice is not None
    assert choice.state is not None
    received: Choice = pickle.loads(pickle.dumps(choice))  # by another rank
    assert choice.digest == received.read().digest == choice.state.digest
    return choice.path.name


def step_of(path: Path) -> int:
    return read_checkpoint(path).step


def test_nothing_to_mend(context: Context) -> None:
    save(context.paths.checkpoints, 5, 10, 15, 20)
    before = sorted(p.name for p in context.paths.checkpoints.iterdir())
    assert chosen(context) == "step_00000020.pt"
    assert sorted(p.name for p in context.paths.checkpoints.iterdir()) == before
    assert events(context, "fallback", "mended") == []
    assert not context.paths.train_log.exists()


def test_a_bad_file_is_put_aside_with_its_reason(context: Context) -> None:
    folder = context.paths.checkpoints
    save(folder, 5, 10, 15, 18)
    (folder / "step_00000018.pt").write_bytes(b"")
    (folder / "step_15.pt").write_bytes(b"a person's copy")
    for number in range(5):
        (folder / f"step_0000000{number}.pt.damaged").write_bytes(b"of earlier starts")
    assert chosen(context) == "step_00000015.pt"
    (event,) = events(context, "fallback")
    assert (event["file"], event["moved_to"], event["reason"]) == (
        "step_00000018.pt", "step_00000018.pt.damaged", "empty",
    )  # fmt: skip
    log = context.paths.train_log.read_text()
    assert "step_00000018.pt: empty; kept as step_00000018.pt.damaged, going back to step_00000015.pt" in log
    assert "step_15.pt is not a name that a run gives" in log
    assert (folder / "step_15.pt").exists()
    assert len(list(folder.glob("*.damaged"))) == recovery.DAMAGED_KEPT
    assert (folder / "step_00000018.pt.damaged").exists()


@pytest.mark.parametrize("trouble", ["damaged", "missing", "stale", "a folder", "a FIFO", "a link to nothing"])
def test_best_is_mended_from_the_file_of_its_epoch(context: Context, trouble: str) -> None:
    """`stale` is what a kill between the step's file and best.pt leaves."""
    folder = context.paths.checkpoints
    save(folder, 5, 10, 15, 30, 35)
    best = folder / "best.pt"
    best.unlink()
    if trouble == "damaged":
        best.write_bytes((folder / "step_00000030.pt").read_bytes()[:-9])
    elif trouble == "stale":
        os.link(folder / "step_00000010.pt", best)
    elif trouble == "a folder":
        best.mkdir()
    elif trouble == "a FIFO":
        os.mkfifo(best)
    elif trouble == "a link to nothing":
        best.symlink_to("nowhere")
    assert chosen(context) == "step_00000035.pt"
    assert step_of(best) == 30
    assert best.samefile(folder / "step_00000030.pt")
    (event,) = events(context, "fallback", "mended")
    assert event["event"] == ("mended" if trouble in ("missing", "stale") else "fallback")
    assert (event["file"], event["restored_from"]) == ("best.pt", "step_00000030.pt")
    assert event["moved_to"] == (None if trouble in ("missing", "stale") else "best.pt.damaged")
    assert "made again from step_00000030.pt" in context.paths.train_log.read_text()
    assert chosen(context) == "step_00000035.pt"
    assert len(events(context, "fallback", "mended")) == 1, "mended once is enough"


def test_a_best_that_nothing_can_replace_is_said_and_put_aside(context: Context) -> None:
    folder = context.paths.checkpoints
    save(folder, 10, 30, 32, 34, 36, keep=3)
    (folder / "best.pt").write_bytes(b"x")
    assert chosen(context) == "step_00000036.pt"
    (event,) = events(context, "fallback")
    assert (event["file"], event["moved_to"], event["restored_from"]) == ("best.pt", "best.pt.damaged", None)
    assert "comes back with the next better one" in context.paths.train_log.read_text()


def test_a_best_of_an_epoch_to_come_is_left(context: Context) -> None:
    folder = context.paths.checkpoints
    save(folder, 10, 15, 30)
    (folder / "step_00000030.pt").unlink()
    assert chosen(context) == "step_00000015.pt"  # nothing is damaged, so somebody meant it
    assert step_of(folder / "best.pt") == 30
    assert events(context, "fallback", "mended") == []


def test_best_is_what_is_left(context: Context) -> None:
    folder = context.paths.checkpoints
    save(folder, 10, 30, 35)
    for step in (30, 35):
        (folder / f"step_{step:08d}.pt").unlink()
        (folder / f"step_{step:08d}.pt").write_bytes(b"x")
    assert chosen(context) == "best.pt"
    assert [e["file"] for e in events(context, "fallback")] == ["step_00000035.pt", "step_00000030.pt"]
    found = newest_good(folder)
    assert found is not None
    assert found.path.name == "step_00000030.pt", "it has its name back, so that retention and inspect find it"
    assert chosen(context) == "step_00000030.pt"


def test_a_run_that_had_checkpoints_does_not_start_over(context: Context) -> None:
    assert choose(context) is None
    context.emit(Checkpoint(file="step_00000018.pt", step=18, epoch=0, step_in_epoch=18, bytes=1))
    with pytest.raises(RunFailedError, match=r"holds no checkpoint any more, .*step_00000018\.pt.* HINT"):
        choose(context)
    assert list(context.paths.checkpoints.iterdir()) == []


def test_damaged_files_do_not_pile_up(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old").rename(tmp_path / "step_00000001.pt.damaged")
    for number in range(6):
        path = tmp_path / "step_00000001.pt"
        path.write_text(str(number))
        before = path.stat().st_ctime_ns
        while (aside := set_aside(path)).stat().st_ctime_ns == before:
            aside.rename(path)  # until the clock of the file system has moved on
        assert not path.exists()
        forget_damaged(tmp_path)
    files = [p for p in tmp_path.glob("*.damaged") if p.is_file()]
    assert sorted(p.read_text() for p in files) == ["3", "4", "5"]
    assert (tmp_path / "step_00000001.pt.damaged").is_dir(), "no folder of anybody's is removed"


# ------------------------------------------------------------------ what killed processes leave

LIVE_WRITER = """
import sys, pathlib
from cifar_hpc.files import replacing
with replacing(pathlib.Path(sys.argv[1])) as file:
    file.write(b"half")
    file.flush()
    print("writing", flush=True)
    sys.stdin.readline()
    file.write(b" and half")
"""


@pytest.fixture
def writer(context: Context) -> Iterator[subprocess.Popen[str]]:
    """Another process that is in the middle of writing spec.yaml, as submit.py is now and then."""
    process = subprocess.Popen(
        [sys.executable, "-c", LIVE_WRITER, str(context.paths.spec)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(PROJECT)},
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    yield process
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        assert pipe is not None
        pipe.close()


@pytest.mark.process
def test_a_file_that_a_living_process_writes_is_left_to_it(context: Context, writer: subprocess.Popen[str]) -> None:
    assert len(leftovers(context.paths.logs)) == 1
    choose(context)
    assert len(leftovers(context.paths.logs)) == 1
    assert writer.communicate("\n", timeout=60)[0] == ""
    assert writer.returncode == 0
    assert context.paths.spec.read_text() == "half and half"
    assert leftovers(context.paths.logs) == []


@pytest.mark.process
def test_a_file_that_a_killed_process_left_is_removed(context: Context, writer: subprocess.Popen[str]) -> None:
    writer.kill()
    writer.wait()
    assert len(leftovers(context.paths.logs)) == 1
    choose(context)
    assert leftovers(context.paths.logs) == []
    assert not context.paths.spec.exists()


def test_leftovers_everywhere(context: Context) -> None:
    paths = context.paths
    copy = paths.code / ".0a1b2c.77.tmp" / "cifar_hpc"
    copy.mkdir(parents=True)
    (copy / "x.py").touch(0o444)
    (paths.logs / ".metrics.jsonl.77.tmp").touch()
    (paths.checkpoints / ".step_00000001.pt.77.tmp").touch()
    (paths.logs / ".link.tmp").symlink_to(paths.root)
    (paths.logs / "mine.tmp").touch()
    choose(context)
    assert [p.name for p in leftovers(paths.root)] == ["mine.tmp"]


def test_a_copy_of_the_code_in_the_making_is_left(context: Context) -> None:
    copy = context.paths.code / ".0a1b2c.77.tmp"
    copy.mkdir(parents=True)
    with (context.paths.logs / "submit.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # as submit.py does while it makes one
        tidy_logs(context.paths)
        assert copy.exists()
    tidy_logs(context.paths)
    assert not copy.exists()


def test_a_writer_whose_file_was_tidied_away_before_it_locked_it_takes_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flock, removed = fcntl.flock, []

    def late(descriptor: int, operation: int) -> None:
        if not removed:
            (path,) = tmp_path.glob(".*.tmp")
            path.unlink()
            removed.append(path)
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with replacing(tmp_path / "a") as file:
        file.write(b"whole")
    assert len(removed) == 1
    assert (tmp_path / "a").read_bytes() == b"whole"


# ------------------------------------------------------------------ the other ranks


def test_a_rank_that_sees_another_file_or_none_says_so(tmp_path: Path) -> None:
    save(tmp_path, 5)
    path = tmp_path / "step_00000005.pt"
    choice = Choice(path, read_checkpoint(path).digest)
    torch.save(dataclasses.replace(state(5), epoch_seconds=7.0).to_dict(), path)  # whole, but another one
    with pytest.raises(RunFailedError, match=r"step_00000005\.pt: rank 0 has chosen it, but .* its digest is .* HINT"):
        choice.read(patience_seconds=0)
    path.write_bytes(b"x")
    with pytest.raises(RunFailedError, match=r"sees another file there: no file of torch\.save"):
        choice.read(patience_seconds=0)
    path.unlink()
    with pytest.raises(RunFailedError, match="sees another file there: there is no such file"):
        choice.read(patience_seconds=0)


def test_a_rank_whose_node_is_late_waits_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 5)
    path = tmp_path / "step_00000005.pt"
    choice = Choice(path, read_checkpoint(path).digest)
    path.rename(tmp_path / "later")

    def arrive(seconds: float) -> None:
        (tmp_path / "later").rename(path)

    monkeypatch.setattr(time, "sleep", arrive)
    assert choice.read().step == 5


def test_what_is_sent_to_the_other_ranks_is_small(context: Context) -> None:
    """The state itself stays on rank 0: it would be pickled and sent to each of them."""
    save(context.paths.checkpoints, 5)
    choice = choose(context)
    assert choice is not None
    assert len(pickle.dumps(choice)) < 1000
    assert recovery.PATIENCE_SECONDS > 60, "an NFS client may trust its cache for a minute"

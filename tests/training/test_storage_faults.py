"""Whole runs whose storage fails under them: they go on, say so, recover by themselves, and end with the same bits."""

from __future__ import annotations

import mmap
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import faulty
import nursery
import pytest
import torch
import yaml
from helpers import PROJECT, TINY, leftovers

from cifar_hpc import tensorfile
from cifar_hpc.config.io import merge
from cifar_hpc.runs import logs
from cifar_hpc.runs.logs import read_jsonl
from cifar_hpc.training.checkpoints.format import read_checkpoint
from cifar_hpc.training.checkpoints.store import candidates, newest_good

pytestmark = pytest.mark.process

# 3 steps an epoch, 12 in all; checkpoints after steps 2, 4, 6, ... and after each epoch, 3.
JOB = merge(
    TINY,
    {
        "train": {"epochs": 4, "shards": 2},
        "data": {"train_size": 96, "test_size": 50},
        "checkpoint": {"every_steps": 2, "keep": 2},
        "lookahead": {"bn_batches": 1},
    },
)
STATE = ("step", "epoch", "step_in_epoch", "updates", "model", "buffers", "slow_buffers", "optimizer", "scaler", "sums")
VOLATILE = {"epoch_seconds", "images_per_second", "restart", "time"}


@dataclass
class Run:
    """One run with a root of its own."""

    root: Path

    def __post_init__(self) -> None:
        self.root.mkdir(exist_ok=True)
        self.write({})
        self.logs, self.checkpoints = self.root / "logs" / "run", self.root / "checkpoints" / "run"

    def write(self, changed: dict[str, Any]) -> None:
        (self.root / "job.yaml").write_text(yaml.safe_dump(merge(JOB, changed)))

    def start(self, faults: faulty.Faults | None = None, out: Path | None = None) -> int:
        return faulty.start(self.root, "run", faults or {}, out)

    def events(self, *kinds: str) -> list[dict[str, Any]]:
        return [e for e in read_jsonl(self.logs / "events.jsonl") if e["event"] in kinds]

    @property
    def log(self) -> str:
        return (self.logs / "train.log").read_text()

    @property
    def output(self) -> str:
        return (self.root / "run.out").read_text()

    def result(self) -> dict[str, Any]:
        """All that must not depend on what happened to the storage."""
        found = newest_good(self.checkpoints)
        assert found is not None
        assert found.bad == []
        best = read_checkpoint(self.checkpoints / "best.pt") if (self.checkpoints / "best.pt").exists() else None
        rows = read_jsonl(self.logs / "metrics.jsonl")
        assert (self.logs / "metrics.jsonl").read_text().count("\n") == len(rows) == 4, "each epoch exactly once"
        assert found.state.rows == rows
        assert leftovers(self.root) == []
        assert len(self.events("finished")) == 1
        return {
            "file": found.path.name,
            "sums": found.state.digests(),
            "state": tensorfile.digest({k: getattr(found.state, k) for k in STATE}),
            "best": tensorfile.digest({k: getattr(best, k) for k in STATE}) if best is not None else None,
            "rows": [{k: v for k, v in row.items() if k not in VOLATILE} for row in rows],
        }


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The result of a run that nothing happens to."""
    run = Run(tmp_path_factory.mktemp("reference"))
    assert run.start() == 0, run.output
    assert run.events("checkpoint_failed", "fallback", "mended") == []
    assert "WARNING" not in run.log
    return run.result()


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / "root")


# ------------------------------------------------------------------ a full disk


def fill(disk: Path) -> None:
    """To the last byte."""
    with (disk / "ballast").open("ab", buffering=0) as file, suppress(OSError):
        for size in (1 << 20, 1 << 12, 1):
            with suppress(OSError):
                while True:
                    file.write(b"\0" * size)
    with pytest.raises(OSError, match="No space left"):
        (disk / "proof").write_bytes(b"x" * 10_000)
    (disk / "proof").unlink()


def give_pages(disk: Path) -> None:
    """Four of them, for logs: a file system hands out whole pages, of which a checkpoint takes about forty."""
    ballast = disk / "ballast"
    os.truncate(ballast, ballast.stat().st_size - 4 * mmap.PAGESIZE)


def forbid_writing() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def allow_writing() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@dataclass
class SmallDisk:
    """A root on a file system of its own that `full` fills in the process of the run; who may mount none limits the
    length of that process's files instead. Either way nothing can be written until `free`."""

    root: Path
    mounted: bool

    def full(self) -> partial[None]:
        return partial(fill, self.root) if self.mounted else partial(forbid_writing)

    def free(self) -> partial[None]:
        return partial(os.unlink, self.root / "ballast") if self.mounted else partial(allow_writing)


def mount(*arguments: object) -> bool:
    done = subprocess.run(["mount", *map(str, arguments)], capture_output=True, check=False)
    return done.returncode == 0


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    root = tmp_path / "disk"
    root.mkdir()
    mounted = os.geteuid() == 0 and mount("-t", "tmpfs", "-o", "size=32m", "tmpfs", root)
    yield SmallDisk(root, mounted)
    if mounted:
        subprocess.run(["umount", "--lazy", str(root)], check=True)


def test_a_disk_that_is_full_for_a_while(disk: SmallDisk, reference: dict[str, Any]) -> None:
    """With all there is on it: checkpoints, logs, and the process's own output. An epoch ends meanwhile."""
    run = Run(disk.root)
    assert run.start({3: disk.full(), 8: disk.free()}) == 0, run.output
    assert run.result() == reference
    failed = run.events("checkpoint_failed")
    assert failed and all("OSError" in e["reason"] for e in failed)
    assert all(f"{e['file']} could not be written: OSError" in run.log for e in failed)
    assert "training goes on, and the older checkpoints are kept" in run.log
    assert [e["epoch"] for e in run.events("evaluated")] == [1, 2, 3, 4], "no event is lost"
    assert [e["step"] for e in run.events("checkpoint")][-1] == 12


def test_a_disk_that_stays_full(disk: SmallDisk, reference: dict[str, Any]) -> None:
    """The run ends with an error that says what to do, the last good file is kept, and goes on from it later.

    On a full disk older checkpoints give the newest one room; nothing helps against a limit for the length of files.
    """
    run = Run(disk.root)
    full = {7: disk.full()}
    if disk.mounted:
        full |= {8: partial(give_pages, disk.root), 11: partial(forbid_writing)}
    assert run.start(full) == 1
    kept = [int(path.stem.removeprefix("step_")) for path in candidates(run.checkpoints)]
    assert kept[0] == 10 if disk.mounted else kept == [6, 4]
    if disk.mounted:
        disk.free()()
    assert run.start() == 0, run.output
    assert run.result() == reference
    assert run.events("resumed")[-1]["step"] == kept[0]
    assert ("no space left: 1 older checkpoint removed to make room" in run.log) is disk.mounted


def test_a_start_on_a_full_disk(disk: SmallDisk, reference: dict[str, Any]) -> None:
    """What the last start left damaged cannot be written anew for want of room: it is, as soon as there is some."""
    run = Run(disk.root)
    assert run.start({4: stop_here}) == 128 + signal.SIGTERM
    metrics = run.logs / "metrics.jsonl"
    metrics.write_text("\0" * 100 + metrics.read_text() * 2)
    assert run.start({-1: disk.full(), 8: disk.free()}) == 0, run.output
    assert run.result() == reference
    assert run.events("resumed")[0]["step"] == 5
    assert run.log.count("resumed from step_00000005.pt") == 1, "the banner is written late, but it is written"


# ------------------------------------------------------------------ folders that cannot be written, or are gone


def make_read_only(folder: Path) -> None:
    """By a read-only bind mount for root, whom permissions do not stop; else by permissions; else by a file there."""
    if os.geteuid() != 0:
        folder.chmod(0o555)
    elif not (mount("--bind", folder, folder) and mount("-o", "remount,ro,bind", folder)):
        put_a_file_there(folder)
    with pytest.raises(OSError):
        (folder / "proof").write_text("x")


def make_writable(folder: Path) -> None:
    if folder.is_file():
        take_it_away(folder)
    elif os.geteuid() != 0:
        folder.chmod(0o755)
    else:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def put_a_file_there(folder: Path) -> None:
    folder.rename(folder.with_name("away"))
    folder.write_text("a file in the folder's place")


def take_it_away(folder: Path) -> None:
    folder.unlink()
    folder.with_name("away").rename(folder)


@pytest.mark.parametrize(
    ("begin", "end"), [(make_read_only, make_writable), (put_a_file_there, take_it_away)], ids=["read-only", "a file"]
)
def test_a_folder_of_checkpoints_that_cannot_be_written(
    run: Run, reference: dict[str, Any], begin: Any, end: Any
) -> None:
    assert run.start({3: partial(begin, run.checkpoints), 8: partial(end, run.checkpoints)}) == 0, run.output
    assert run.result() == reference
    assert {e["file"] for e in run.events("checkpoint_failed")} >= {"step_00000004.pt", "step_00000006.pt"}
    assert "could not be written" in run.log


def test_a_folder_of_checkpoints_that_is_removed(run: Run, reference: dict[str, Any]) -> None:
    assert run.start({2: partial(shutil.rmtree, run.checkpoints)}) == 0, run.output
    assert run.result() == reference
    assert f"WARNING {run.checkpoints} was gone; it is made again" in run.log
    assert run.events("checkpoint_failed") == []


def test_a_folder_of_checkpoints_that_is_removed_before_a_stop(run: Run, reference: dict[str, Any]) -> None:
    """Nothing has changed since the last checkpoint, that of the step before the evaluation; but that one is gone."""
    assert run.start({"evaluate:1": partial(remove_and_stop, run.checkpoints)}) == 128 + signal.SIGTERM
    assert [path.name for path in candidates(run.checkpoints)] == ["step_00000006.pt"]
    assert run.start() == 0, run.output
    assert {**run.result(), "best": 0} == {**reference, "best": 0}, "the best epoch's was among what was removed"


def remove_and_stop(folder: Path) -> None:
    shutil.rmtree(folder)
    signal.raise_signal(signal.SIGTERM)


def test_a_folder_of_logs_that_is_removed(run: Run, reference: dict[str, Any]) -> None:
    assert run.start({7: partial(shutil.rmtree, run.logs)}) == 0, run.output
    assert run.result() == reference
    assert "train.log was gone; it is made again" in run.log
    assert [e["epoch"] for e in run.events("evaluated")] == [3, 4]


def test_a_run_whose_last_events_find_no_room_waits_until_they_are_written(run: Run, reference: dict[str, Any]) -> None:
    """Else its job would have finished, and its run be taken for one that was killed."""
    assert run.start({"evaluate:3": partial(hide_until_the_end, run.logs / "events.jsonl")}) == 0, run.output
    assert run.result() == reference
    assert "waits for room" in run.output


def hide_until_the_end(file: Path) -> None:
    """Put a folder in the place of a file, until the process waits before another try."""

    def pause(seconds: float) -> None:
        print("waits for room", flush=True)
        file.rmdir()
        file.with_name("away").rename(file)

    file.rename(file.with_name("away"))
    file.mkdir()
    logs.time = SimpleNamespace(monotonic=time.monotonic, sleep=pause)  # type: ignore[attr-defined]


def test_a_root_that_is_renamed_is_not_made_again_and_the_run_goes_on_in_its_new_place(
    run: Run, reference: dict[str, Any]
) -> None:
    new = run.root.with_name("new")
    run.write({"train": {"log_seconds": 0.001}})
    assert run.start({7: partial(run.root.rename, new)}, new.parent / "out") == 1
    assert not run.root.exists()
    words = f"{run.logs} was moved or renamed under this process, to {new}/logs/run; the process ends, since it would"
    assert (
        words.replace("/logs/run was", "/checkpoints/run was").replace("logs/run;", "checkpoints/run;")
        in (new.parent / "out").read_text()
    )
    moved = Run(new)
    assert moved.start() == 0, moved.output
    assert moved.result() == reference


@pytest.mark.parametrize("known", [True, False], ids=["at the submission", "at the start"])
def test_fewer_epochs_than_are_done_finish_no_run(run: Run, known: bool) -> None:
    """In the fourth epoch. Without its events a submission does not know how far the run is, but its start does."""
    run.write({"train": {"epochs": 40}})
    assert run.start({10: partial(os.kill, 0, signal.SIGTERM)}) == 128 + signal.SIGTERM
    if not known:
        (run.logs / "events.jsonl").unlink()
    run.write({"train": {"epochs": 3}})
    assert run.start() == 2
    words = "train.epochs: 3 is not allowed; allowed: 4 or more, since run run has done 3 epochs and 2 steps. HINT: "
    assert words in run.output and (words in run.log) == (not known)
    assert run.events("finished") == [] and [e["again"] for e in run.events("failed")] == [False] * (not known)
    run.write({"train": {"epochs": 4}})
    assert run.start() == 0 and [row["epoch"] for row in read_jsonl(run.logs / "metrics.jsonl")] == [1, 2, 3, 4]
    (finished,) = run.events("finished")
    assert (finished["epoch"], finished["step"]) == (4, 12)


# ------------------------------------------------------------------ slow storage


def test_storage_that_does_not_answer_stalls_no_step_and_no_epoch(run: Run, reference: dict[str, Any]) -> None:
    """The first checkpoint is being written until all epochs are through: a run that waited for it would never end."""
    assert run.start({0: faulty.block_writing_until_the_end}) == 0, run.output
    assert run.result() == reference
    written = [e["step"] for e in run.events("checkpoint")]
    best = read_checkpoint(run.checkpoints / "best.pt").step
    assert written == sorted({2, best, 12}), "one in hand, the best one, the last one"
    assert run.log.count("takes longer to write than the time to the next one") == 1


def test_a_stop_waits_for_its_own_checkpoint_and_leaves_out_the_ones_before(
    run: Run, reference: dict[str, Any]
) -> None:
    assert run.start({0: faulty.block_writing_until_the_end, 7: stop_here}) == 128 + signal.SIGTERM
    written = [e["step"] for e in run.events("checkpoint")]
    assert written[0] == 2
    assert written[-1] == 8
    assert len(written) <= 3
    assert "step 8 is on disk" in run.log
    assert run.start() == 0, run.output
    assert run.result() == reference


def stop_here() -> None:
    signal.raise_signal(signal.SIGTERM)


# ------------------------------------------------------------------ hostile files


class Evil:
    """What torch.load would run if it were allowed to unpickle anything."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_code_in_checkpoints_is_refused_by_name_and_never_run(run: Run, reference: dict[str, Any]) -> None:
    assert run.start({8: stop_here}) == 128 + signal.SIGTERM
    canary = run.root / "canary"
    good = [path.name for path in candidates(run.checkpoints)]
    assert good == ["step_00000009.pt", "step_00000008.pt"]
    torch.save({"format": 1, "step": 10, "model": Evil(canary)}, run.checkpoints / "step_00000010.pt")
    (run.checkpoints / "step_00000011.pt").write_bytes(pickle.dumps(Evil(canary)))
    (run.checkpoints / "best.pt").unlink()
    torch.save({"format": 1, "step": 12, "model": Evil(canary)}, run.checkpoints / "best.pt")
    assert run.start() == 0, run.output
    reasons = {e["file"]: e["reason"] for e in run.events("fallback")}
    assert reasons.keys() == {"step_00000010.pt", "step_00000011.pt", "best.pt"}
    assert reasons["step_00000010.pt"] == reasons["best.pt"]
    assert reasons["best.pt"] == "holds code (pickle globals: posix.mkdir), which was not executed"
    assert "a bare pickle" in reasons["step_00000011.pt"]
    assert not canary.exists()
    pickle.loads((run.checkpoints / "step_00000011.pt.damaged").read_bytes())
    assert canary.exists(), "the payload is a real one"
    final = run.result()
    assert {**final, "best": reference["best"]} == reference
    assert final["best"] in (reference["best"], None), "None where no later epoch was better"


def rewrite(source: Path, target: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Make `target` a whole checkpoint, sealed, of another content than `source`."""
    content = tensorfile.load(source)
    edit(content)
    torch.save(tensorfile.seal(content), target)


def test_a_run_goes_on_from_an_older_file_where_newer_ones_are_crafted(run: Run, reference: dict[str, Any]) -> None:
    """Whole files, which torch.load takes: wrong shapes, other steps, escapes, and 2 ** 60 ways through a list."""
    assert run.start({8: stop_here}) == 128 + signal.SIGTERM
    good = run.checkpoints / "step_00000009.pt"
    bomb: list[Any] = [1]
    for _ in range(60):
        bomb = [bomb, bomb]
    edits: dict[int, Callable[[dict[str, Any]], object]] = {
        10: lambda content: content["model"].update({"head.weight": torch.zeros(1)}),
        11: lambda content: content["environment"].update(device="\x1b]0;owned\x07", amp="\x1b[2J"),
        12: lambda content: content["spec"]["train"].update(seed=1),
    }
    for step, edit in edits.items():
        rewrite(good, run.checkpoints / f"step_{step:08d}.pt", edit)
    torch.save({"format": 1, "environment": bomb}, run.checkpoints / "step_00000013.pt")
    torch.save({"format": 1, "model": torch.zeros(1).expand(2**34)}, run.checkpoints / "step_00000014.pt")
    assert run.start() == 0, run.output
    assert "Traceback" not in run.output and "\x1b" not in run.output + run.log
    reasons = {e["file"]: e["reason"] for e in run.events("fallback")}
    assert list(reasons) == [f"step_{step:08d}.pt" for step in (14, 13, 12, 11, 10)]
    assert reasons["step_00000010.pt"].startswith("model.head.weight: torch.float32 [1] is not allowed")
    assert run.events("resumed")[-1]["file"] == good.name
    assert run.result() == reference


def test_a_file_of_more_steps_than_an_epoch_has_is_an_error_by_name(run: Run) -> None:
    """Only the images tell, which are loaded after the file was chosen."""
    assert run.start({2: stop_here}) == 128 + signal.SIGTERM
    good = candidates(run.checkpoints)[0]
    far = run.checkpoints / "step_00001000.pt"
    rewrite(good, far, lambda content: content.update(step=1000, step_in_epoch=1000))
    assert run.start() == 1
    assert f"{far}: step_in_epoch: 1000, epoch: 0, step: 1000 do not go with epochs of 3 steps" in run.output
    assert "Traceback" not in run.output
    far.unlink()
    assert run.start() == 0, run.output


def test_escapes_in_a_whole_file_reach_neither_the_log_nor_a_terminal(run: Run) -> None:
    assert run.start({8: stop_here}) == 128 + signal.SIGTERM
    newest = candidates(run.checkpoints)[0]
    device = "\x1b]0;owned\x07\x1b[2J\n2026-01-01 00:00:00 FINISHED\ud800"
    rewrite(newest, newest, lambda content: content["environment"].update(device=device))
    environment = os.environ | nursery.THREADS | {"CIFAR_HPC_ROOT": str(run.root)}
    for command in (
        ["inspect", "run"],
        ["evaluate", "run"],
        ["export", "run", "--out", str(run.root / "x.safetensors")],
    ):
        done = subprocess.run(
            [sys.executable, "-m", "cifar_hpc", *command], env=environment, cwd=PROJECT, capture_output=True,
            text=True, timeout=200, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "\x1b" not in done.stdout + done.stderr
    assert "\x1b" not in (run.root / "x.md").read_text()
    assert run.start() == 0, run.output
    warning = next(line for line in run.log.splitlines() if "not the environment of the checkpoint" in line)
    assert r"device: \x1b]0;owned\x07\x1b[2J 2026-01-01 00:00:00 FINISHED\ud800 -> " in warning
    assert "\x1b" not in run.log and "\x1b" not in run.output


def test_a_run_all_of_whose_checkpoints_are_bad_says_what_it_tried(run: Run) -> None:
    assert run.start({8: stop_here}) == 128 + signal.SIGTERM
    for path in [*candidates(run.checkpoints), run.checkpoints / "best.pt"]:
        path.unlink()
        torch.save({"format": Evil(run.root / "canary")}, path)
    before = sorted(path.name for path in run.checkpoints.iterdir())
    assert run.start() == 1
    for name in ("step_00000009.pt", "step_00000008.pt", "best.pt"):
        assert (
            f"{run.checkpoints / name}: holds code (pickle globals: posix.mkdir), which was not executed" in run.output
        )
    assert "Traceback" not in run.output
    assert sorted(path.name for path in run.checkpoints.iterdir()) == before, "nothing is overwritten"
    assert not (run.root / "canary").exists()
    assert run.events("started", "resumed") == run.events("started")[:1]

"""The promise, with real processes: stop a run, kill it, move it to other numbers of ranks; the bits stay the same.

Every run here is started as its users start it, one process a rank, and one under torchrun. `interrupted.py` lets a
process send itself a signal at a precise step, so that no outcome depends on timing.
"""

from __future__ import annotations

import json
import os
import signal
import time
from dataclasses import dataclass
from typing import Any

import pytest
from helpers import leftovers
from processes import LIMIT_SECONDS, Runs, stopped

from cifar_hpc import tensorfile
from cifar_hpc.__main__ import main
from cifar_hpc.runs.logs import read_jsonl
from cifar_hpc.training.checkpoints.format import read_checkpoint
from cifar_hpc.training.checkpoints.store import newest_good

VOLATILE = {"epoch_seconds", "images_per_second", "world_size", "restart", "job_id", "time"}
STATE = ("step", "epoch", "step_in_epoch", "updates", "model", "buffers", "slow_buffers", "optimizer", "scaler", "sums")


@dataclass(frozen=True)
class Result:
    """All that must not depend on how a run came to its end."""

    sums: dict[str, str]
    state: str
    best: str
    rows: list[dict[str, Any]]
    position: tuple[int, int]


def result(runs: Runs, name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Result:
    monkeypatch.setenv("CIFAR_HPC_ROOT", str(runs.root))
    capsys.readouterr()
    assert main(["inspect", name, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["verified"]
    assert report["skipped"] == []
    rows = read_jsonl(runs.root / "logs" / name / "metrics.jsonl")
    assert [row["epoch"] for row in rows] == [1, 2], "each epoch exactly once"
    assert all(row.keys() >= VOLATILE for row in rows)
    assert report["last_epoch"] == rows[-1]
    assert len(runs.events(name, "finished")) == 1
    assert leftovers(runs.root) == []
    found = newest_good(runs.root / "checkpoints" / name)
    assert found is not None
    assert found.state.rows == rows
    best = read_checkpoint(runs.root / "checkpoints" / name / "best.pt")
    return Result(
        report["sums"],
        tensorfile.digest({k: getattr(found.state, k) for k in STATE}),
        tensorfile.digest({k: getattr(best, k) for k in STATE}),
        [{k: v for k, v in row.items() if k not in VOLATILE} for row in rows],
        (report["step"], report["epoch"]),
    )


@pytest.fixture
def look(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    return lambda runs, name: result(runs, name, capsys, monkeypatch)


@pytest.fixture(scope="module")
def reference(runs: Runs) -> str:
    """A run of one process that nobody disturbs."""
    runs.finish("reference", 1)
    return "reference"


def test_stopped_and_moved_between_1_3_4_and_2_ranks(
    runs: Runs, reference: str, look: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs.stop("moved", 3, interrupt="SIGHUP@step:2/2")  # only the last rank is told, and before the first checkpoint
    runs.copy("moved", "evaluating")
    monkeypatch.setenv("LAG", "1")  # as on GPUs: a request takes effect a step later
    runs.stop("moved", 4, interrupt="SIGUSR1@step:10/1")
    assert runs.resumed("moved") == (3, 0, 3)
    runs.finish("moved", 2)
    log = runs.log("moved")
    for words in ("  |  3 ranks, 4 shards\n", "  |  4 ranks (before: 3)\n", "  |  2 ranks (before: 4)\n"):
        assert log.count(words) == 1, "a banner says what is new"
    assert log.count(", python ") == 1, "and nothing that is not"
    assert runs.resumed("moved") == (12, 1, 3)
    assert look(runs, "moved") == look(runs, reference)
    assert look(runs, reference).position == (18, 2)
    rows = read_jsonl(runs.root / "logs" / "moved" / "metrics.jsonl")
    assert [(row["world_size"], row["restart"]) for row in rows] == [(4, 1), (2, 2)]
    kinds = [e["event"] for e in runs.events("moved", "started", "resumed", "signal", "finished")]
    assert kinds == ["started", "signal", "resumed", "signal", "resumed", "finished"]


def test_a_suspended_job_goes_on(runs: Runs, reference: str, look: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its ranks are suspended before they agree on a step, and resumed one long after the other."""
    monkeypatch.setenv("IMPATIENT", "1")
    started = runs.begin("suspended", 2, interrupt="SIGSTOP@agree:11")
    end = time.monotonic() + LIMIT_SECONDS
    while not all(stopped(process.pid) for process in started):
        assert time.monotonic() < end and not any(process.poll() for process in started), runs.output("suspended")
        time.sleep(0.02)
    for process in started:
        time.sleep(2)
        os.kill(process.pid, signal.SIGCONT)
    assert runs.wait(started) == [0, 0], runs.output("suspended")
    assert look(runs, "suspended") == look(runs, reference)
    assert runs.events("suspended", "failed", "hang", "requeued", "resumed") == []


def test_stopped_while_evaluating_then_killed(runs: Runs, reference: str, look: Any) -> None:
    # Goes on from step 3 of the test above.
    runs.stop("evaluating", 1, interrupt="SIGXCPU@evaluate:0")
    runs.kill("evaluating", 2, interrupt="SIGKILL@step:13")
    assert runs.resumed("evaluating") == (9, 0, 9)  # trained, not evaluated: the row is still to come
    runs.finish("evaluating", 1)
    assert runs.resumed("evaluating")[0] == 12
    assert look(runs, "evaluating") == look(runs, reference)


def test_killed_after_an_epoch_that_no_checkpoint_holds(runs: Runs, reference: str, look: Any) -> None:
    """The row that was written beyond the checkpoint is cut off and computed again; a damaged file is passed over."""
    runs.copy(reference, "damaged")
    folder = runs.root / "checkpoints" / "damaged"
    for path in (folder / "step_00000018.pt", folder / "step_00000016.pt"):
        path.unlink()  # not truncated in place: best.pt may be a hard link to it
        path.write_bytes(b"PK\3\4 half a file")
    (folder / "best.pt").unlink()  # of whichever epoch
    (folder / ".step_00000018.pt.1.tmp").write_bytes(b"half")
    (runs.root / "logs" / "damaged" / "events.jsonl").unlink()
    runs.finish("damaged", 2)
    assert runs.resumed("damaged") == (12, 1, 3)
    assert runs.events("damaged", "resumed")[0]["metrics_cut"] == 1
    assert [e["file"] for e in runs.events("damaged", "fallback")] == ["step_00000018.pt", "step_00000016.pt"]
    assert (folder / "step_00000018.pt.damaged").exists()
    assert look(runs, "damaged") == look(runs, reference)


def test_a_finished_run_is_over_until_it_is_given_more_epochs(runs: Runs, reference: str, look: Any) -> None:
    runs.copy(reference, "over")
    events = runs.root / "logs" / "over" / "events.jsonl"
    before = events.read_text()
    for world in (1, 2):
        runs.finish("over", world)
    assert events.read_text() == before and look(runs, "over") == look(runs, reference)
    log = (runs.root / "logs" / "over" / "train.log").read_text()
    assert log.count("the run has finished before: nothing to do") == 2 and log.count(" FINISHED ") == 1
    runs.finish("over", 1, "train.epochs=3")
    assert runs.resumed("over")[:2] == (18, 2)
    assert [event["epoch"] for event in runs.events("over", "finished")] == [2, 3]


def test_a_finished_run_whose_last_checkpoint_is_damaged_computes_it_again(
    runs: Runs, reference: str, look: Any
) -> None:
    runs.copy(reference, "lost-its-end")
    folder = runs.root / "checkpoints" / "lost-its-end"
    for path in (folder / "step_00000018.pt", folder / "best.pt"):
        path.unlink()
        path.write_bytes(b"PK\3\4 half a file")
    runs.finish("lost-its-end", 1)
    assert runs.resumed("lost-its-end") == (16, 1, 7)
    assert len(runs.events("lost-its-end", "finished")) == 2


def test_short_epochs_that_saved_nothing_are_computed_again_after_a_kill(
    runs: Runs, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under auto most of these epochs are too short to be saved; rank 0 alone decides which, and others follow."""
    monkeypatch.setenv("CIFAR_HPC_ROOT", str(runs.root))
    auto = ("checkpoint.every_steps=null", "train.epochs=5")
    runs.finish("short", 1, *auto, "checkpoint.every_epochs=1")
    runs.kill("short-killed", 3, *auto, interrupt="SIGKILL@step:38")
    runs.stop("short-killed", 2, *auto, interrupt="SIGTERM@step:39/1")
    step, epoch, _ = runs.resumed("short-killed")
    assert step in (9, 18, 27, 36) and epoch == step // 9, "at an epoch's end; the slower this machine, the later"
    assert runs.events("short-killed", "resumed")[-1]["metrics_cut"] == 4 - epoch
    runs.finish("short-killed", 1, *auto)
    found = []
    for name in ("short", "short-killed"):
        capsys.readouterr()
        assert main(["inspect", name, "--json"]) == 0
        rows = read_jsonl(runs.root / "logs" / name / "metrics.jsonl")
        best = read_checkpoint(runs.root / "checkpoints" / name / "best.pt")
        assert [row["epoch"] for row in rows] == [1, 2, 3, 4, 5]
        found.append(
            (
                json.loads(capsys.readouterr().out)["sums"],
                [{key: value for key, value in row.items() if key not in VOLATILE} for row in rows],
                tensorfile.digest({key: getattr(best, key) for key in STATE}),
            )
        )
    assert found[0] == found[1]


def test_bf16_under_torchrun_and_killed(runs: Runs, look: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_DISTRIBUTED_DEBUG", "DETAIL")  # with which DDP itself crashes
    bf16 = "train.amp=bf16"
    runs.finish("bf16", 1, bf16)
    runs.stop("bf16-moved", 2, bf16, interrupt="SIGTERM@step:6/1", torchrun=True)
    runs.kill("bf16-moved", 3, bf16, interrupt="SIGKILL@step:15")
    assert runs.resumed("bf16-moved") == (7, 0, 7)
    runs.finish("bf16-moved", 1, bf16)
    assert look(runs, "bf16-moved") == look(runs, "bf16")


def test_fp16_keeps_the_history_of_its_scale(runs: Runs, look: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first gradients overflow, since GradScaler begins very high: those steps update nothing."""
    monkeypatch.setenv("INITIAL_SCALE", str(2.0**26))
    fp16 = "train.amp=fp16"
    runs.finish("fp16", 1, fp16)
    runs.stop("fp16-moved", 2, fp16, interrupt="SIGTERM@step:6/1")
    runs.finish("fp16-moved", 1, fp16)
    assert look(runs, "fp16-moved") == look(runs, "fp16")
    found = newest_good(runs.root / "checkpoints" / "fp16")
    assert found is not None
    assert (found.state.step, found.state.optimizer["counter"]) == (18, found.state.updates)
    assert 5 < found.state.updates < 18, "no step was skipped, so this test shows nothing"


def test_another_spec_and_a_second_writer_are_refused(runs: Runs, reference: str) -> None:
    assert runs.start(reference, 1, "train.seed=7") == [2]
    assert "train.seed: 0 -> 7" in runs.output(reference)
    assert runs.start(reference, 1, "data.train_size=100", "train.batch_size=8") == [2]
    assert runs.events(reference, "failed") == []

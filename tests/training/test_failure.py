"""What is said and done when ranks raise, die, stop or run out of memory: once, at once, and the run goes on."""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import tiny_spec
from processes import Runs

from cifar_hpc.errors import RanksLostError, RunBusyError, RunFailedError, SpecError
from cifar_hpc.runs.logs import read_jsonl
from cifar_hpc.runs.paths import RunPaths
from cifar_hpc.runs.requeue import decide_retry
from cifar_hpc.training.checkpoints.store import newest_good
from cifar_hpc.training.context import Context
from cifar_hpc.training.distributed.rank_board import Report
from cifar_hpc.training.failure import LastWords, report_of
from cifar_hpc.training.process import Launch
from cifar_hpc.training.signals import StopFlag

TRACEBACK = "Traceback (most recent call last)"


def report(step: int, again: bool = True) -> Report:
    return Report(1, "node1", "error", "ValueError: x", "a traceback", step, again)


def failed(step: int, event: str = "failed") -> list[dict[str, Any]]:
    return [{"event": event, "step": step}, {"event": "requeued", "reason": "failure"}]


@pytest.mark.parametrize(
    ("events", "step", "again", "delay", "words"),
    [
        ([], 0, True, 120, "failure 1 of at most 3"),
        (failed(10), 11, True, 240, "failure 2 of at most 3"),
        ([*failed(10), *failed(20, "hang")], 21, True, 480, "failure 3 of at most 3"),
        ([*failed(10), *failed(20), *failed(30)], 40, False, 0, "failures.max (3) is used up"),
        (failed(10), 10, False, 0, "failed at step 10 before and got no further this time (step 10)"),
        (failed(10), 7, False, 0, "failed at step 10 before and got no further this time (step 7)"),
        (failed(0), 0, False, 0, "failed at step 0 before"),
        (failed(20, "hang"), 20, False, 0, "failed at step 20 before"),
        ([{"event": "requeued", "reason": "preemption"}] * 9, 5, True, 120, "failure 1 of at most 3"),
    ],
)
def test_another_try_only_after_progress_and_after_a_growing_delay(
    events: list[dict[str, Any]], step: int, again: bool, delay: int, words: str
) -> None:
    retry = decide_retry(events, step, 3, may_requeue=True)
    assert (retry.again, retry.delay_seconds) == (again, delay)
    assert words in retry.explanation


def test_no_other_try_where_it_would_not_help_or_is_not_allowed() -> None:
    assert "would happen again" in decide_retry([], 5, 3, True, again=False).explanation
    assert "submit the same again" in decide_retry([], 5, 3, False).explanation
    assert not decide_retry([], 5, 0, True).again
    assert decide_retry([row for n in range(1, 9) for row in failed(n)], 9, 99, True).delay_seconds == 3600


@pytest.fixture
def context(tmp_path: Path) -> Context:
    return Context(RunPaths(tmp_path, "run"), tiny_spec(), Launch(rank=2, world_size=4), StopFlag())


@pytest.mark.parametrize(
    ("error", "cause", "again", "status"),
    [
        (ValueError("x"), "error", True, 1),
        (RunFailedError("the loss was NaN"), "error", False, 1),
        (SpecError("data.root: ..."), "error", False, 2),
        (RanksLostError("ranks 3 did not come up"), "lost", True, 1),
        (RunBusyError("busy"), "error", False, 4),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), "out_of_memory", True, 1),
        (MemoryError(), "out_of_memory", True, 1),
        (RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer"), "lost", True, 1),
        (dist.DistNetworkError("Connection reset by peer"), "lost", True, 1),
        (ConnectionResetError("Connection reset by peer"), "error", True, 1),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_what_an_error_means(context: Context, error: Exception, cause: str, again: bool, status: int) -> None:
    found = report_of(error, context)
    assert (found.cause, found.again, found.status, found.rank) == (cause, again, status, 2)
    assert ("HINT: lower train.batch_size" in found.text) == (cause == "out_of_memory")


class NobodyReads(io.StringIO):
    """A pipe without a reader."""

    def write(self, text: str) -> int:
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


def test_a_standard_error_that_nobody_reads_any_more_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where srun, which passes it on, has gone with its node."""
    paths = RunPaths(tmp_path, "run")
    paths.create()
    monkeypatch.setattr(sys, "stderr", NobodyReads())
    status = LastWords(Context(paths, tiny_spec(), Launch(), StopFlag())).of(ValueError("a fault"))
    assert status == 1
    assert [event["event"] for event in read_jsonl(paths.events)] == ["failed"]
    assert paths.train_log.read_text().rstrip().endswith("ValueError: a fault")


# ------------------------------------------------------------------------------------------------- real processes


def last_start(runs: Runs) -> tuple[dict[str, Any], str]:
    """The last start's only event of an end, and what train.log says after that start's banner."""
    events = runs.events("run", "started", "resumed", "failed", "hang", "signal", "finished")
    assert events[-2]["event"] in ("started", "resumed"), events
    return events[-1], runs.log("run").rpartition("=" * 100)[2]


def test_every_way_to_lose_a_rank_is_told_once_and_the_weights_stay_the_same(runs: Runs) -> None:
    runs.finish("reference", 1)
    start: dict[str, Any] = {"name": "run", "world": 3}

    assert runs.start(**start, interrupt="RAISE@step:2/1") == [1, 1, 1]
    event, log = last_start(runs)
    assert (event["event"], event["cause"], event["rank"], event["step"]) == ("failed", "error", 1, 2)
    assert log.count(TRACEBACK) == 1
    assert log.rstrip().endswith("ValueError: a fault in the middle of a step")
    assert "FAILED on rank 1 (" in log

    assert runs.start(**start, interrupt="OOM@step:3/2") == [1, 1, 1]
    event, log = last_start(runs)
    assert (event["event"], event["cause"], event["rank"]) == ("failed", "out_of_memory", 2)
    assert "OUT OF MEMORY on rank 2 (" in log
    assert "HINT: lower train.batch_size" in log

    # Rank 0 serves the store and holds the lock: the others have to speak for it.
    for rank in (0, 2):
        statuses = runs.start(**start, interrupt=f"SIGKILL@step:{6 + rank}/{rank}")
        assert sorted(statuses) == [-signal.SIGKILL, 1, 1]
        event, log = last_start(runs)
        assert (event["event"], event["cause"]) == ("failed", "lost")
        assert f"no word from rank {rank}" in log
        assert event["error"].startswith(f"no word from rank {rank}")
        assert TRACEBACK not in log
        assert log.count(" FAILED on rank ") == 1

    patience = "train.watchdog_minutes=0.3"
    statuses = runs.start("run", 3, patience, interrupt="SIGSTOP@step:10/1")
    assert sorted(statuses) == [-signal.SIGKILL, 1, 1]
    event, log = last_start(runs)
    assert (event["event"], event["cause"], event["step"]) == ("hang", "hang", 10)
    assert "stopped or without a network: rank 1 (" in log
    assert log.count("---- stacks of rank") == 2
    assert "trainer.py" in log.partition("---- end of stacks")[0]
    assert log.rstrip().rpartition("\n")[2].startswith(tuple("0123456789"))
    assert "HUNG on rank 0" in log.rstrip().rpartition("\n")[2]

    runs.finish("run", 2)
    found = [newest_good(runs.root / "checkpoints" / name) for name in ("reference", "run")]
    assert found[0].state.digests() == found[1].state.digests()
    assert [row["epoch"] for row in read_jsonl(runs.root / "logs" / "run" / "metrics.jsonl")] == [1, 2]
    assert list((runs.root / "logs" / "run" / "slurm" / "rendezvous").iterdir()) == []

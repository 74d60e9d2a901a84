"""Ranks that raise, die, stop or run out of memory: one report, at once, and the run goes on."""

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

from cifar_hpc.errors import RanksLostError, RunBusyError, RunFailedError, SchedulerError, SpecError
from cifar_hpc.runs import requeue
from cifar_hpc.runs.logs import append_line, read_jsonl
from cifar_hpc.runs.paths import RunPaths
from cifar_hpc.training import exit as exit_module
from cifar_hpc.training.checkpoints.store import newest_good
from cifar_hpc.training.context import Context
from cifar_hpc.training.distributed.watchdog import Report
from cifar_hpc.training.exit import FailureReporter, report_of
from cifar_hpc.training.process import Launch, StopFlag

TRACEBACK = "Traceback (most recent call last)"


NCCL_WHERE = "NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:77, {}, NCCL version 2.27.5\n"
NCCL = {
    "usage": NCCL_WHERE.format("invalid usage (run with NCCL_DEBUG=WARN for details)")
    + "ncclInvalidUsage: This usually reflects invalid usage of NCCL library.\nLast error:\n"
    "Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 1b000",
    "argument": NCCL_WHERE.format("invalid argument")
    + "ncclInvalidArgument: Invalid value for an argument.\nLast error:\nNCCL_NET_PLUGIN: no such thing",
    "remote": NCCL_WHERE.format("remote process exited or there was a network error")
    + "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely.\n"
    "Last error:\nNET/IB: Got completion from peer 10.0.0.7<4791> with status=12",
    "peer": NCCL_WHERE.format("unhandled system error")
    + "ncclSystemError: System call (e.g. socket, malloc) or external library call failed or device error.\n"
    "Last error:\nsocketProgress: Connection closed by remote peer node2<40411>",
    "system": NCCL_WHERE.format("unhandled system error")
    + "ncclSystemError: System call (e.g. socket, malloc) or external library call failed or device error.\n"
    "Last error:\nError while creating shared memory segment /dev/shm/nccl-Xy (size 9637888): No space left on device",
    "internal": NCCL_WHERE.format("internal error")
    + "ncclInternalError: Internal check failed.\nLast error:\nAttribute busid of node nic not found",
    "cuda": NCCL_WHERE.format("unhandled cuda error")
    + "ncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\n"
    "Cuda failure 802 'system not yet initialized'",
    "memory": NCCL_WHERE.format("unhandled cuda error")
    + "ncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\nCuda failure 2 'out of memory'",
}
NOT_DETERMINISTIC = "does not have a deterministic implementation"
GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/{}"


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
        (RuntimeError(GLOO.format("pair.cc:547] Connection closed by peer [10.0.0.7]:41001")), "lost", True, 1),
        (RuntimeError(GLOO.format("unbound_buffer.cc:81] Timed out waiting 1800000ms for recv")), "lost", True, 1),
        (RuntimeError(f"Gloo connectFullMesh failed with {GLOO.format('pair.cc:144] no error')}"), "lost", True, 1),
        (RuntimeError(GLOO.format("device.cc:84] ifa != nullptr. Unable to find address for: eth9")), "error", True, 1),
        (RuntimeError("CUDA error: the launch timed out and was terminated"), "error", True, 1),
        (RuntimeError(f"adaptive_avg_pool2d_backward_cuda {NOT_DETERMINISTIC}, but you set ..."), "error", False, 1),
        (dist.DistStoreError("wait timeout after 1000ms, keys: /group/0"), "lost", True, 1),
        (dist.DistBackendError(NCCL["usage"]), "error", False, 1),
        (dist.DistBackendError(NCCL["argument"]), "error", False, 1),
        (dist.DistBackendError(NCCL["remote"]), "lost", True, 1),
        (dist.DistBackendError(NCCL["peer"]), "lost", True, 1),
        (dist.DistBackendError(NCCL["system"]), "error", True, 1),
        (dist.DistBackendError(NCCL["internal"]), "error", True, 1),
        (dist.DistBackendError(NCCL["cuda"]), "error", True, 1),
        (dist.DistBackendError(NCCL["memory"]), "out_of_memory", True, 1),
        (dist.DistNetworkError("Connection reset by peer"), "lost", True, 1),
        (ConnectionResetError("Connection reset by peer"), "error", True, 1),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_report_of(context: Context, error: Exception, cause: str, again: bool, status: int) -> None:
    found = report_of(error, context)
    assert (found.cause, found.retryable, found.status, found.rank) == (cause, again, status, 2)
    assert ("HINT: lower train.batch_size" in found.text) == (cause == "out_of_memory")
    assert str(error) in found.text, "what it says is kept whole"
    assert ("train.deterministic: false" in found.text) == (NOT_DETERMINISTIC in str(error))
    if "NCCL" in str(error):
        assert found.summary.startswith("DistBackendError: nccl") and found.summary.endswith(str(error)[-30:])


# ------------------------------------------------------------------------------------------------- in this process


class Reporting:
    """A run under Slurm that fails in this process, with its requests to Slurm."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.paths = RunPaths(folder, "run")
        self.requests: list[tuple[Any, ...]] = []
        self.job = {"JobState": "RUNNING"}
        self.paths.create()
        monkeypatch.setattr(requeue, "job_fields", lambda job_id: self.job)
        monkeypatch.setattr(requeue, "requeue_job", lambda *given: self.requests.append(("requeue", *given)))
        monkeypatch.setattr(exit_module, "end_step", lambda *given: self.requests.append(("end step", *given)))
        for name, seconds in (("RANK_0_SECONDS", 0.2), ("LAST_WORDS_SECONDS", 0.2)):
            monkeypatch.setattr(exit_module, name, seconds)

    def told(self) -> str:
        """What the run's notify.command was told."""
        file = self.paths.root / "told"
        return file.read_text() if file.exists() else ""

    def reporter(self, rank: int = 0, store: dist.Store | None = None, **launch: Any) -> FailureReporter:
        """A rank's, after it has met the others through `store`."""
        world_size = 1 if store is None else 2
        flag = StopFlag()
        launch = {"scheduler": "slurm", "job_id": "7"} | launch
        notify = {"command": f'echo "$CIFAR_HPC_STATE: $CIFAR_HPC_REASON" >> {self.paths.root}/told'}
        context = Context(self.paths, tiny_spec(notify=notify), Launch(rank, world_size, **launch), flag)
        reporter = FailureReporter(context)
        reporter.meet(store)
        return reporter

    def events(self) -> list[dict[str, Any]]:
        return read_jsonl(self.paths.events)

    def names(self) -> list[str]:
        return [event["event"] for event in self.events()]

    def log(self) -> str:
        return self.paths.train_log.read_text()


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Reporting:
    return Reporting(tmp_path, monkeypatch)


def test_report_requeues_a_failure_that_may_pass(run: Reporting) -> None:
    reporter = run.reporter()
    reporter.context.heart.beat("step 5", 5)
    assert reporter.report(ValueError("a fault")) == 0
    failed, requeued = run.events()
    assert (failed["event"], failed["cause"], failed["step"], failed["again"]) == ("failed", "error", 5, True)
    assert (requeued["event"], requeued["reason"], requeued["delay_seconds"]) == ("requeued", "failure", 120)
    assert run.requests == [("requeue", "7", 120, None, "")]
    assert "requeueing after failure 1 of at most 3" in run.log() and run.told() == ""
    assert run.log().rstrip().endswith("ValueError: a fault")


def test_a_run_whose_requeue_is_refused_has_failed_for_good(run: Reporting, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*given: Any) -> None:
        raise SchedulerError("Access denied")

    monkeypatch.setattr(requeue, "requeue_job", refuse)
    assert run.reporter().report(ValueError("a fault")) == 1
    assert run.names() == ["failed", "requeued", "requeue_failed"] and "WARNING Access denied" in run.log()
    assert run.told() == "failed: ValueError: a fault\n"


def test_report_does_not_retry_a_failure_that_would_come_again(run: Reporting) -> None:
    assert run.reporter().report(SpecError("data.root: no such folder")) == 2
    (failed,) = run.events()
    assert (failed["event"], failed["again"], run.requests) == ("failed", False, [])
    assert run.told() == f"failed: {failed['error'].removeprefix('SpecError: ')}\n" and "SpecError" not in run.told()
    assert "not requeued: the same would happen again" in run.log()


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: uncorrectable ECC error encountered"),
        RuntimeError("No CUDA GPUs: CUDA error: no CUDA-capable device is detected"),
        OSError(28, "No space left on device", "/tmp/torchinductor"),
        RunFailedError("train.device: auto asks for GPUs: PyTorch 2.12 finds no usable GPU (CUDA_VISIBLE_DEVICES=0)"),
    ],
)
def test_a_fault_of_the_node_is_retried_elsewhere_whatever_the_progress(
    run: Reporting, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setenv("SLURMD_NODENAME", "n1")
    monkeypatch.setattr(requeue, "_nodes_but", lambda node, job_id, fewest: f"{node},n9")
    assert [run.reporter().report(error) for _ in range(2)] == [0, 0]
    assert [row["bad_node"] for row in run.events() if row["event"] == "failed"] == ["n1", "n1"]
    assert [request[1:] for request in run.requests] == [("7", 120, None, "n1,n9"), ("7", 240, None, "n1,n9")]
    assert "without node n1, which looks broken" in run.log()


def test_a_failure_for_good_after_a_preemption_gives_up_the_right_to_come_back(
    run: Reporting, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(requeue, "forbid_requeue", asked.append)
    run.reporter().report(SpecError("data.root: no such folder"))
    assert asked == []  # a person may requeue it by hand
    append_line(run.paths.events, '{"event": "requeued", "reason": "preemption"}')
    run.reporter().report(SpecError("data.root: no such folder"))
    assert asked == ["7"]


def test_report_does_not_retry_a_failure_without_progress(run: Reporting) -> None:
    assert [run.reporter().report(ValueError("a fault")) for _ in range(2)] == [0, 1]
    assert run.names() == ["failed", "requeued", "failed"]
    assert "got no further this time" in run.log()


def test_a_refused_requeue_is_recorded(run: Reporting, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*given: Any) -> None:
        raise SchedulerError("refused by Slurm")

    monkeypatch.setattr(requeue, "requeue_job", refuse)
    assert run.reporter().report(ValueError("a fault")) == 1
    assert run.names() == ["failed", "requeued", "requeue_failed"]
    assert "WARNING refused by Slurm" in run.log()


def test_a_job_that_is_being_ended_is_no_failure_where_ranks_are_lost(run: Reporting) -> None:
    run.job = {"JobState": "COMPLETING"}
    assert run.reporter().report(RanksLostError("rank 1 is gone")) == 1
    assert (run.names(), run.requests) == ([], [])
    assert "JobState=COMPLETING: the job is being ended" in run.log()


def test_a_lost_rank_while_this_one_is_to_stop_is_a_stop(run: Reporting) -> None:
    reporter = run.reporter()
    reporter.context.stop.raise_flag()
    assert reporter.report(RanksLostError("rank 1 is gone")) == 0
    assert run.names() == ["signal", "requeued"]


@pytest.mark.parametrize(("limit", "names"), [(3, ["requeued"]), (0, [])])
def test_a_run_that_another_process_holds_is_requeued_and_its_log_is_left_alone(
    run: Reporting, limit: int, names: list[str]
) -> None:
    reporter = run.reporter()
    reporter.context.spec = tiny_spec(failures={"max": limit})
    assert reporter.report(RunBusyError("held by node9")) == RunBusyError.exit_code
    assert run.names() == names and run.requests == [("requeue", "7", 240, None, "")] * len(names)
    assert all(event["explanation"] == "held by node9" for event in run.events())
    assert not run.paths.train_log.exists()


def test_the_first_failure_counts_and_one_rank_reports_it(run: Reporting) -> None:
    store = dist.HashStore()
    first, second = run.reporter(0, store), run.reporter(1, store)
    assert second.board.publish(report_of(ValueError("the cause"), second.context)).rank == 1
    assert first.report(RuntimeError("[gloo/transport] Connection closed by peer")) == 0
    failed, _ = run.events()
    assert (failed["rank"], failed["error"]) == (1, "ValueError: the cause")
    assert second.report(ValueError("the cause")) == 1
    assert run.names() == ["failed", "requeued"], "it has been reported"


def test_another_rank_reports_where_rank_0_is_gone(run: Reporting) -> None:
    store = dist.HashStore()
    run.reporter(0, store).board.post(host="node1", pid=42, doing="step 3")
    assert run.reporter(1, store).report(dist.DistNetworkError("Connection reset by peer")) == 0
    failed, requeued = run.events()
    assert (failed["cause"], failed["rank"], requeued["event"]) == ("lost", 1, "requeued")
    assert failed["error"].startswith("no word from rank 0") and failed["error"] in run.log()


def test_an_error_of_every_rank_is_reported_by_the_first(run: Reporting) -> None:
    store, error = dist.HashStore(), SpecError("data.root: no such folder")
    error.everywhere = True
    first, second = run.reporter(0, store), run.reporter(1, store)
    assert second.report(error) == 2 and run.names() == []
    assert first.report(error) == 2 and run.names() == ["failed"] and run.told().count("failed") == 1


def test_a_hang_leaves_stacks_and_ends_the_step_if_it_is_not_retried(run: Reporting) -> None:
    hang = Report(0, "node1", "hang", "no progress", "no progress: step 5", 0, retryable=True)
    assert run.reporter()._report(hang) == 0
    assert run.reporter()._report(hang) == 1
    assert [request[0] for request in run.requests] == ["requeue", "end step"]
    assert run.names() == ["hang", "requeued", "hang"] and run.told() == "failed: no progress\n"
    assert "---- stacks of rank 0" in run.log()
    assert "HUNG on rank 0 (node1): no progress: step 5" in run.log().splitlines()[-1]


class NobodyReads(io.StringIO):
    """A pipe without a reader."""

    def write(self, text: str) -> int:
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


def test_report_needs_no_reader_of_standard_error(run: Reporting, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where srun, which passes it on, has gone with its node."""
    monkeypatch.setattr(sys, "stderr", NobodyReads())
    assert run.reporter(scheduler=None).report(ValueError("a fault")) == 1
    assert run.names() == ["failed"]
    assert run.log().rstrip().endswith("ValueError: a fault")


# ------------------------------------------------------------------------------------------------- real processes


def last_start(runs: Runs) -> tuple[dict[str, Any], str]:
    """The last start's only event of an end, and what train.log says after that start's banner."""
    events = runs.events("run", "started", "resumed", "failed", "hang", "signal", "finished")
    assert events[-2]["event"] in ("started", "resumed"), events
    return events[-1], runs.log("run").rpartition("=" * 80)[2]


def test_every_way_to_lose_a_rank_is_reported_once_and_the_weights_stay_the_same(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
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
        monkeypatch.setenv("LAG", str(rank // 2))  # 1 as on GPUs
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

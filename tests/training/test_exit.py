"""The effect of each decision at the end of an attempt: requeue, leave, hold."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers import tiny_spec

from cifar_hpc.errors import SchedulerError
from cifar_hpc.runs import requeue
from cifar_hpc.runs.history import History
from cifar_hpc.runs.logs import read_jsonl
from cifar_hpc.runs.paths import RunPaths
from cifar_hpc.runs.requeue import ASK_AGAIN_SECONDS, PATIENCE_SECONDS, Decision, Ending
from cifar_hpc.training import exit as module
from cifar_hpc.training.context import Context
from cifar_hpc.training.exit import HOLD_SECONDS, LOCAL_REQUEUE_STATUS, decide_now, finished, restart, stopped
from cifar_hpc.training.process import Launch, StopFlag
from cifar_hpc.training.trainer import Position

RUNNING = {"JobState": "RUNNING", "Restarts": "0"}
Answer = dict[str, str] | None  # None: Slurm does not answer


class Slurm:
    """A scontrol that gives a list of answers, the last one for ever, and a clock that only `sleep` moves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.answers: list[Answer] = [RUNNING]
        self.refusals, self.words = 0, "scontrol requeue was refused"  # of the next requests
        self.requests: list[tuple[Any, ...]] = []
        self.now = 0.0
        monkeypatch.setattr(requeue, "job_fields", self._job_fields)
        monkeypatch.setattr(module, "allow_fewer_nodes", lambda *given: self.requests.append(("fewer nodes", *given)))
        monkeypatch.setattr(module, "forbid_requeue", lambda job_id: self.requests.append(("no requeue", job_id)))
        monkeypatch.setattr(requeue, "requeue_job", self._requeue_job)
        monkeypatch.setattr(time, "monotonic", lambda: self.now)
        monkeypatch.setattr(time, "sleep", self._sleep)
        monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)

    def _job_fields(self, job_id: str) -> dict[str, str]:
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if answer is None:
            raise SchedulerError("scontrol did not answer")
        return answer

    def _requeue_job(self, *given: Any) -> None:
        self.requests.append(("requeue", *given))
        if self.refusals > 0:
            self.refusals -= 1
            raise SchedulerError(self.words)

    def _sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def slurm(monkeypatch: pytest.MonkeyPatch) -> Slurm:
    return Slurm(monkeypatch)


@pytest.fixture
def stop(tmp_path: Path) -> Callable[..., tuple[Context, int]]:
    """Stop a run at step 7 by a signal; returns its context and the exit status."""

    def run(
        scheduler: str | None, number: signal.Signals = signal.SIGUSR2, timeouts: Any = None, **launch: Any
    ) -> tuple[Context, int]:
        spec = tiny_spec(resources={"nodes": "1-2", "tasks_per_node": 2}, timeouts=timeouts or {})
        flag = StopFlag()
        context = Context(RunPaths(tmp_path, "run"), spec, Launch(scheduler=scheduler, job_id="7", **launch), flag)
        context.paths.create()
        flag.raise_flag(number)
        return context, stopped(context, Position(step=7, epoch=1), stored=True)

    return run


def events(context: Context) -> list[tuple[str, Any]]:
    return [(row["event"], row.get("reason")) for row in read_jsonl(context.paths.events)]


def test_requeue_asks_slurm_with_the_fewest_tasks_and_exits_with_0(slurm: Slurm, stop: Callable[..., Any]) -> None:
    context, status = stop("slurm")
    assert (status, slurm.requests) == (0, [("requeue", "7", 0, 2, "")])
    assert events(context) == [("signal", None), ("requeued", "signal")]
    assert "STOPPED by SIGUSR2: step 7 is on disk after 0.0 s\n" in context.paths.train_log.read_text()


def test_leave_exits_with_1_and_allows_fewer_nodes(slurm: Slurm, stop: Callable[..., Any]) -> None:
    slurm.answers = [{"JobState": "COMPLETING", "Restarts": "1"}]
    context, status = stop("slurm", signal.SIGTERM)
    assert (status, slurm.requests) == (1, [("fewer nodes", "7", 2)])
    assert events(context) == [("signal", None), ("left", "requeued")]


def test_hold_asks_again_until_slurm_answers_and_says_so_once(slurm: Slurm, stop: Callable[..., Any]) -> None:
    slurm.answers = [None, None, None, RUNNING]
    context, status = stop("slurm")
    assert (status, slurm.now) == (0, 3 * ASK_AGAIN_SECONDS)
    assert events(context) == [("signal", None), ("holding", "unknown"), ("requeued", "signal")]
    assert context.paths.train_log.read_text().count("WARNING scontrol did not answer") == 1


def test_hold_after_a_refused_requeue(slurm: Slurm, stop: Callable[..., Any]) -> None:
    slurm.refusals = 5
    context, status = stop("slurm")
    assert (status, slurm.now) == (0, 5 * ASK_AGAIN_SECONDS)
    assert events(context) == [("signal", None), ("requeued", "signal"), ("holding", "signal")]
    assert History.read(context.paths.events).requeues == {"signal": 1}


def test_the_last_timeout_is_not_used_up_by_its_own_request(slurm: Slurm, stop: Callable[..., Any]) -> None:
    slurm.answers, slurm.refusals = [near_its_limit()], 2
    context, status = stop("slurm", timeouts={"max": 1})
    assert (status, slurm.now) == (0, 2 * ASK_AGAIN_SECONDS)
    assert events(context)[1:] == [("requeued", "timeout"), ("holding", "timeout")]


def near_its_limit(**fields: str) -> dict[str, str]:
    return RUNNING | {"EndTime": str(int(time.time()) + 60)} | fields


def test_a_requeue_that_is_not_permitted_is_asked_for_once(slurm: Slurm, stop: Callable[..., Any]) -> None:
    slurm.answers, slurm.refusals, slurm.words = [near_its_limit()], 9, "scontrol requeue is not permitted here."
    context, status = stop("slurm")
    assert (status, slurm.now) == (1, 0.0)
    refused = ("requeue_failed", slurm.words)
    assert events(context) == [("signal", None), ("requeued", "timeout"), refused, ("left", "timeout")]
    assert (
        "timeout; not requeued: scontrol requeue is not permitted here. Submit" in context.paths.train_log.read_text()
    )
    history = History.read(context.paths.events)
    assert (history.requeues_since_submission["timeout"], history.state["event"]) == (0, "left")


@pytest.mark.parametrize("again", [0, 1])  # whether Slurm requeues a preempted job itself
def test_a_preempted_job_that_may_not_requeue_itself_waits_for_slurm(
    slurm: Slurm, stop: Callable[..., Any], again: int
) -> None:
    now = int(time.time())
    preempted = RUNNING | {"PreemptTime": str(now - 1), "StartTime": str(now - 60), "EndTime": str(now + 30)}
    ended = preempted | {"JobState": "COMPLETING", "Restarts": str(again)}
    slurm.answers, slurm.refusals, slurm.words = [preempted, preempted, preempted, ended], 9, "Access/permission denied"
    context, status = stop("slurm", signal.SIGTERM)
    assert (status, slurm.now) == (1, 2 * ASK_AGAIN_SECONDS)
    assert [name for name, _ in events(context)] == ["signal", "requeued", "requeue_failed", "holding", "left"]
    assert events(context)[-1] == ("left", "requeued" if again else "ended")


def test_hold_ends_after_a_while(slurm: Slurm, stop: Callable[..., Any]) -> None:
    slurm.answers = [None]
    context, status = stop("slurm")
    assert (status, slurm.requests) == (1, [("fewer nodes", "7", 2)])
    assert HOLD_SECONDS < slurm.now <= HOLD_SECONDS + 2 * ASK_AGAIN_SECONDS
    assert events(context) == [("signal", None), ("holding", "unknown")]


@pytest.mark.parametrize("scheduler", ["slurm", "local"])
def test_ranks_other_than_the_first_exit_with_0_and_request_nothing(
    slurm: Slurm, stop: Callable[..., Any], scheduler: str
) -> None:
    context, status = stop(scheduler, rank=1, world_size=2)
    assert (status, slurm.requests, events(context)) == (0, [], [])


@pytest.mark.parametrize(
    ("scheduler", "number", "status", "last"),
    [
        ("local", signal.SIGUSR2, LOCAL_REQUEUE_STATUS, ("requeued", "signal")),
        ("local", signal.SIGTERM, 128 + signal.SIGTERM, ("left", "stopped")),
        (None, signal.SIGUSR1, 128 + signal.SIGUSR1, ("left", "stopped")),
    ],
)
def test_without_slurm_the_exit_status_requeues_or_names_the_signal(
    slurm: Slurm, stop: Callable[..., Any], scheduler: str | None, number: signal.Signals, status: int, last: Any
) -> None:
    context, found = stop(scheduler, number)
    assert (found, events(context), slurm.requests) == (status, [("signal", None), last], [])


def test_who_cancels_a_local_run_that_waits_for_its_next_start_ends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = Context(RunPaths(tmp_path, "run"), tiny_spec(), Launch(scheduler="local", job_id="7"), StopFlag())
    context.paths.create()
    again = Decision("requeue", "failure", "requeueing", delay_seconds=3600)
    monkeypatch.setattr(time, "sleep", lambda seconds: context.stop.raise_flag(signal.SIGTERM))
    assert restart(context, again) == 128 + signal.SIGTERM
    assert events(context) == [("requeued", "failure"), ("left", "stopped")]
    assert restart(context, replace(again, delay_seconds=0)) == 128 + signal.SIGTERM
    context.stop = StopFlag()
    assert restart(context, replace(again, delay_seconds=0)) == LOCAL_REQUEUE_STATUS


def test_stopped_says_where_the_state_is(tmp_path: Path, slurm: Slurm) -> None:
    context = Context(RunPaths(tmp_path, "run"), tiny_spec(), Launch(), StopFlag())
    assert stopped(context, None, stored=True) == stopped(context, Position(step=3), stored=False) == 128 + 15
    log = context.paths.train_log.read_text()
    assert "STOPPED by another rank's signal: nothing was computed yet" in log
    assert "STOPPED by another rank's signal: step 3 is NOT on disk\n" in log
    assert "WARNING the next start goes on from an older checkpoint\n" in log
    assert max(map(len, log.splitlines())) <= 80


def test_finished(tmp_path: Path) -> None:
    notify = {"command": f'echo "$CIFAR_HPC_STATE: $CIFAR_HPC_REASON" >> {tmp_path}/told'}
    context = Context(RunPaths(tmp_path, "run"), tiny_spec(notify=notify), Launch(), StopFlag())
    best = {"epoch": 1, "test_accuracy": 60.0}
    finished(context, Position(epoch=2, step=18, history=[best, {"epoch": 2, "test_accuracy": 50.0}], best=best))
    (event,) = read_jsonl(context.paths.events)
    assert (event["event"], event["step"], event["test_accuracy"], event["best"]) == ("finished", 18, 50.0, best)
    words = "2 epochs: test 50.00% (best 60.00% at epoch 1)"
    assert f"FINISHED {words}\n" in context.paths.train_log.read_text()
    finished(context, None)  # a later start finds nothing to do, and tells of nothing
    assert (tmp_path / "told").read_text() == f"finished: {words}\n"


def test_a_finished_run_lets_its_job_end_for_good(tmp_path: Path, slurm: Slurm) -> None:
    row = {"epoch": 2, "test_accuracy": 60.0}
    for number, (launch, position) in enumerate(
        [
            (Launch(scheduler="slurm", job_id="7_1"), Position(epoch=2, step=18, history=[row], best=row)),
            (Launch(scheduler="slurm", job_id="7_1"), None),  # an earlier attempt has finished the run
            (Launch(scheduler="slurm", job_id="7_1", rank=1, world_size=2), None),
            (Launch(scheduler="local", job_id="7"), None),
        ]
    ):
        context = Context(RunPaths(tmp_path, str(number)), tiny_spec(), launch, StopFlag())
        finished(context, position)
        assert slurm.requests == ([("no requeue", "7_1")] if number < 2 else [])
        assert [name for name, _ in events(context)] == ([] if position is None else ["finished"])
        slurm.requests.clear()
    assert "the run has finished before: nothing to do" in RunPaths(tmp_path, "1").train_log.read_text()


def test_timeouts_used_up_end_the_job_for_good(
    slurm: Slurm, stop: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    leave = requeue.Decision("leave", "timeout", "timeout; timeouts.max is used up: submit again to go on")
    monkeypatch.setattr(module, "decide_now", lambda *_, **__: leave)
    _, status = stop("slurm")
    assert (status, slurm.requests) == (1, [("no requeue", "7"), ("fewer nodes", "7", 2)])


def test_without_a_controller_no_other_process_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "siblings", lambda: pytest.fail("asked for the children of a foreign parent"))
    module._end_other_ranks()


@pytest.mark.parametrize(("silent", "action"), [(3, "requeue"), (1000, "fail")])
def test_a_failure_waits_for_a_controller_that_is_away(slurm: Slurm, tmp_path: Path, silent: int, action: str) -> None:
    slurm.answers = [None] * silent + [RUNNING]
    context = Context(RunPaths(tmp_path, "run"), tiny_spec(), Launch(scheduler="slurm", job_id="7"), StopFlag())
    context.paths.create()
    assert decide_now(context, Ending("killed", step=1)).action == action
    assert slurm.now == (3 * ASK_AGAIN_SECONDS if silent == 3 else PATIENCE_SECONDS)
    assert context.paths.train_log.read_text().count("scontrol did not answer") == 1

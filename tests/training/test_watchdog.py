"""The watchdog and the board, over a real store: hangs, failures elsewhere, ranks and stores that are gone."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import nursery
import pytest
import torch.distributed as dist

from cifar_hpc.training.distributed import watchdog
from cifar_hpc.training.distributed.watchdog import Heartbeat, RankBoard, Report, Watchdog, stacks

LIMIT = 60.0  # seconds; only bounds how long a failing test takes
MINUTE = timedelta(minutes=1)


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "TICK_SECONDS", 0.02)


@pytest.fixture
def store() -> dist.TCPStore:
    return dist.TCPStore("127.0.0.1", 0, 2, True, MINUTE, wait_for_workers=False)


def serve(port: int) -> None:
    store = dist.TCPStore("127.0.0.1", port, 2, True, MINUTE, wait_for_workers=False)
    time.sleep(600)
    del store


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[nursery.Process, dist.TCPStore]]:
    """A store whose server is another process, as rank 0 is."""
    port = nursery.free_port()
    (process,) = nursery.start([nursery.Start(serve, (port,), os.environ, tmp_path / "server.out")])
    try:
        yield process, dist.TCPStore("127.0.0.1", port, 2, False, MINUTE, wait_for_workers=False)
    finally:
        process.kill()
        process.wait()


class Watched:
    """A watchdog whose verdict is kept, and that is stopped at the end of a test."""

    def __init__(self, place: RankBoard, limit_seconds: float, heart: Heartbeat | None = None) -> None:
        self.heart = heart or Heartbeat()
        self.reported = threading.Event()
        self.reports: list[Report] = []
        self.dog = Watchdog(place, self.heart, limit_seconds, self._end).start()

    def _end(self, report: Report) -> None:
        self.reports.append(report)
        self.reported.set()
        self.dog.stop()

    def verdict(self) -> Report:
        assert self.reported.wait(LIMIT), "the watchdog has noticed nothing"
        return self.reports[0]


@pytest.fixture
def watch() -> Iterator[Callable[..., Watched]]:
    made: list[Watched] = []

    def start(*arguments: Any) -> Watched:
        made.append(Watched(*arguments))
        return made[-1]

    yield start
    for watched in made:
        watched.dog.stop()


def report(rank: int, cause: str = "error") -> Report:
    return Report(rank, "node1", cause, "ValueError: x", "a traceback", 7, retryable=True)


@pytest.mark.parametrize("closed", [False, True])
def test_watchdog_reports_a_hang_of_one_process(
    watch: Callable[..., Watched], monkeypatch: pytest.MonkeyPatch, closed: bool
) -> None:
    if closed:
        monkeypatch.setattr(sys, "stderr", None)  # as after 2>&-
    heart = Heartbeat()
    heart.beat("step 49", 49)
    verdict = watch(RankBoard(None, 0, 1), 0.2, heart).verdict()
    assert (verdict.cause, verdict.step, verdict.retryable) == ("hang", 49, True)
    assert "train.watchdog_minutes" in verdict.text
    assert "rank 0 (" in verdict.text and "last at: step 49" in verdict.text


def test_progress_of_any_rank_restarts_the_time_limit(store: dist.TCPStore) -> None:
    hearts = [Heartbeat(), Heartbeat()]
    dogs = [Watchdog(RankBoard(store, rank, 2), hearts[rank], 0.2, lambda report: None) for rank in range(2)]
    for step in range(8):
        hearts[0].beat(f"decoding image {step}")  # rank 1 waits for rank 0, and does nothing itself
        for dog in (dogs[1], dogs[0], dogs[1]):
            dog.exchange()
        for _ in range(dogs[0].limit):
            assert dogs[0].tick() is None and dogs[1].tick() is None
    assert dogs[0].tick() is not None
    # Rank 0 is the one to speak; the others wait a little longer for it.
    assert dogs[1].tick() is None
    assert any(dogs[1].tick() for _ in range(20))


def test_rank_0_names_the_rank_that_posts_no_status_any_more(
    watch: Callable[..., Watched], store: dist.TCPStore
) -> None:
    RankBoard(store, 1, 2).post(host="node9", space="-", pid=1, count=3, doing="step 3", step=3)
    verdict = watch(RankBoard(store, 0, 2), 0.4).verdict()
    assert verdict.cause == "hang"
    assert "stopped or without a network: rank 1 (node9, pid 1, last at: step 3)" in verdict.text


def test_rank_0_reports_a_process_that_is_gone(watch: Callable[..., Watched], store: dist.TCPStore) -> None:
    process = subprocess.Popen(["true"])
    process.wait()
    here = str(Path("/proc/self/ns/pid").readlink())
    RankBoard(store, 1, 2).post(host=socket.gethostname(), space=here, pid=process.pid, count=1, doing="step 1", step=1)
    verdict = watch(RankBoard(store, 0, 2), 600).verdict()
    assert verdict.cause == "lost"
    assert f"pid {process.pid}" in verdict.text


def test_the_first_failure_ends_a_rank_that_is_stuck(watch: Callable[..., Watched], store: dist.TCPStore) -> None:
    first, second = RankBoard(store, 0, 2), RankBoard(store, 1, 2)
    watched = watch(first, 600)
    assert second.publish(report(1)) == report(1)
    assert first.publish(report(0)) == report(1), "the first failure stays the first"
    assert watched.verdict() == report(1)


@pytest.mark.parametrize(
    ("host", "lost"), [("localhost", False), (socket.gethostname(), False), ("node9.invalid", True)]
)
def test_a_silent_rank_is_lost_only_if_its_host_does_not_answer(
    store: dist.TCPStore, monkeypatch: pytest.MonkeyPatch, host: str, lost: bool
) -> None:
    """It may be suspended longer than the others."""
    monkeypatch.setattr(watchdog, "SILENT_TICKS", 10)
    RankBoard(store, 1, 2).post(host=host, space="another", pid=1, count=3, doing="step 3", step=3)
    dog, reports = Watchdog(RankBoard(store, 0, 2), Heartbeat(), 600, lambda report: None), []
    dog.exchange()
    for _ in range(25):
        dog.exchange()
        reports.append(dog.tick())
    assert [r.cause for r in reports if r] == ["lost"] * 2 * lost
    assert all("rank 1 (node9.invalid" in r.text for r in reports if r)


def watched(out: str, stuck: bool) -> None:
    """A process without progress and with a limit of 3 seconds; `stuck` in a call that holds the interpreter's lock."""
    watchdog.TICK_SECONDS = 0.05
    watchdog.LAST_RESORT_SECONDS = -5  # so that the alarm comes after a second

    def end(report: Report) -> None:
        Path(out).write_text(report.text)
        os._exit(7)

    Watchdog(RankBoard(None, 0, 1), Heartbeat(), 3.0, end).start()
    if stuck:
        time.sleep(0.5)
        mutex = ctypes.create_string_buffer(64)
        for _ in range(2):
            ctypes.PyDLL(None).pthread_mutex_lock(mutex)
    time.sleep(LIMIT)


@pytest.mark.process
def test_a_suspension_is_no_hang_and_hangs_are_found(tmp_path: Path) -> None:
    """Neither a suspension longer than all limits, nor an alarm that is overdue after it, ends a process; a hang does,
    even one that lets no thread of Python run."""
    outs = [tmp_path / name for name in ("suspended", "stuck")]
    began = time.monotonic()
    suspended, stuck = nursery.start(
        [nursery.Start(watched, (str(out), out.name == "stuck"), os.environ, out) for out in outs]
    )
    os.kill(suspended.pid, signal.SIGSTOP)
    time.sleep(4)
    assert suspended.poll() is None
    os.kill(suspended.pid, signal.SIGCONT)
    assert suspended.wait(LIMIT) == 7
    assert time.monotonic() - began > 4 + 2.5, "the suspension was counted"
    assert "no rank has made any progress" in outs[0].read_text()
    assert stuck.wait(LIMIT) == -signal.SIGALRM


@pytest.mark.process
def test_watchdog_reports_a_rank_0_that_was_killed(watch: Callable[..., Watched], server: Any) -> None:
    process, client = server
    watched = watch(RankBoard(client, 1, 2), 600)
    process.kill()
    process.wait()
    verdict = watched.verdict()
    assert verdict.cause == "lost" and "rank 0 is gone" in verdict.text


@pytest.mark.process
def test_watchdog_and_bounded_do_not_wait_for_a_rank_0_that_is_stopped(
    watch: Callable[..., Watched], server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    process, client = server
    monkeypatch.setattr(watchdog, "ANSWER_SECONDS", 0.2)
    place = RankBoard(client, 1, 2)
    watched = watch(place, 0.2)
    os.kill(process.pid, signal.SIGSTOP)
    verdict = watched.verdict()
    assert verdict.cause == "hang" and "rank 0 does not answer" in verdict.text
    assert place.bounded(lambda: place.publish(verdict)) is None and place.silent


def test_bounded_gives_the_answer() -> None:
    assert RankBoard(None, 0, 1).bounded(lambda: 42) == 42


def test_a_board_without_a_store_serves_one_process() -> None:
    board = RankBoard(None, 0, 1)
    board.post(pid=7)
    assert board.statuses() == {0: {"pid": 7}}
    assert board.get("key") is None
    assert board.set_once("key", "first") == board.set_once("key", "second") == board.wait("key") == "first"
    assert board.failure() is None
    assert board.publish(report(0)) == board.publish(report(0, "lost")) == board.failure() == report(0)


def test_stacks_show_every_thread() -> None:
    release = threading.Event()

    def waits_for_release() -> None:
        release.wait()

    thread = threading.Thread(target=waits_for_release)
    thread.start()
    try:
        text = stacks()
    finally:
        release.set()
        thread.join()
    assert "waits_for_release" in text
    assert "test_stacks_show_every_thread" in text

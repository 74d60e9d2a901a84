"""Status of all ranks in a shared store: progress of each, first failure, agreements that a collective cannot carry."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")
# The server of the store lives in rank 0; after this long without an answer it counts as gone.
ANSWER_SECONDS = 5.0
_FAILURE = "failure"


@dataclass(frozen=True)
class Report:
    """The reason why a rank cannot go on.

    cause: "error", "out_of_memory", "hang" or "lost" (contact with another rank).
    text: for the log; a traceback if there is one.
    retryable: whether another try may help.
    """

    rank: int
    host: str
    cause: str
    summary: str
    text: str
    step: int
    retryable: bool
    status: int = 1


class RankBoard:
    """Keys that the ranks of one attempt share. Every method may be called from any thread.

    Args:
        store: the store through which the ranks have met; None for a single process.
    """

    def __init__(self, store: dist.Store | None, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size
        # A connection of its own: one that waits for a key, as the set-up of a process group does, is blocked.
        self._store = dist.PrefixStore("board", dist.HashStore() if store is None else store.clone())
        self.silent = False  # whether the store, and so rank 0, has stopped answering

    def set(self, key: str, value: str = "") -> None:
        """Set a key."""
        self._store.set(key, value)

    def get(self, key: str) -> str | None:
        """The value of a key; None if it is not set."""
        return self.wait(key) if self._store.check([key]) else None

    def wait(self, key: str) -> str:
        """The value of a key, once it is set."""
        return str(self._store.get(key), "utf-8")

    def set_once(self, key: str, value: str) -> str:
        """Set a key unless another rank already has; returns its value."""
        return str(self._store.compare_set(key, "", value), "utf-8")

    def post(self, **status: Any) -> None:
        """Publish this rank's status."""
        self.set(f"rank/{self.rank}", json.dumps(status))

    def statuses(self) -> dict[int, dict[str, Any]]:
        """The status of each rank that has posted one."""
        texts = {rank: self.get(f"rank/{rank}") for rank in range(self.world_size)}
        return {rank: json.loads(text) for rank, text in texts.items() if text is not None}

    def failure(self) -> Report | None:
        """The report of the rank that failed first, if any has."""
        text = self.get(_FAILURE)
        return Report(**json.loads(text)) if text else None

    def publish(self, report: Report) -> Report:
        """Make `report` the first failure unless there is one already; returns the first."""
        return Report(**json.loads(self.set_once(_FAILURE, json.dumps(asdict(report)))))

    def bounded(self, question: Callable[[], T]) -> T | None:
        """The answer to a question to this board; None from the first time on that it takes ANSWER_SECONDS.

        The store itself would wait without end for a rank 0 whose process is stopped.
        """
        if self.silent:
            return None
        answer: Future[T] = Future()

        def ask() -> None:
            try:
                answer.set_result(question())
            except dist.DistError as error:  # a broken connection
                answer.set_exception(error)

        threading.Thread(target=ask, name="question", daemon=True).start()
        try:
            return answer.result(ANSWER_SECONDS)
        except (TimeoutError, dist.DistError):
            self.silent = True
            return None


def describe(statuses: Mapping[int, Mapping[str, Any]], ranks: Iterable[int]) -> str:
    """`rank 2 (node1, pid 4242, last at: step 17)`, for each of `ranks`."""
    return ", ".join(
        f"rank {rank} ({status['host']}, pid {status['pid']}, last at: {status['doing']})"
        if (status := statuses.get(rank))
        else f"rank {rank}"
        for rank in ranks
    )

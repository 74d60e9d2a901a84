"""What the ranks of one start tell each other beside the collectives: that they live, how far they are, who failed."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")
# How long a question to the store may take before its server, which lives in rank 0, counts as gone.
ANSWER_SECONDS = 5.0
_FAILURE = "failure"


class NoAnswerError(Exception):
    """The store, and so rank 0 that serves it, does not answer."""


@dataclass(frozen=True)
class Report:
    """Why a rank cannot go on.

    cause: "error", "out_of_memory", "hang" or "lost" (contact with another rank).
    text: for the log; a traceback where there is one.
    again: whether trying again may help.
    """

    rank: int
    host: str
    cause: str
    summary: str
    text: str
    step: int
    again: bool
    status: int = 1


class Board:
    """A few keys in the store through which the ranks have met. Every method may be called from any thread.

    Args:
        store: None for a run of one process, which has nobody to tell.
    """

    def __init__(self, store: dist.Store | None, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size
        # A connection of its own: one that waits for a key, as the set-up of a process group does, serves nobody else.
        self._store = dist.PrefixStore("board", store.clone()) if store is not None else None
        self._mine: dict[str, Any] = {}

    def show(self, **mine: Any) -> None:
        """Let the others see this about this rank."""
        self._mine = mine
        if self._store is not None:
            self._store.set(f"rank/{self.rank}", json.dumps(mine))

    def look(self) -> dict[int, dict[str, Any]]:
        """What each rank has shown; a rank that has shown nothing yet is missing."""
        if self._store is None:
            return {self.rank: self._mine}
        keys = [f"rank/{rank}" for rank in range(self.world_size)]
        present = [(rank, key) for rank, key in enumerate(keys) if self._store.check([key])]
        values = self._store.multi_get([key for _, key in present])
        return {rank: json.loads(value) for (rank, _), value in zip(present, values, strict=True)}

    def tell(self, key: str, value: str) -> None:
        """Set a key that all may `ask` for."""
        if self._store is not None:
            self._store.set(key, value)

    def ask(self, key: str) -> str | None:
        """The value of a key, or None where it is not set."""
        if self._store is None or not self._store.check([key]):
            return None
        return str(self._store.get(key), "utf-8")

    def wait_for(self, key: str) -> str:
        """The value of a key that another rank sets about now."""
        assert self._store is not None
        return str(self._store.get(key), "utf-8")

    def failure(self) -> Report | None:
        """The report of the rank that failed first, if any has."""
        text = self.ask(_FAILURE)
        return Report(**json.loads(text)) if text else None

    def publish(self, report: Report) -> Report:
        """Make `report` the first failure, unless there is one already; returns the first."""
        return Report(**json.loads(self.settle(_FAILURE, json.dumps(asdict(report)))))

    def settle(self, key: str, value: str) -> str:
        """Give a key its value for good, unless another rank already has; returns what it is."""
        if self._store is None:
            return value
        return str(self._store.compare_set(key, "", value), "utf-8")


def bounded(question: Callable[[], T]) -> T:
    """The answer to a question to the store, which waits without end where its process is stopped.

    Raises:
        NoAnswerError: after ANSWER_SECONDS, or where the connection is broken.
    """
    box: list[T] = []

    def ask() -> None:
        with contextlib.suppress(dist.DistError):
            box.append(question())

    thread = threading.Thread(target=ask, name="question", daemon=True)
    thread.start()
    thread.join(ANSWER_SECONDS)
    if not box:
        raise NoAnswerError
    return box[0]


def describe(shown: Mapping[int, Mapping[str, Any]], ranks: Iterable[int]) -> str:
    """`rank 2 (node1, pid 4242, last at: step 17)`, for each of `ranks`."""
    return ", ".join(
        f"rank {rank} ({mine['host']}, pid {mine['pid']}, last at: {mine['doing']})"
        if (mine := shown.get(rank))
        else f"rank {rank}"
        for rank in ranks
    )

"""Agreement of all ranks on what to do after the same step, without a device sync in the hot loop."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from enum import IntEnum
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from cifar_hpc.errors import Interrupted, RanksLostError, UserError

T = TypeVar("T")


class Request(IntEnum):
    """A rank's request to all ranks after a step. All act on the largest one."""

    GO_ON = 0
    CHECK = 1  # the loss for NaN
    SAVE = 2  # a checkpoint, which includes the check
    STOP = 3


class Agreement:
    """One all-reduce(MAX) of an integer per step, over gloo on the CPU whatever the gradients travel on.

    With `lag` 1 a step posts its request and reads the result of the step before, which has arrived meanwhile: no
    waiting, and one more step until a request takes effect. With `lag` 0 (steps so long that the round trip does not
    matter) it waits for its own result. In both cases all ranks read the same result after the same step.
    """

    def __init__(self, world_size: int, lag: int) -> None:
        self.world_size, self.lag = world_size, lag
        self._group: Any = dist.new_group(backend="gloo") if world_size > 1 else None
        self._pending: deque[tuple[Tensor, dist.Work]] = deque()

    def from_rank_0(self, work: Callable[[], T]) -> T:
        """Run `work` on rank 0 and return its result on every rank.

        Raises:
            UserError, Interrupted: on every rank, if `work` raises one.
            RanksLostError: on the others, if it raises anything else, for which rank 0 has the traceback.
        """
        if self._group is None:
            return work()
        result, error = _run(work) if dist.get_rank() == 0 else (None, None)
        return self._broadcast(result, error)  # type: ignore[no-any-return]

    def rank_0_first(self, work: Callable[[], T]) -> T:
        """Run `work` on rank 0, then on the other ranks; each gets its own result.

        Raises:
            Exception: what `work` raises; what it raises on rank 0 ends every rank, as in `from_rank_0`.
        """
        if self._group is None:
            return work()
        if dist.get_rank() != 0:
            self._broadcast(None, None)
            return work()
        result, error = _run(work)
        self._broadcast(None, error)
        return result  # type: ignore[return-value]

    def after_step(self, request: Request) -> Request:
        """Return the request that all ranks act on after this step."""
        return self._agree(request, under_way=self.lag)

    def now(self, request: Request) -> Request:
        """Return the largest request of all ranks, including those still under way. Waits for all ranks."""
        return self._agree(request, under_way=0)

    def _agree(self, request: Request, under_way: int) -> Request:
        if self._group is None:
            return request
        value = torch.tensor([int(request)])
        work = dist.all_reduce(value, dist.ReduceOp.MAX, group=self._group, async_op=True)
        assert work is not None
        self._pending.append((value, work))
        agreed = Request.GO_ON
        while len(self._pending) > under_way:
            value, work = self._pending.popleft()
            work.wait()
            agreed = max(agreed, Request(int(value)))
        return agreed

    def _broadcast(self, result: Any, error: Exception | None) -> Any:
        sent = error
        if error is not None and not isinstance(error, (UserError, Interrupted)):  # which may not be possible to send
            sent = RanksLostError(f"rank 0 failed: {type(error).__name__}: {error}")
        box = [result, sent]
        dist.broadcast_object_list(box, 0, group=self._group)
        result, received = box
        if error is not sent and error is not None:
            raise error
        if isinstance(received, UserError):
            received.everywhere = True
        if isinstance(received, Exception):
            raise received
        return result


def _run(work: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return work(), None
    except Exception as error:
        return None, error

"""How ranks agree to stop or to save after the same step, without a device sync in the hot loop."""

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


class Wish(IntEnum):
    """What a rank asks of all; the largest wish of any rank is what all do."""

    GO_ON = 0
    SAVE = 1
    STOP = 2


class Agreement:
    """One all-reduce(MAX) of an integer a step, over gloo on the CPU whatever the gradients travel on.

    With `lag` 1 a step posts its wish and reads the answer to the step before, which has arrived meanwhile: no
    waiting, and one more step until a wish is heeded. With `lag` 0 (steps so long that the round trip is nothing)
    it waits for the answer. Either way all ranks read the same answer after the same step.
    """

    def __init__(self, world_size: int, lag: int) -> None:
        self.world_size, self.lag = world_size, lag
        self._group: Any = dist.new_group(backend="gloo") if world_size > 1 else None
        self._pending: deque[tuple[Tensor, dist.Work]] = deque()

    def from_rank_0(self, work: Callable[[], T]) -> T:
        """What `work` returns on rank 0, on every rank.

        Raises:
            UserError, Interrupted: on every rank, where `work` raises one.
            RanksLostError: on the others, where it raises anything else, for which rank 0 has the traceback.
        """
        if self._group is None:
            return work()
        box: list[Any] = [None, None]
        original: Exception | None = None
        if dist.get_rank() == 0:
            try:
                box[0] = work()
            except (UserError, Interrupted) as error:
                box[1] = error
            except Exception as error:  # any other may not be one that can be sent
                original, box[1] = error, RanksLostError(f"rank 0 failed: {type(error).__name__}: {error}")
        dist.broadcast_object_list(box, 0, group=self._group)
        if original is not None:
            raise original
        if isinstance(box[1], UserError):
            box[1].everywhere = True
        if box[1] is not None:
            raise box[1]
        return box[0]  # type: ignore[no-any-return]

    def after_step(self, wish: Wish) -> Wish:
        """The wish that all ranks heed after this step."""
        if self._group is None:
            return wish
        self._post(wish)
        return self._read() if len(self._pending) > self.lag else Wish.GO_ON

    def now(self, wish: Wish) -> Wish:
        """The largest wish of all ranks, wishes still under way included."""
        if self._group is None:
            return wish
        self._post(wish)
        answer = Wish.GO_ON
        while self._pending:
            answer = max(answer, self._read())
        return answer

    def _post(self, wish: Wish) -> None:
        value = torch.tensor([int(wish)])
        work = dist.all_reduce(value, dist.ReduceOp.MAX, group=self._group, async_op=True)
        assert work is not None
        self._pending.append((value, work))

    def _read(self) -> Wish:
        value, work = self._pending.popleft()
        work.wait()
        return Wish(int(value))

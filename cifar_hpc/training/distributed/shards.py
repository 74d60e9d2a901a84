"""Logical shards: a global batch is cut into a fixed number of parts, whose gradients are added in a fixed order."""

# No postponed annotations here: DDP reads those of the hook and wants the classes themselves.

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from cifar_hpc.errors import RunFailedError
from cifar_hpc.text import counted


@dataclass(frozen=True)
class ShardLayout:
    """Assignment of shards to ranks: consecutive ones, as even as possible, shard 0 always on rank 0."""

    shards: int
    world_size: int
    rank: int

    def __post_init__(self) -> None:
        if self.world_size > self.shards:
            raise RunFailedError(
                f"{self.world_size} ranks are more than the run's {counted(self.shards, 'shard')}, fixed at its "
                f"first start. HINT: start at most {counted(self.shards, 'rank')}, or begin a run with --set "
                f"train.shards={self.world_size} (or more) under another --name."
            )

    def of_rank(self, rank: int) -> range:
        """Return the shards of `rank`."""
        return range(rank * self.shards // self.world_size, (rank + 1) * self.shards // self.world_size)

    @property
    def mine(self) -> range:
        """The shards of this rank."""
        return self.of_rank(self.rank)

    def chunk(self, rank: int, size: int) -> slice:
        """Return the part of rows of `size` elements that `rank` adds up."""
        return slice(rank * size // self.world_size, (rank + 1) * size // self.world_size)

    def bounds(self, shard: int, size: int) -> slice:
        """Return the rows of `shard` in a global batch of `size` images."""
        return slice(shard * size // self.shards, (shard + 1) * size // self.shards)


class ShardSum:
    """A sum of rows over all ranks, in shard order, in progress.

    Each rank adds up one chunk of all shards' rows and sends the sum to the others: with one shard a rank, the traffic
    of a ring all-reduce. Several sums may be in progress at once, as long as all ranks begin and `add` them in the same
    order. Rows are sent from where they are in memory, and the sum replaces the last one: nothing is copied.

    Args:
        rows: [n] each, this rank's shards; contiguous. All of them are overwritten.
        received: at least `room(n, layout)` elements, for the other ranks' rows.
    """

    def __init__(self, rows: Sequence[Tensor], layout: ShardLayout, received: Tensor) -> None:
        self.layout, self._total = layout, rows[-1]
        self._chunks = [layout.chunk(r, len(rows[0])) for r in range(layout.world_size)]
        self._others = [r for r in range(layout.world_size) if r != layout.rank]
        mine = self._chunks[layout.rank]
        self._parts = {shard: row[mine] for shard, row in zip(layout.mine, rows, strict=True)}
        length = mine.stop - mine.start
        arriving: list[tuple[Tensor, int]] = []
        for rank in self._others:
            for shard in layout.of_rank(rank):
                start = len(arriving) * length
                self._parts[shard] = received[start : start + length]
                arriving.append((self._parts[shard], rank))
        self._works = _exchange(arriving, [(row[self._chunks[r]], r) for r in self._others for row in rows])

    @staticmethod
    def room(size: int, layout: ShardLayout) -> int:
        """Return the number of elements that a rank receives for a sum of rows of `size` elements."""
        chunk = layout.chunk(layout.rank, size)
        return (layout.shards - len(layout.mine)) * int(chunk.stop - chunk.start)

    def add(self) -> None:
        """Wait for the others' rows, add up this rank's chunk, and send it to them."""
        self._wait()
        total, target = self._parts[0], self._total[self._chunks[self.layout.rank]]
        last = self.layout.shards - 1
        for shard in range(1, last + 1):
            total = torch.add(total, self._parts[shard], out=target if shard == last else total)
        self._works = _exchange(
            [(self._total[self._chunks[r]], r) for r in self._others], [(target, r) for r in self._others]
        )

    def result(self) -> Tensor:
        """Return the sum, [n], the same bits for every number of ranks; on CUDA in the order of the current stream."""
        self._wait()
        return self._total

    def _wait(self) -> None:
        for work in self._works:
            work.wait()
        self._works.clear()


def _exchange(receive: Sequence[tuple[Tensor, int]], send: Sequence[tuple[Tensor, int]]) -> list[dist.Work]:
    """Start to receive and send (tensor, rank) pairs. Between two ranks, messages are matched in their order."""
    messages = [dist.P2POp(dist.irecv, tensor, rank) for tensor, rank in receive if len(tensor)]
    messages += [dist.P2POp(dist.isend, tensor, rank) for tensor, rank in send if len(tensor)]
    return dist.batch_isend_irecv(messages) if messages else []


class ShardReducer:
    """A DDP communication hook that adds the gradients of all shards in shard order.

    In each step: `keep` after each shard of this rank but the last, run under DDP's `no_sync`. Then the last shard's
    backward pass calls the hook for each bucket. A bucket's rows are sent while the backward pass computes the next
    bucket, and added when that one is complete.
    """

    def __init__(self, model: DistributedDataParallel, layout: ShardLayout) -> None:
        self.layout = layout
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._kept: list[dict[Tensor, Tensor]] = []
        self._under_way: list[tuple[ShardSum, torch.futures.Future[Tensor]]] = []
        # By bucket and type; new memory in each step would cost page faults.
        self._buffers: dict[tuple[int, torch.dtype], Tensor] = {}
        device = self._parameters[0].device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._device = device
        model.register_comm_hook(state=None, hook=self._hook)

    def keep(self) -> None:
        """Set this shard's gradients aside and clear those of the parameters."""
        kept: dict[Tensor, Tensor] = {}
        for parameter in self._parameters:
            assert parameter.grad is not None
            kept[parameter] = parameter.grad
            parameter.grad = None
        self._kept.append(kept)

    def end_step(self) -> None:
        """Drop the kept gradients, which the hook has used."""
        self._kept.clear()

    def _hook(self, state: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        if self._stream is None:
            return self._reduce(bucket, torch.futures.Future())
        # On CUDA the sum runs on a stream of its own, in parallel with the rest of the backward pass.
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            return self._reduce(bucket, torch.futures.Future(devices=[self._device]))

    def _reduce(self, bucket: dist.GradBucket, future: torch.futures.Future[Tensor]) -> torch.futures.Future[Tensor]:
        rows, received = self._rows(bucket)
        self._under_way.append((ShardSum(rows, self.layout, received), future))
        if len(self._under_way) > 1:
            self._under_way[-2][0].add()
        if bucket.is_last():
            self._under_way[-1][0].add()
            for one, its_future in self._under_way:
                its_future.set_result(one.result())
            self._under_way.clear()
        return future

    def _rows(self, bucket: dist.GradBucket) -> tuple[list[Tensor], Tensor]:
        """Return this rank's rows in the memory layout of the bucket, which is the last one, and a buffer to receive.

        DDP stores a gradient with its parameter's strides, also with channels_last ones, but `bucket.gradients()` shows
        the same memory with contiguous strides: only the offsets of those views are right.
        """
        last = bucket.buffer()
        size, kept = last.numel(), len(self._kept)
        needed = kept * size + ShardSum.room(size, self.layout)
        key = bucket.index(), last.dtype  # DDP forms its buckets anew after the first step
        buffer = self._buffers.get(key)
        if buffer is None or buffer.numel() < needed:
            buffer = self._buffers[key] = last.new_empty(needed)
        rows = list(buffer[: kept * size].view(kept, size))
        for row, gradients in zip(rows, self._kept, strict=True):
            for parameter, view in zip(bucket.parameters(), bucket.gradients(), strict=True):
                start = row.storage_offset() + view.storage_offset() - last.storage_offset()
                row.as_strided(parameter.shape, parameter.stride(), start).copy_(gradients[parameter])
        return [*rows, last], buffer[kept * size :]

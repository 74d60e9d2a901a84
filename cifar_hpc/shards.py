"""Logical shards: a global batch in a fixed number of parts, whose gradients are added in one fixed order."""

# No postponed annotations here: DDP reads those of the hook and wants the classes themselves.
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from cifar_hpc.errors import RunFailedError


@dataclass(frozen=True)
class ShardLayout:
    """Which rank computes which shards: consecutive ones, as even as can be, rank 0 always shard 0."""

    shards: int
    world_size: int
    rank: int

    def __post_init__(self) -> None:
        if self.world_size > self.shards:
            raise RunFailedError(
                f"{self.world_size} processes are more than the run's {self.shards} shard(s), fixed at its first "
                f"start. HINT: start at most {self.shards} processes, or begin a run with --set train.shards="
                f"{self.world_size} (or more) under another --name."
            )

    def of_rank(self, rank: int) -> range:
        """The shards of `rank`."""
        return range(rank * self.shards // self.world_size, (rank + 1) * self.shards // self.world_size)

    @property
    def mine(self) -> range:
        """The shards of this rank."""
        return self.of_rank(self.rank)

    def bounds(self, shard: int, size: int) -> slice:
        """The rows of `shard` in a global batch of `size` images."""
        return slice(shard * size // self.shards, (shard + 1) * size // self.shards)


def sum_in_shard_order(local: Tensor, layout: ShardLayout) -> Tensor:
    """Add rows in shard order over all ranks.

    All-to-all of chunks, a sum in fixed order, all-gather: with one shard a rank, the traffic of a ring all-reduce.

    Args:
        local: [this rank's shards, n], one row a shard.

    Returns:
        [n], the same bits on every rank, for every number of ranks.
    """
    mine, n = local.shape
    world = layout.world_size
    chunk = -(-n // world)
    padded = local.new_zeros(mine, world * chunk)
    padded[:, :n] = local
    send = padded.view(mine, world, chunk).transpose(0, 1).contiguous()
    received = local.new_empty(layout.shards, chunk)
    dist.all_to_all_single(
        received.view(-1),
        send.view(-1),
        output_split_sizes=[len(layout.of_rank(r)) * chunk for r in range(world)],
        input_split_sizes=[mine * chunk] * world,
    )
    total = received[0]
    for row in received[1:]:
        total.add_(row)
    gathered = local.new_empty(world * chunk)
    dist.all_gather_into_tensor(gathered, total)
    return gathered[:n]


class ShardReducer:
    """A DDP communication hook that joins a rank's kept shard gradients with the last one's.

    For each step: `keep` after each shard but the last of this rank, run under DDP's `no_sync`; then the last
    shard's backward pass calls the hook.
    """

    def __init__(self, model: DistributedDataParallel, layout: ShardLayout) -> None:
        self.layout = layout
        self._parameters = list(model.parameters())
        self._kept: list[dict[Tensor, Tensor]] = []
        device = self._parameters[0].device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._device = device
        model.register_comm_hook(state=None, hook=self._hook)

    def keep(self) -> None:
        """Set this shard's gradients aside and clear the parameters' ones."""
        kept: dict[Tensor, Tensor] = {}
        for parameter in self._parameters:
            assert parameter.grad is not None
            kept[parameter] = parameter.grad
            parameter.grad = None
        self._kept.append(kept)

    def end_step(self) -> None:
        """Forget the kept gradients; the hook has used them."""
        self._kept.clear()

    def _hook(self, state: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        if self._stream is None:
            future: torch.futures.Future[Tensor] = torch.futures.Future()
            future.set_result(sum_in_shard_order(self._rows(bucket), self.layout))
            return future
        # On CUDA the sum runs on a stream of its own, beside the rest of the backward pass.
        future = torch.futures.Future(devices=[self._device])
        rows = self._rows(bucket)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            rows.record_stream(self._stream)
            future.set_result(sum_in_shard_order(rows, self.layout))
        return future

    def _rows(self, bucket: dist.GradBucket) -> Tensor:
        """[this rank's shards, bucket size], each row laid out in memory like the bucket.

        DDP lays a gradient out with its parameter's strides (channels_last ones, too), but `bucket.gradients()` shows
        the same memory with contiguous strides: only the offsets of those views are to be trusted.
        """
        buffer = bucket.buffer()
        rows = buffer.new_empty(len(self._kept) + 1, buffer.numel())
        rows[-1] = buffer
        for row, kept in zip(rows, self._kept, strict=False):
            for parameter, view in zip(bucket.parameters(), bucket.gradients(), strict=True):
                start = row.storage_offset() + view.storage_offset() - buffer.storage_offset()
                row.as_strided(parameter.shape, parameter.stride(), start).copy_(kept[parameter])
        return rows

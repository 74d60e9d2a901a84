"""Layers that give the same result for any number of processes: BatchNorm by shard, dropout by key."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ShardBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm over the images of one logical shard.

    Every shard normalises with its own statistics; the running statistics follow the shards for which
    `update_statistics` is set (shard 0), so that they do not depend on how shards are dealt out to ranks.
    """

    update_statistics = True

    def forward(self, input: Tensor) -> Tensor:
        if self.training and not self.update_statistics:
            return F.batch_norm(input, None, None, self.weight, self.bias, True, 0.0, self.eps)
        return super().forward(input)


class KeyedDropout(nn.Module):
    """Dropout whose masks are a function of a key, and not of the global random state.

    All dropout layers of a model draw from one generator in the order in which they run; `ImprovedResNet.set_key`
    seeds it before each forward pass. An element is dropped where its 16 random bits, as a number, are below
    `rate` * 2**16: four elements share a draw, since drawing one by one took a sixth of a training step on a CPU.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.generator: torch.Generator | None = None

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return input
        if self.generator is None:
            raise RuntimeError("set_key must be called before a forward pass in training mode")
        count, dropped = input.numel(), round(self.rate * 2**16)
        draws = torch.empty(-(-count // 4), dtype=torch.int64, device=input.device)
        draws.random_(-(2**63), None, generator=self.generator)
        # In the input's order in memory, so that no pass over it jumps about.
        numbers = draws.view(torch.int16)[:count].as_strided(input.shape, input.stride())
        mask = (numbers >= dropped - 2**15).to(input.dtype)
        return input * mask.mul_(2**16 / (2**16 - dropped))


def batch_norms(model: nn.Module) -> list[ShardBatchNorm2d]:
    """The BatchNorm layers in a fixed order."""
    return [m for m in model.modules() if isinstance(m, ShardBatchNorm2d)]

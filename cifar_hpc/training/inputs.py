"""Inputs of the training steps: images augmented for several steps at once, and numbers as tensors."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from cifar_hpc.config.spec import Spec
from cifar_hpc.data.augment.mixing import MIXING_DRAWS
from cifar_hpc.data.datasets import Dataset
from cifar_hpc.randomness import Stream, mix, uniform
from cifar_hpc.training.distributed.shards import ShardLayout

# Pixels that are augmented at once, of one step's images at least. Augmentation has hundreds of small operations, which
# take a GPU's host as long for many images as for few. On a CPU they should not keep a step waiting for long.
AHEAD = {"cuda": 2**22, "cpu": 2**20}
Place = tuple[int, int, int]  # epoch, step in it, step in all


class StepInputs(NamedTuple):
    """The values that differ from step to step, as tensors on the device: a CUDA graph would freeze Python's numbers.

    Attributes:
        images: float32 [b, 3, S, S], augmented, of this rank's shards, one after the other.
        labels: int64 [b].
        draws: float32 [b, MIXING_DRAWS] in [0, 1); None without mixing.
        keys: int64 [shards of this rank, layers], of their masks.
        number: int64 [], of the step, from 1.
        batch: images in the global batch: the same in all steps of an epoch but the last.
    """

    images: Tensor
    labels: Tensor
    draws: Tensor | None
    keys: Tensor
    number: Tensor
    batch: int

    def clone(self) -> "StepInputs":
        """Return the same in other memory."""
        draws = None if self.draws is None else self.draws.clone()
        own = self.images.clone(), self.labels.clone(), draws, self.keys.clone(), self.number.clone()
        return StepInputs(*own, self.batch)

    def copy_(self, other: "StepInputs") -> None:
        """Copy the tensors of another step into these."""
        for own, new in zip(self, other, strict=True):
            if isinstance(own, Tensor) and isinstance(new, Tensor):
                own.copy_(new)


class InputQueue:
    """Inputs of the next steps of an epoch, a pure function of the spec and the step: nothing of it is saved.

    Args:
        augmented: augments images by their indices, int64 [b], and a key for each, int64 [b].
        mask_keys: makes the layers' keys of those of forward passes.
    """

    def __init__(
        self,
        spec: Spec,
        layout: ShardLayout,
        data: Dataset,
        augmented: Callable[[Tensor, Tensor], Tensor],
        mask_keys: Callable[[Tensor], Tensor],
    ) -> None:
        self.spec, self.layout, self.data = spec, layout, data
        self._augmented, self._mask_keys = augmented, mask_keys
        self._order: Tensor | None = None
        self._ready: dict[Place, StepInputs] = {}

    def take(self, epoch: int, step: int, global_step: int, order: Tensor) -> StepInputs:
        """Return the inputs of a step.

        Args:
            order: int64 [N] on the device, the epoch's order of the training images.
        """
        key = (epoch, step, global_step)
        if self._order is not order or key not in self._ready:
            self._order, self._ready = order, {}  # the old ones first, so that their memory serves again
            self._ready = self._prepare(epoch, step, global_step, order)
        return self._ready.pop(key)

    def _prepare(self, epoch: int, first: int, global_step: int, order: Tensor) -> dict[Place, StepInputs]:
        seed, size, device = self.spec.train.seed, self.spec.train.batch_size, order.device
        mine, own = self.layout.mine, list[Tensor]()
        each = size * len(mine) / self.layout.shards * self.data.info.image_size**2
        end = min(first + max(1, int(AHEAD[device.type] / each)), -(-len(order) // size))
        steps = range(first, end)
        batches = [order[step * size : (step + 1) * size] for step in steps]
        for rows in batches:
            bounds = [self.layout.bounds(shard, len(rows)) for shard in (mine[0], mine[-1])]
            own.append(rows[bounds[0].start : bounds[1].stop])
        sizes, indices = [len(rows) for rows in own], torch.cat(own)

        def int64(values: Iterable[int | list[int]]) -> Tensor:
            return torch.tensor([*values], dtype=torch.int64)

        def of_rows(stream: Stream) -> Tensor:
            """A key for each row, that of its step."""
            keys = int64(mix(seed, stream, epoch, step) for step in steps)
            return keys.repeat_interleave(torch.tensor(sizes)).to(device, non_blocking=True)

        images = self._augmented(indices, of_rows(Stream.AUGMENT)).split(sizes)
        labels = self.data.train_labels.index_select(0, indices).split(sizes)
        draws: Iterable[Tensor | None] = [None] * len(steps)
        if self.spec.mixing.on:
            draws = uniform(of_rows(Stream.MIX), indices, MIXING_DRAWS).split(sizes)
        masks = int64([mix(seed, Stream.DROPOUT, epoch, step, shard) for shard in mine] for step in steps)
        keys = self._mask_keys(masks.to(device, non_blocking=True))
        numbers = torch.arange(global_step + 1, global_step + 1 + len(steps), device=device)
        parts = zip(steps, images, labels, draws, keys, numbers, batches, strict=True)
        return {
            (epoch, step, global_step + step - first): StepInputs(pixels, label, draw, key, number, len(rows))
            for step, pixels, label, draw, key, number, rows in parts
        }

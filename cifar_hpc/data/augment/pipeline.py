"""The report's augmentation, batched on the device: crop, flip, rotation, colours, normalisation, erasing.

Torchvision defines what each step means; the tests compare with it. Here every sample has its own parameters,
which are computed from `randomness.uniform`, and nothing waits for the device: no shapes or branches depend
on data, and no constant is copied from the host, so a CUDA graph or torch.compile may hold all of it. On a CPU,
which has nothing to wait for, the samples are sorted into small parts that need fewer steps; the bits are the same.

A sample's pixels do not depend on the other samples of its batch, to the bit. Two things in the code serve
that: each operation is a single multiplication or addition (a fused one may round differently in the
remainder of a vector loop), and the one reduction, contrast's mean, is a sum of integers.
"""

import torch
from torch import Tensor

from cifar_hpc.config.spec import AugmentConfig
from cifar_hpc.data.augment import kernels
from cifar_hpc.data.augment.kernels import Channels, Plan
from cifar_hpc.data.info import DatasetInfo

# The pixels that a CPU works on at a time, of one sample at least: with the scratch they fit into a core's second-level
# cache.
PART = 48 * 1024


def normalize(images: Tensor, info: DatasetInfo) -> Tensor:
    """Images for evaluation: scaled to [0, 1], less the data set's mean, over its deviation.

    Args:
        images: uint8 [B, 3, S, S].
        info: of the data that the model was trained on.

    Returns:
        float32 [B, 3, S, S], channels_last, equal to torchvision's ToTensor, Normalize.
    """
    x = kernels.normalize_(kernels.unit_(_planes(images), images), kernels.channels(images.device, info))
    return x.view(images.shape).contiguous(memory_format=torch.channels_last)


def augment(images: Tensor, draws: Tensor, config: AugmentConfig, info: DatasetInfo) -> Tensor:
    """Augment and normalise a batch.

    Args:
        images: uint8 [B, 3, S, S], on any device.
        draws: float32 [B, DRAWS] in [0, 1) on the same device.
        config: what to do; steps that are switched off are skipped.
        info: of the data.

    Returns:
        float32 [B, 3, S, S], channels_last; each sample depends on its own image and draws only.
    """
    # Traced tensors have no values to sort by; fake ones are of a class of their own. Few samples make no parts.
    values = images.device.type == "cpu" and type(draws) is Tensor and not torch.compiler.is_compiling()
    size = images.shape[3]
    if values and len(images) > _samples(size):
        return _augment_in_parts(images, draws, config, info)
    plan = kernels.make_plan(kernels.sample_parameters(draws, config, size), config, size, sorted_by_hue=False)
    x = _planes(images)
    scratch = x.new_empty(4 * len(x) * size * size)
    _augment_(x, images, plan, len(plan.image) // 2, scratch, kernels.channels(x.device, info), config)
    return x.view(images.shape).contiguous(memory_format=torch.channels_last)


def _augment_in_parts(images: Tensor, draws: Tensor, config: AugmentConfig, info: DatasetInfo) -> Tensor:
    """`augment` on a CPU: half as many blends, in the cache. Reads values of `draws`."""
    side = images.shape[3]
    before, pixels = kernels.blends_before_hue(draws, config), side * side
    order, counts = before.argsort(stable=True), before.tolist()
    parts = [(turns, size) for turns in range(4) for size in _sizes(counts.count(turns), _samples(side))]
    sizes = [size for _, size in parts]
    draws, images = draws.index_select(0, order), images.index_select(0, order)
    whole = kernels.make_plan(kernels.sample_parameters(draws, config, side), config, side, sorted_by_hue=True)
    plans = map(Plan, *(tensor.split(sizes, dim=1) for tensor in whole))
    out = torch.empty(images.shape, dtype=torch.float32, memory_format=torch.channels_last)
    constants, largest = kernels.channels(images.device, info), max(sizes)
    # The same memory for all parts, which so stays in the cache.
    planes, scratch = (torch.empty(count * largest * pixels, dtype=torch.float32) for count in (3, 4))
    for (turns, size), rows, plan, part in zip(parts, order.split(sizes), plans, images.split(sizes), strict=True):
        x = planes[: 3 * size * pixels].view(size, 3, pixels)
        _augment_(x, part, plan, turns, scratch[: 4 * size * pixels], constants, config)
        out.index_copy_(0, rows, x.view(part.shape))
    return out


def _samples(size: int) -> int:
    """The most samples of a part, for images of so many pixels in height and width."""
    return max(1, PART // size**2)


def _sizes(count: int, most: int) -> list[int]:
    """Even sizes of the parts that so many samples are worked on in."""
    number = -(-count // most)
    return [count * (n + 1) // number - count * n // number for n in range(number)]


def _augment_(
    x: Tensor, images: Tensor, plan: Plan, turns: int, scratch: Tensor, constants: Channels, config: AugmentConfig
) -> None:
    """Augment uint8 `images` into x, float32 [B, 3, S * S], with so many turns before hue."""
    if config.geometric:
        images = kernels.move(images, plan, scratch.view(4, -1, *images.shape[2:]))
    kernels.unit_(x, images)
    if config.jitter:
        kernels.jitter_(x, scratch.view(4, -1, 1, x.shape[2]), plan, turns, constants, config)
    kernels.normalize_(x, constants)
    if config.erasing > 0:
        kernels.erase_(x, plan)


def _planes(images: Tensor) -> Tensor:
    return torch.empty(len(images), 3, images.shape[2] * images.shape[3], dtype=torch.float32, device=images.device)

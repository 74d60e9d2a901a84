"""The report's augmentation, batched on the device: crop, flip, rotation, colours, normalisation, erasing.

Torchvision defines what each step means; the tests compare with it. Here every sample has its own parameters,
which are computed from `randomness.uniform`, and nothing waits for the device: no shapes or branches depend
on data, and no constant is copied from the host, so a CUDA graph or torch.compile may hold all of it. On a CPU,
which has nothing to wait for, the samples are sorted into small parts that need fewer steps; the bits are the same.

A sample's pixels do not depend on the other samples of its batch, to the bit. Two things in the code serve
that: each operation is a single multiplication or addition (a fused one may round differently in the
remainder of a vector loop), and the one reduction, contrast's mean, is a sum of integers.
"""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from cifar_hpc.config.spec import IMAGE_SIZE, AugmentConfig
from cifar_hpc.data.augment.color import Blends, Channels, blends, channels, jitter_
from cifar_hpc.data.augment.geometry import PIXELS, Moves, move, moves
from cifar_hpc.data.augment.parameters import Parameters, blends_before_hue, check_draws, sample_parameters

PART = 48
"""The most samples that a CPU works on at a time: with the scratch they fit into a core's second-level cache."""


class Boxes(NamedTuple):
    """Erasing masks of B samples: 0 in the rows and columns of a box, else -1; int32 [1, B, 32, 1], [1, B, 1, 32]."""

    rows: Tensor
    columns: Tensor


class Plan(NamedTuple):
    """The plan for B samples, as far as it is worth computing for a batch at once."""

    moves: Moves
    blends: Blends
    boxes: Boxes


def _plan(p: Parameters, config: AugmentConfig, sorted_by_hue: bool) -> Plan:
    return Plan(moves(p, config), blends(p, config, sorted_by_hue), _boxes(p))


Tensors = TypeVar("Tensors", Moves, Blends, Boxes)


def _split(tensors: Tensors, sizes: list[int]) -> list[Tensors]:
    """Parts of the samples, which are the second dimension."""
    return [type(tensors)(*part) for part in zip(*(t.split(sizes, dim=1) for t in tensors), strict=True)]


def erase(images: Tensor, p: Parameters) -> Tensor:
    """Set each sample's box to 0.

    Args:
        images: float32 [B, 3, 32, 32].

    Returns:
        A new tensor of the same shape.
    """
    x = images.clone(memory_format=torch.contiguous_format)
    _erase_(x.view(-1, 3, PIXELS), _boxes(p))
    return x


def _boxes(p: Parameters) -> Boxes:
    line = torch.arange(IMAGE_SIZE, device=p.erase_top.device)
    rows = (line >= p.erase_top[:, None]) & (line < (p.erase_top + p.erase_height)[:, None])
    columns = (line >= p.erase_left[:, None]) & (line < (p.erase_left + p.erase_width)[:, None])
    return Boxes(rows.to(torch.int32).sub_(1)[None, :, :, None], columns.to(torch.int32).sub_(1)[None, :, None, :])


def _erase_(x: Tensor, boxes: Boxes) -> None:
    # All bits of a pixel or none: a product would need a second step, for the -0 of a negative pixel times 0.
    x.view(torch.int32).bitwise_and_((boxes.rows[0] | boxes.columns[0]).view(-1, 1, PIXELS))


def _unit_(x: Tensor, images: Tensor) -> Tensor:
    """uint8 to float32 [B, 3, 1024] in [0, 1], as torchvision's ToTensor."""
    # CUDA would divide by a Python number through its reciprocal; a tensor gives the CPU's bits.
    return x.copy_(images.reshape(x.shape)).div_(torch.full((1,), 255.0, dtype=torch.float32, device=x.device))


def _normalize_(x: Tensor, constants: Channels) -> Tensor:
    return x.sub_(constants.mean).div_(constants.deviation)


def normalize(
    images: Tensor,
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Tensor:
    """Images for evaluation: scaled to [0, 1], less CIFAR-10's mean, over its deviation.

    Args:
        images: uint8 [B, 3, 32, 32].

    Returns:
        [B, 3, 32, 32] of `dtype`, in `memory_format`; float32 is equal to torchvision's ToTensor, Normalize.

    Raises:
        ValueError: for images of another shape or type.
    """
    _check_images(images)
    x = _normalize_(_unit_(_planes(images), images), channels(images.device))
    return x.view(images.shape).to(dtype, memory_format=memory_format)


def augment(
    images: Tensor,
    draws: Tensor,
    config: AugmentConfig,
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Tensor:
    """Augment and normalise a batch.

    Args:
        images: uint8 [B, 3, 32, 32], on any device.
        draws: float32 [B, DRAWS] in [0, 1) on the same device.
        config: what to do; steps that are switched off are skipped.

    Returns:
        [B, 3, 32, 32] of `dtype` in `memory_format`; each sample depends on its own image and draws only.

    Raises:
        ValueError: for images or draws of another shape or type.
    """
    _check_images(images)
    # Traced tensors have no values to sort by; fake ones are of a class of their own. Few samples make no parts.
    values = images.device.type == "cpu" and type(draws) is Tensor and not torch.compiler.is_compiling()
    if values and len(images) > PART:
        return _augment_in_parts(images, draws, config, dtype, memory_format)
    plan = _plan(sample_parameters(draws, config), config, sorted_by_hue=False)
    x = _planes(images)
    _augment_(
        x, images, plan, plan.blends.image.shape[0] // 2, x.new_empty(4 * len(x) * PIXELS), channels(x.device), config
    )
    return x.view(images.shape).to(dtype, memory_format=memory_format)


def _augment_in_parts(
    images: Tensor, draws: Tensor, config: AugmentConfig, dtype: torch.dtype, memory_format: torch.memory_format
) -> Tensor:
    """`augment` on a CPU: half as many blends, in the cache. Reads values of `draws`."""
    check_draws(draws)
    before = blends_before_hue(draws, config)
    order, counts = before.argsort(stable=True), before.tolist()
    parts = [(turns, size) for turns in range(4) for size in _sizes(counts.count(turns))]
    sizes = [size for _, size in parts]
    draws, images = draws.index_select(0, order), images.index_select(0, order)
    plan = _plan(sample_parameters(draws, config), config, sorted_by_hue=True)
    out = torch.empty(images.shape, dtype=dtype, memory_format=memory_format)
    constants, largest = channels(images.device), max(sizes, default=0)
    # The same memory for all parts, which so stays in the cache.
    planes, scratch = (
        torch.empty(count * largest * PIXELS, dtype=torch.float32, device=images.device) for count in (3, 4)
    )
    plans = map(Plan, _split(plan.moves, sizes), _split(plan.blends, sizes), _split(plan.boxes, sizes))
    for (turns, size), rows, part, pixels in zip(parts, order.split(sizes), plans, images.split(sizes), strict=True):
        x = planes[: 3 * size * PIXELS].view(size, 3, PIXELS)
        _augment_(x, pixels, part, turns, scratch[: 4 * size * PIXELS], constants, config)
        out.index_copy_(0, rows, x.view(pixels.shape).to(dtype, memory_format=memory_format))
    return out


def _sizes(count: int) -> list[int]:
    """Even sizes of the parts that so many samples are worked on in."""
    number = -(-count // PART)
    return [count * (n + 1) // number - count * n // number for n in range(number)]


def _augment_(
    x: Tensor, images: Tensor, plan: Plan, turns: int, scratch: Tensor, constants: Channels, config: AugmentConfig
) -> None:
    """Augment uint8 `images` into x, float32 [B, 3, 1024], with so many turns before hue."""
    _unit_(x, move(images, plan.moves, scratch.view(4, -1, IMAGE_SIZE, IMAGE_SIZE)) if config.geometric else images)
    if config.jitter:
        jitter_(x, scratch.view(4, -1, 1, PIXELS), plan.blends, turns, constants, config)
    _normalize_(x, constants)
    if config.erasing > 0:
        _erase_(x, plan.boxes)


def _planes(images: Tensor) -> Tensor:
    return torch.empty(len(images), 3, PIXELS, dtype=torch.float32, device=images.device)


def _check_images(images: Tensor) -> None:
    if images.dtype != torch.uint8 or images.shape[1:] != (3, IMAGE_SIZE, IMAGE_SIZE):
        raise ValueError(f"images must be uint8 [B, 3, 32, 32], got {images.dtype} {list(images.shape)}")

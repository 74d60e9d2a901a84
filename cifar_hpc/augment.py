"""The report's augmentation, batched on the device: crop, flip, rotation, colours, normalisation, erasing.

Torchvision defines what each step means; the tests compare with it. Here every sample has its own parameters,
which are computed from `randomness.uniform`, and nothing waits for the device: no shapes or branches depend
on data, and no constant is copied from the host, so a CUDA graph or torch.compile may hold all of it.

A sample's pixels do not depend on the other samples of its batch, to the bit. Two things in the code serve
that: each operation is a single multiplication or addition (a fused one may round differently in the
remainder of a vector loop), and the one reduction, contrast's mean, is a sum of integers.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cifar_hpc.augment_config import IMAGE_SIZE, AugmentConfig
from cifar_hpc.augment_parameters import DRAWS, Parameters, sample_parameters

__all__ = [
    "CIFAR10_MEAN",
    "CIFAR10_STD",
    "DRAWS",
    "Parameters",
    "augment",
    "color_jitter",
    "erase",
    "geometry",
    "normalize",
    "sample_parameters",
]

CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR10_STD = (0.2470, 0.2435, 0.2616)
LUMA = (0.2989, 0.587, 0.114)  # torchvision.transforms.functional.rgb_to_grayscale

_LAST = IMAGE_SIZE - 1
_PIXELS = IMAGE_SIZE * IMAGE_SIZE


def geometry(images: Tensor, p: Parameters, config: AugmentConfig) -> Tensor:
    """Pad, crop, flip and rotate in one lookup; equal to torchvision's (tensors, nearest pixel, fill 0).

    Args:
        images: uint8 [B, 3, 32, 32].

    Returns:
        uint8 [B, 3, 32, 32]; `images` itself if the config moves nothing.
    """
    if not config.geometric:
        return images
    batch = images.shape[0]
    row, column = _rotated(p.angle, config.rotation > 0)
    # From a place in the rotated picture back to the image: mirror, then shift. What lies outside the crop
    # window or outside the image is 0. Both are intervals of the place, so one clamp per axis finds it.
    down, right = (side[:, None, None] - config.crop_padding for side in (p.top, p.left))
    mirror = p.flip[:, None, None].to(torch.int64)
    low, high = (-right).clamp(min=0), _LAST - right.clamp(min=0)
    near = low + mirror * (_LAST - high - low)
    far = high + mirror * (_LAST - low - high)
    inside_row = _within(row, (-down).clamp(min=0), _LAST - down.clamp(min=0))
    inside_column = _within(column, near, far)
    # 0 where both are inside, at least 1 elsewhere; a comparison would cost a CPU as much as six of these.
    outside = (inside_row - row).abs_() + (inside_column - column).abs_()
    keep = outside.clamp_(max=1).neg_().add_(1).to(torch.uint8)
    # float32 holds these small integers exactly.
    inside_column.mul_((1 - 2 * mirror).float()).add_((mirror * _LAST + right + down * IMAGE_SIZE).float())
    index = (inside_row.mul_(IMAGE_SIZE) + inside_column).to(torch.int64)
    index = index.view(batch, 1, _PIXELS).expand(batch, 3, _PIXELS)
    moved = images.reshape(batch, 3, _PIXELS).gather(2, index)
    return moved.mul_(keep.view(batch, 1, _PIXELS)).view(batch, 3, IMAGE_SIZE, IMAGE_SIZE)


def _within(place: Tensor, low: Tensor, high: Tensor) -> Tensor:
    # Not torch.clamp, which is not vectorised for limits that broadcast.
    inside = torch.maximum(place, low.float())
    return torch.minimum(inside, high.float(), out=inside)


def _rotated(angle: Tensor, rotate: bool) -> tuple[Tensor, Tensor]:
    """Row and column that each pixel shows, float32 integers broadcasting to [B, 32, 32].

    Repeats the roundings of torchvision's _gen_affine_grid (a matrix product, which a CPU does with fused
    multiply-adds) and grid_sample, both without their scaling by 16, a power of two. The fused step is done
    as an exact product and a sum in float64: a matrix product would depend on the BLAS and on TF32 settings.
    """
    line = torch.arange(IMAGE_SIZE, dtype=torch.float32, device=angle.device)
    if not rotate:
        return line[None, :, None], line[None, None, :]
    radians = angle.double() * (-math.pi / 180)
    cosine, sine = (t.float()[:, None, None] for t in (radians.cos(), radians.sin()))
    half = IMAGE_SIZE / 2
    x, y = line[None, None, :] - (half - 0.5), line[None, :, None] - (half - 0.5)
    column = (x * cosine).double() + y.double() * sine.double()
    row = (x * -sine).double() + y.double() * cosine.double()
    return row.float().add_(half).sub_(0.5).round_(), column.float().add_(half).sub_(0.5).round_()


def color_jitter(images: Tensor, p: Parameters, config: AugmentConfig) -> Tensor:
    """Brightness, contrast, saturation and hue, in each sample's own order, as ColorJitter on floats.

    The first three are all `clamp(factor * image + (1 - factor) * other)`, with nothing, the mean of the
    luma, or the luma as the other. So hue is done once for all samples, and up to three such blends before
    and after it, where a sample that has no blend at some turn takes factor 1.

    Args:
        images: float32 [B, 3, 32, 32] in [0, 1].

    Returns:
        float32 [B, 3, 32, 32] in [0, 1], within 1e-5 of torchvision (for factors in
        [0.8, 1.2]); `images` itself if the config changes no colour.
    """
    if not config.jitter:
        return images
    x = images.clone(memory_format=torch.contiguous_format).view(-1, 3, _PIXELS)
    return _jitter_(x, p, config).view(-1, 3, IMAGE_SIZE, IMAGE_SIZE)


def _jitter_(x: Tensor, p: Parameters, config: AugmentConfig) -> Tensor:
    # Planes, reused by every step: less memory to fetch than a new tensor for each. Each is contiguous,
    # because torch.compile refuses `out=` otherwise.
    scratch = x.new_empty(4, x.shape[0], 1, _PIXELS)
    turns, before = _blend_turns(p, config), 0
    if config.hue > 0:
        before = turns[0].shape[0] // 2
        for turn in range(before):
            _blend_(x, scratch, turns, turn, config)
        _shift_hue_(x, scratch, p.hue[:, None, None])
    for turn in range(before, turns[0].shape[0]):
        _blend_(x, scratch, turns, turn, config)
    return x


Turns = tuple[Tensor, Tensor, Tensor]


def _blend_turns(p: Parameters, config: AugmentConfig) -> Turns:
    """Weights [T, B, 1, 1] of the image, its luma and the luma's mean, at each of T turns (at most 6)."""
    position = p.order.argsort(dim=1)  # the inverse permutation: the turn of each step
    sizes = (config.brightness, config.contrast, config.saturation)
    factors = (p.brightness, p.contrast, p.saturation)
    columns = [column for column, size in enumerate(sizes) if size > 0]
    if not columns:
        nothing = p.hue.new_empty(0, p.hue.shape[0], 1, 1)
        return nothing, nothing, nothing
    place = torch.stack([position[:, column] for column in columns], dim=1)
    factor = torch.stack([factors[column] for column in columns], dim=1)
    turn = (place[:, None, :] < place[:, :, None]).sum(dim=2)  # how many blends come earlier
    count = len(columns)
    if config.hue > 0:
        turn = turn + count * (place > position[:, 3:])
        count *= 2
    chosen = turn == torch.arange(count, device=turn.device)[:, None, None]
    own = torch.where(chosen, factor, 0.0)
    image = torch.where(chosen.any(dim=2), own.sum(dim=2), 1.0)
    other = torch.where(chosen, 1 - factor, 0.0)
    none = torch.zeros_like(image)
    luma = other[:, :, columns.index(2)] if 2 in columns else none
    mean = other[:, :, columns.index(1)] if 1 in columns else none
    return image[:, :, None, None], luma[:, :, None, None], mean[:, :, None, None]


def _blend_(x: Tensor, scratch: Tensor, turns: Turns, turn: int, config: AugmentConfig) -> None:
    image, luma, mean = (weight[turn] for weight in turns)
    if config.contrast > 0 or config.saturation > 0:
        gray, other = scratch[0], scratch[1]
        torch.mul(x[:, :1], LUMA[0], out=gray)
        for channel in (1, 2):
            gray.add_(torch.mul(x[:, channel : channel + 1], LUMA[channel], out=other))
        if config.contrast > 0:
            # In steps of 2**-14 the sum of 1024 pixels stays within 2**24, so float32 adds them exactly, in
            # whatever order a device sums. The mean moves by at most 2**-15, the result by a fifth of that.
            exact = torch.mul(gray, 2.0**14, out=other).round_().mean(dim=2, keepdim=True)
            gray.mul_(luma).add_(exact * 2.0**-14 * mean)
        else:
            gray.mul_(luma)
        x.mul_(image).add_(gray)
    else:
        x.mul_(image)
    x.clamp_(0, 1)


def _shift_hue_(x: Tensor, scratch: Tensor, shift: Tensor) -> None:
    """Turn the hue of x [B, 3, 1024] by `shift` [B, 1, 1] turns without leaving RGB.

    With V the largest channel and C the spread, HSV gives back a channel as V - C + C * ramp(distance of its
    own hue). Going there, the hue's distance from red in sixths of a turn is 1 + (g + b - r - min) / C, on
    the side of sign(g - b): the usual formula of all six sextants without its comparisons, which are slow on
    a CPU.
    """
    red, green, blue = x[:, :1], x[:, 1:2], x[:, 2:]
    low, spread, hue, divisor = scratch
    torch.minimum(torch.minimum(red, green, out=low), blue, out=low)
    torch.maximum(torch.maximum(red, green, out=spread), blue, out=spread).sub_(low)
    torch.add(green, blue, out=hue).sub_(red).sub_(low)
    side = green.sub_(blue)
    # Grey has no hue, and with C = 0 any hue gives grey; the clamp only keeps 0 / 0 away.
    hue.div_(torch.clamp(spread, min=1e-12, out=divisor)).add_(1).div_(6).copysign_(side).add_(shift)
    for channel, own in enumerate((0, 1 / 3, 2 / 3)):
        x[:, channel : channel + 1] = hue + (2 - own)
    # frac - 0.5 is the distance from the opposite hue, in turns; the clamp cuts it to the slopes of the ramp.
    x.frac_().sub_(0.5).abs_().clamp_(1 / 6, 1 / 3)
    low.sub_(spread)
    x.mul_(spread.mul_(6)).add_(low)


def erase(images: Tensor, p: Parameters) -> Tensor:
    """Set each sample's box to 0.

    Args:
        images: float [B, 3, 32, 32].

    Returns:
        A new tensor of the same shape and type.
    """
    return _erase_(images.clone(), p)


def _erase_(x: Tensor, p: Parameters) -> Tensor:
    line = torch.arange(IMAGE_SIZE, device=x.device)
    rows = (line >= p.erase_top[:, None]) & (line < (p.erase_top + p.erase_height)[:, None])
    columns = (line >= p.erase_left[:, None]) & (line < (p.erase_left + p.erase_width)[:, None])
    keep = 1 - rows.to(x.dtype)[:, None, :, None] * columns.to(x.dtype)[:, None, None, :]
    # Adding 0 turns the -0 of a negative pixel times 0 into the 0 that was asked for.
    return x.mul_(keep).add_(0)


def _per_channel(values: tuple[float, ...], like: Tensor) -> Tensor:
    """Constants as [3, 1], filled on the device: torch.tensor(...) would wait for a copy from the host."""
    return torch.stack([torch.full((1,), value, dtype=torch.float32, device=like.device) for value in values])


def _unit(images: Tensor) -> Tensor:
    """uint8 [B, 3, 32, 32] to float32 [B, 3, 1024] in [0, 1], as torchvision's ToTensor."""
    x = images.to(torch.float32, memory_format=torch.contiguous_format).view(-1, 3, _PIXELS)
    # CUDA would divide by a Python number through its reciprocal; a tensor gives the CPU's bits.
    return x.div_(torch.full((1,), 255.0, dtype=torch.float32, device=x.device))


def _normalize_(x: Tensor) -> Tensor:
    return x.sub_(_per_channel(CIFAR10_MEAN, x)).div_(_per_channel(CIFAR10_STD, x))


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
    return _normalize_(_unit(images)).view(images.shape).to(dtype, memory_format=memory_format)


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
    p = sample_parameters(draws, config)
    x = _unit(geometry(images, p, config))
    if config.jitter:
        x = _jitter_(x, p, config)
    x = _normalize_(x).view(images.shape)
    x = _erase_(x, p) if config.erasing > 0 else x
    return x.to(dtype, memory_format=memory_format)


def _check_images(images: Tensor) -> None:
    if images.dtype != torch.uint8 or images.shape[1:] != (3, IMAGE_SIZE, IMAGE_SIZE):
        raise ValueError(f"images must be uint8 [B, 3, 32, 32], got {images.dtype} {list(images.shape)}")

"""Brightness, contrast, saturation and hue of a batch, in each sample's own order, as ColorJitter on floats.

The first three are all `clamp(factor * image + (1 - factor) * other)`, with nothing, the mean of the luma, or the
luma as the other. So hue is done once for all samples, and up to three such blends before and after it, where a
sample that has no blend at some turn takes factor 1. Samples with as many blends before hue as one another take
no more turns than there are blends.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cifar_hpc.config.spec import IMAGE_SIZE, AugmentConfig
from cifar_hpc.data.augment.geometry import PIXELS
from cifar_hpc.data.augment.parameters import Parameters

CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR10_STD = (0.2470, 0.2435, 0.2616)
LUMA = (0.2989, 0.587, 0.114)  # torchvision.transforms.functional.rgb_to_grayscale
# In steps of 2**-14 the sum of 1024 pixels stays within 2**24, so float32 adds them exactly, in whatever order a
# device sums. The mean moves by at most 2**-15, the result by a fifth of that.
_STEPS = 2.0**14


class Channels(NamedTuple):
    """Constants of red, green and blue, float32 [3, 1] on the device; made once for a batch.

    Attributes:
        luma: weights of the luma, in steps of 2**-14.
        hue: turns that put each channel's opposite hue at a whole number of turns and a half.
        mean, deviation: CIFAR-10's.
    """

    luma: Tensor
    hue: Tensor
    mean: Tensor
    deviation: Tensor


def channels(device: torch.device) -> Channels:
    """The constants on that device."""
    luma, hue = [weight * _STEPS for weight in LUMA], [2 - own for own in (0, 1 / 3, 2 / 3)]
    return Channels(*(_per_channel(values, device) for values in (luma, hue, CIFAR10_MEAN, CIFAR10_STD)))


def _per_channel(values: Sequence[float], device: torch.device) -> Tensor:
    if device.type == "cpu":
        return torch.tensor(values, dtype=torch.float32, device=device)[:, None]
    # Filled on the device: torch.tensor(...) would wait for a copy from the host.
    return torch.stack([torch.full((1,), value, dtype=torch.float32, device=device) for value in values])


class Blends(NamedTuple):
    """The blends of B samples at each of T turns, and their hue.

    Attributes:
        image, luma, mean: weights of the image, its luma and the luma's mean, float32 [T, B, 1, 1].
        hue: float32 [1, B, 1, 1], turns of the circle.
    """

    image: Tensor
    luma: Tensor
    mean: Tensor
    hue: Tensor


def blends(p: Parameters, config: AugmentConfig, sorted_by_hue: bool) -> Blends:
    """Choose the blends of each turn.

    Args:
        sorted_by_hue: count no turn for a sample that has no blend at it.
    """
    sizes = (config.brightness, config.contrast, config.saturation)
    factors = (p.brightness, p.contrast, p.saturation)
    columns = [column for column, size in enumerate(sizes) if size > 0]
    hue = p.hue[None, :, None, None]
    if not columns:
        nothing = p.hue.new_empty(0, p.hue.shape[0], 1, 1)
        return Blends(nothing, nothing, nothing, hue)
    position = p.order.argsort(dim=1)  # the inverse permutation: the turn of each step
    place = torch.stack([position[:, column] for column in columns], dim=1)
    factor = torch.stack([factors[column] for column in columns], dim=1)
    turn = (place[:, None, :] < place[:, :, None]).sum(dim=2)  # how many blends come earlier
    count = len(columns)
    if config.hue > 0 and not sorted_by_hue:
        turn = turn + count * (place > position[:, 3:])
        count *= 2
    chosen = turn == torch.arange(count, device=turn.device)[:, None, None]
    own = torch.where(chosen, factor, 0.0)
    image = torch.where(chosen.any(dim=2), own.sum(dim=2), 1.0)
    other = torch.where(chosen, 1 - factor, 0.0).div_(_STEPS)
    none = torch.zeros_like(image)
    luma = other[:, :, columns.index(2)] if 2 in columns else none
    mean = other[:, :, columns.index(1)] if 1 in columns else none
    return Blends(image[:, :, None, None], luma[:, :, None, None], mean[:, :, None, None], hue)


def jitter_(x: Tensor, scratch: Tensor, b: Blends, before: int, constants: Channels, config: AugmentConfig) -> None:
    """Change the colours of x, float32 [B, 3, 1024] in [0, 1], in place.

    Args:
        scratch: float32 [4, B, 1, 1024], reused by every step: less memory to fetch than a new tensor for each.
            Each of its planes is contiguous, because torch.compile refuses `out=` otherwise.
        before: how many turns come before hue.
    """
    turns = list(zip(b.image.unbind(), b.luma.unbind(), b.mean.unbind(), strict=True))
    products, plane = scratch[:3].view(x.shape), scratch[3]
    for turn in turns[:before]:
        _blend_(x, products, plane, turn, constants.luma, config)
    if config.hue > 0:
        _shift_hue_(x, scratch, b.hue[0], constants.hue)
    for turn in turns[before:]:
        _blend_(x, products, plane, turn, constants.luma, config)


def _blend_(
    x: Tensor, products: Tensor, plane: Tensor, turn: tuple[Tensor, ...], weights: Tensor, config: AugmentConfig
) -> None:
    image, luma, mean = turn
    if config.contrast > 0 or config.saturation > 0:
        red, green, blue = torch.mul(x, weights, out=products).split(1, dim=1)
        gray = red.add_(green).add_(blue)
        if config.contrast > 0:
            average = torch.round(gray, out=plane).mean(dim=2, keepdim=True)
            gray.mul_(luma).add_(average.mul_(mean))
        else:
            gray.mul_(luma)
        x.mul_(image).add_(gray)
    else:
        x.mul_(image)
    x.clamp_(0, 1)


def _shift_hue_(x: Tensor, scratch: Tensor, shift: Tensor, channel: Tensor) -> None:
    """Turn the hue of x [B, 3, 1024] by `shift` [B, 1, 1] turns without leaving RGB.

    With V the largest channel and C the spread, HSV gives back a channel as V - C + C * ramp(distance of its
    own hue). Going there, the hue's distance from red in sixths of a turn is 1 + (g + b - r - min) / C, on
    the side of sign(g - b): the usual formula of all six sextants without its comparisons, which are slow on
    a CPU.
    """
    red, green, blue = x.split(1, dim=1)
    low, spread, hue, divisor = scratch.unbind()
    torch.minimum(torch.minimum(red, green, out=low), blue, out=low)
    torch.maximum(torch.maximum(red, green, out=spread), blue, out=spread).sub_(low)
    torch.add(green, blue, out=hue).sub_(red).sub_(low)
    side = green.sub_(blue)
    # Grey has no hue, and with C = 0 any hue gives grey; the clamp only keeps 0 / 0 away.
    hue.div_(torch.clamp(spread, min=1e-12, out=divisor)).add_(1).div_(6).copysign_(side).add_(shift)
    # frac - 0.5 is the distance from the opposite hue, in turns; the clamp cuts it to the slopes of the ramp.
    torch.add(hue, channel, out=x)
    x.frac_().sub_(0.5).abs_().clamp_(1 / 6, 1 / 3)
    low.sub_(spread)
    x.mul_(spread.mul_(6)).add_(low).clamp_(0, 1)


def color_jitter(images: Tensor, p: Parameters, config: AugmentConfig) -> Tensor:
    """Brightness, contrast, saturation and hue.

    Args:
        images: float32 [B, 3, 32, 32] in [0, 1].

    Returns:
        float32 [B, 3, 32, 32] in [0, 1], within 1e-5 of torchvision (for factors in
        [0.8, 1.2]); `images` itself if the config changes no colour.
    """
    if not config.jitter:
        return images
    x = images.clone(memory_format=torch.contiguous_format).view(-1, 3, PIXELS)
    b = blends(p, config, sorted_by_hue=False)
    jitter_(x, x.new_empty(4, len(x), 1, PIXELS), b, b.image.shape[0] // 2, channels(x.device), config)
    return x.view(-1, 3, IMAGE_SIZE, IMAGE_SIZE)

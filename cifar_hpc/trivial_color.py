"""What TrivialAugment does to colours, on uint8 batches and with torchvision's roundings.

Each operation is a single multiplication, addition or comparison at a time, of numbers that torchvision has, too,
or it is exact in whole numbers; so the results are torchvision's on every device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cifar_hpc.trivial_tables import PIXELS, Operation

_LEVELS = 256


def blend(images: Tensor, operation: Operation, own: Tensor, other: Tensor) -> Tensor:
    """Brightness, Color, Contrast or Sharpness of uint8 [B, 3, 32, 32], by the weights float32 [B, 1, 1, 1].

    A sample whose weights are 1 and 0 stays as it is.
    """
    x = images.float()
    mixed = x * own
    if operation is not Operation.BRIGHTNESS:
        mixed += _BLENDED_WITH[operation](x) * other
    return mixed.clamp_(0, _LEVELS - 1).to(torch.uint8)


def _gray(x: Tensor) -> Tensor:
    """The luma, [B, 1, 32, 32], cut to whole levels."""
    red, green, blue = x.split(1, dim=1)
    return torch.floor(red * 0.2989 + green * 0.587 + blue * 0.114)


def _mean(x: Tensor) -> Tensor:
    # The sum of 1024 whole levels is exact in float32, in whatever order a device adds them.
    return _gray(x).mean(dim=(2, 3), keepdim=True)


def _blurred(x: Tensor) -> Tensor:
    """A pixel counts 5 times, its 8 neighbours once; the border stays."""
    rows = x[:, :, :-2] + x[:, :, 1:-1] + x[:, :, 2:]
    inner = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + x[:, :, 1:-1, 1:-1] * 4
    blurred = x.clone()
    # A whole number over 13 is never near the middle of two levels, so any device rounds to the same.
    blurred[:, :, 1:-1, 1:-1] = inner.div_(13).round_()
    return blurred


_BLENDED_WITH = {Operation.COLOR: _gray, Operation.CONTRAST: _mean, Operation.SHARPNESS: _blurred}


def solarize(images: Tensor, threshold: Tensor) -> Tensor:
    """Invert what is not below the threshold, int16 [B, 1, 1, 1]; 256 changes nothing."""
    return images ^ (images >= threshold).to(torch.uint8).mul_(_LEVELS - 1)


def auto_contrast(images: Tensor) -> Tensor:
    """Stretch each channel to 0 ... 255; one of a single level stays."""
    least, most = (extreme(dim=(2, 3), keepdim=True).float() for extreme in (images.amin, images.amax))
    flat = least == most
    # As torchvision: the reciprocal times 255, which is not the quotient.
    scale = (most - least).masked_fill_(flat, 1).reciprocal_().mul_(_LEVELS - 1).masked_fill_(flat, 1)
    return images.sub(least.masked_fill_(flat, 0)).mul_(scale).clamp_(0, _LEVELS - 1).to(torch.uint8)


def equalize(images: Tensor) -> Tensor:
    """Spread each channel's levels so that all are about equally often; whole numbers only."""
    channels = images.reshape(-1, PIXELS)
    below = _pixels_below(channels)
    # All pixels but those of the highest level that there is, over 255; torchvision lets a channel be where it is 0.
    step = below.gather(1, channels.amax(dim=1, keepdim=True).long()).div_(_LEVELS - 1, rounding_mode="floor")
    spread = (below + step // 2).div_(step.clamp(min=1), rounding_mode="floor").clamp_(max=_LEVELS - 1)
    levels = torch.arange(_LEVELS, device=images.device)
    return torch.where(step > 0, spread, levels).to(torch.uint8).gather(1, channels.long()).view(images.shape)


def _pixels_below(channels: Tensor) -> Tensor:
    """How many pixels of each channel, uint8 [N, 1024], are below each level, int64 [N, 256]."""
    count = len(channels)
    if channels.device.type == "cpu":
        own_bins = torch.arange(0, count * _LEVELS, _LEVELS, device=channels.device)[:, None] + channels
        histogram = torch.bincount(own_bins.flatten(), minlength=count * _LEVELS).view(count, _LEVELS)
        return histogram.cumsum(dim=1) - histogram
    return _places_when_sorted(channels)


def _places_when_sorted(channels: Tensor) -> Tensor:
    """`_pixels_below` without a histogram, which a GPU would add up by scattered writes and, for its size, wait for."""
    ranked = channels.sort(dim=1).values
    levels = torch.arange(_LEVELS, dtype=torch.uint8, device=channels.device)
    return torch.searchsorted(ranked, levels.expand(len(channels), _LEVELS).contiguous())

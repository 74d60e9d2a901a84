"""Crop, flip and rotation of a batch, as one lookup. Torchvision defines what each means."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from cifar_hpc.config.spec import IMAGE_SIZE, AugmentConfig
from cifar_hpc.data.augment.parameters import Parameters

_LAST = IMAGE_SIZE - 1
_HALF = IMAGE_SIZE / 2
PIXELS = IMAGE_SIZE * IMAGE_SIZE


class Moves(NamedTuple):
    """Sources of the pixels of B samples, as far as they are worth computing for a batch at once.

    Attributes:
        across, down: the two summands of each place, float64 (float32 without a rotation) [2, B, 1, 32] and
            [2, B, 32, 1]: rows, then columns, in pixels from the picture's centre.
        low, high: the places that show a pixel, float32 [2, B, 1, 1].
        scale, start: index of a pixel = sum of place * scale + start; float32 [2, B, 1, 1] and [1, B, 1, 1].
    """

    across: Tensor
    down: Tensor
    low: Tensor
    high: Tensor
    scale: Tensor
    start: Tensor


def moves(p: Parameters, config: AugmentConfig) -> Moves:
    """Compute the sources of each sample's pixels."""
    # From a place in the rotated picture back to the image: mirror, then shift. What lies outside the crop
    # window or outside the image is 0. Both are intervals of the place, so one clamp per axis finds it.
    shift = torch.stack([p.top, p.left]) - config.crop_padding
    mirror = p.flip.to(torch.int64)
    first, last = (-shift).clamp_(min=0), _LAST - shift.clamp(min=0)
    turned = mirror * (_LAST - last[1] - first[1])
    low, high = (torch.stack([side[0], side[1] + turned]) for side in (first, last))
    scale = torch.stack([torch.full_like(mirror, IMAGE_SIZE), 1 - 2 * mirror])
    start = mirror * _LAST + shift[1] + shift[0] * IMAGE_SIZE
    # float32 holds these small integers exactly.
    low, high, scale, start = (t.float()[:, :, None, None] for t in (low, high, scale, start[None]))
    return Moves(*_rotation(p.angle, torch.float64 if config.rotation > 0 else torch.float32), low, high, scale, start)


def _rotation(angle: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Summands of each place; see `_places`."""
    line = torch.arange(IMAGE_SIZE, dtype=torch.float32, device=angle.device) - (_HALF - 0.5)
    radians = angle.double() * (-math.pi / 180)
    cosine, sine = radians.cos().float()[:, None], radians.sin().float()[:, None]
    across = torch.stack([line * -sine, line * cosine]).to(dtype)
    down = line.to(dtype) * torch.stack([cosine, sine]).to(dtype)
    return across[:, :, None, :], down[:, :, :, None]


def _places(across: Tensor, down: Tensor, out: Tensor) -> Tensor:
    """Row and column that each pixel shows, float32 integers [2, B, 32, 32].

    Repeats the roundings of torchvision's _gen_affine_grid (a matrix product, which a CPU does with fused
    multiply-adds) and grid_sample, both without their scaling by 16, a power of two. The fused step is done
    as an exact product and a sum in float64: a matrix product would depend on the BLAS and on TF32 settings.
    """
    return torch.add(across, down, out=out).add_(_HALF).sub_(0.5).round_()


def move(images: Tensor, m: Moves, scratch: Tensor) -> Tensor:
    """uint8 [B, 3, 32, 32] to uint8 [B, 3, 1024], moved; `scratch` is float32 [4, B, 32, 32]."""
    batch = images.shape[0]
    place = _places(m.across, m.down, scratch[:2])
    # Not torch.clamp, which is not vectorised for limits that broadcast.
    inside = torch.maximum(place, m.low, out=scratch[2:])
    torch.minimum(inside, m.high, out=inside)
    # A conversion to bool, because a CPU takes several times as long for a comparison.
    outside = place.sub_(inside).to(torch.bool)
    keep = (outside[0] | outside[1]).logical_not_().view(torch.uint8)
    inside.mul_(m.scale)
    index = (inside[0] + inside[1]).add_(m.start[0]).to(torch.int64)
    index = index.view(batch, 1, PIXELS).expand(batch, 3, PIXELS)
    return images.reshape(batch, 3, PIXELS).gather(2, index).mul_(keep.view(batch, 1, PIXELS))


def geometry(images: Tensor, p: Parameters, config: AugmentConfig) -> Tensor:
    """Pad, crop, flip and rotate in one lookup; equal to torchvision's (tensors, nearest pixel, fill 0).

    Args:
        images: uint8 [B, 3, 32, 32].

    Returns:
        uint8 [B, 3, 32, 32]; `images` itself if the config moves nothing.
    """
    if not config.geometric:
        return images
    scratch = torch.empty(4, len(images), IMAGE_SIZE, IMAGE_SIZE, dtype=torch.float32, device=images.device)
    return move(images, moves(p, config), scratch).view(images.shape)

"""Augmentation parameters of each sample, drawn from uniform numbers that belong to that sample alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from cifar_hpc.config.spec import IMAGE_SIZE, AugmentConfig

# Columns of `draws`. Fixed, so that switching one step off changes no other.
_CROP, _FLIP, _ROTATION, _JITTER, _ORDER = slice(0, 2), 2, 3, slice(4, 8), slice(8, 12)
_ERASE, _AREA, _RATIO, _PLACE = 12, slice(13, 23), slice(23, 33), slice(33, 35)
DRAWS = 35  # uniform numbers that one sample takes
PIXELS = IMAGE_SIZE * IMAGE_SIZE


@dataclass(frozen=True)
class Parameters:
    """Augmentation parameters of B samples; tensors [B] on one device.

    Attributes:
        top, left: int64, origin of the crop in the padded image, pixels.
        flip: bool, whether to mirror left and right.
        angle: float32, degrees, counter-clockwise (as torchvision's rotate).
        brightness, contrast, saturation: float32 factors, 1 changes nothing.
        hue: float32, turns in [-0.5, 0.5].
        order: int64 [B, 4], the step at each turn: 0 brightness, 1 contrast, 2 saturation, 3 hue.
        box: int64 [B, 4], top, left, height and width of what is erased, pixels; height and width 0 erase nothing.
    """

    top: Tensor
    left: Tensor
    flip: Tensor
    angle: Tensor
    brightness: Tensor
    contrast: Tensor
    saturation: Tensor
    hue: Tensor
    order: Tensor
    box: Tensor


def sample_parameters(draws: Tensor, config: AugmentConfig) -> Parameters:
    """Turn uniform numbers into parameters.

    Args:
        draws: float32 [B, DRAWS] in [0, 1), from `randomness.uniform`.
        config: what to augment.
    """
    # floor(u * n) stays below n: u is at most 1 - 2**-24, and n * u does not round up to n in float32.
    crop = (draws[:, _CROP] * (2 * config.crop_padding + 1)).to(torch.int64)
    jitter = draws[:, _JITTER]
    return Parameters(
        top=crop[:, 0],
        left=crop[:, 1],
        flip=draws[:, _FLIP] < config.flip,
        angle=(draws[:, _ROTATION] * 2 - 1) * config.rotation,
        brightness=_between(jitter[:, 0], max(0.0, 1 - config.brightness), 1 + config.brightness),
        contrast=_between(jitter[:, 1], max(0.0, 1 - config.contrast), 1 + config.contrast),
        saturation=_between(jitter[:, 2], max(0.0, 1 - config.saturation), 1 + config.saturation),
        hue=_between(jitter[:, 3], -config.hue, config.hue),
        order=draws[:, _ORDER].argsort(dim=1, stable=True),
        box=_erase_boxes(draws, config),
    )


def check_images(images: Tensor) -> None:
    """Refuse images of another shape or type.

    Raises:
        ValueError: says what is expected.
    """
    if images.dtype != torch.uint8 or images.shape[1:] != (3, IMAGE_SIZE, IMAGE_SIZE):
        raise ValueError(f"images must be uint8 [B, 3, 32, 32], got {images.dtype} {list(images.shape)}")


def check_draws(draws: Tensor, images: Tensor, columns: int) -> None:
    """Refuse draws of another shape or type than float32 [len(images), columns].

    Raises:
        ValueError: says what is expected.
    """
    if draws.dtype != torch.float32 or draws.shape != (len(images), columns):
        raise ValueError(f"draws must be float32 [{len(images)}, {columns}], got {draws.dtype} {list(draws.shape)}")


def blends_before_hue(draws: Tensor, config: AugmentConfig) -> Tensor:
    """Count the blends (brightness, contrast, saturation) of each sample before hue, int64 [B]; 0 without hue.

    For a CPU: a GPU would wait for a copy from the host.
    """
    sizes = (config.brightness, config.contrast, config.saturation)
    on = torch.tensor([size > 0 and config.hue > 0 for size in sizes], device=draws.device)
    order = draws[:, _ORDER]
    return ((order[:, :3] <= order[:, 3:]) & on).sum(dim=1)  # <=: sample_parameters sorts stably


def _between(draw: Tensor, low: float, high: float) -> Tensor:
    return draw * (high - low) + low


def _erase_boxes(draws: Tensor, config: AugmentConfig) -> Tensor:
    """Boxes as RandomErasing.get_params makes them: the first of ten proposals that fits, or none."""
    if config.erasing == 0:
        return torch.zeros(len(draws), 4, dtype=torch.int64, device=draws.device)
    # float64, so that exp and sqrt of another device round to the same whole pixels.
    area = _between(draws[:, _AREA].double(), *config.erasing_scale) * IMAGE_SIZE**2
    low, high = (math.log(ratio) for ratio in config.erasing_ratio)
    ratio = _between(draws[:, _RATIO].double(), low, high).exp()
    heights, widths = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
    fits = (heights < IMAGE_SIZE) & (widths < IMAGE_SIZE)
    first = fits.to(torch.int32).argmax(dim=1, keepdim=True)
    erase = fits.gather(1, first) & (draws[:, _ERASE, None] < config.erasing)
    size = torch.cat([heights.gather(1, first), widths.gather(1, first)], dim=1) * erase
    place = draws[:, _PLACE].double() * (IMAGE_SIZE + 1 - size)
    return torch.cat([place, size], dim=1).to(torch.int64)

"""Mixup, CutMix and progressive resizing of a batch.

Each sample is mixed with another one of the batch, and its label with that one's. Sources: Zhang et al., "mixup: Beyond
Empirical Risk Minimization", ICLR 2018 (arXiv:1710.09412); Yun et al., "CutMix: Regularization Strategy to Train Strong
Classifiers with Localizable Features", ICCV 2019 (arXiv:1905.04899), with the boxes of its authors' code. The papers
draw once for a batch; here each sample has its own share, box and choice. All of it is a pure function of the batch
and its draws, and nothing waits for the device."""

from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cifar_hpc.config.spec import MixingConfig

_KNOTS = 4097


def symmetric_beta(uniform: Tensor, alpha: float) -> Tensor:
    """The quantiles of Beta(alpha, alpha): a pure function of each number, without waiting for the device.

    Args:
        uniform: float32 [B] in [0, 1), on any device.
        alpha: above 0, at most 100.

    Returns:
        float32 [B] in [0, 1]: `uniform` itself for alpha 1, else within 1e-6 of the exact quantile.
    """
    if alpha == 1:
        return uniform
    scaled, quantile = _table(alpha, uniform.device)
    u = uniform.double()
    # The lower half of the distribution serves both.
    place = (2 * torch.minimum(u, 1 - u)).pow_(1 / alpha)
    upper = torch.searchsorted(scaled, place).clamp_(1, _KNOTS - 1)
    left, right = scaled.index_select(0, upper - 1), scaled.index_select(0, upper)
    low, high = quantile.index_select(0, upper - 1), quantile.index_select(0, upper)
    lower_half = low + (place - left) / (right - left) * (high - low)
    return torch.where(u < 0.5, lower_half, 1 - lower_half).float()


@lru_cache(maxsize=16)
def _table(alpha: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Knots (2 F(x)) ** (1 / alpha) and x in [0, 0.5], float64 [4097] each; F is the distribution function.

    At small x, F is like x ** alpha, which no line follows. Its root of that degree is smooth, in whatever alpha, so
    lines between the knots do: F(x) = c (x (1 - x)) ** alpha (1 + T(x)), with the constant c by F(0.5) = 0.5 and
    T(x) = sum over k > 0 of (2 alpha)_k / (alpha + 1)_k x ** k (DLMF 8.17.8), all of whose terms are positive.
    """
    x = torch.linspace(0, 0.5, _KNOTS, dtype=torch.float64, device="cpu")
    term, total, k = torch.ones_like(x), torch.zeros_like(x), 0
    while float(term[-1]) > 1e-17 * float(total[-1]):
        term = term * x * ((2 * alpha + k) / (alpha + 1 + k))
        total, k = total + term, k + 1
    logarithm = total.log1p()
    scaled = 4 * x * (1 - x) * ((logarithm - logarithm[-1]) / alpha).exp()
    return scaled.to(device, non_blocking=True), x.to(device, non_blocking=True)


# Columns of `draws`. Fixed, so that switching one method off changes no other.
_ORDER, _MIXED, _METHOD, _SHARE, _PLACE = 0, 1, 2, 3, slice(4, 6)
MIXING_DRAWS = 6  # uniform numbers that one sample takes


class Mixed(NamedTuple):
    """A batch of B mixed samples.

    Attributes:
        images: [B, 3, S, S].
        labels: int64 [B], each sample's own.
        other_labels: int64 [B], of the sample that it is mixed with.
        weight: float32 [B] in [0, 1], the share of the own label; 1 for a sample that is not mixed.
    """

    images: Tensor
    labels: Tensor
    other_labels: Tensor
    weight: Tensor


def mix_batch(images: Tensor, labels: Tensor, draws: Tensor, config: MixingConfig) -> Mixed:
    """Mix the samples of a batch with one another.

    Args:
        images: float [B, 3, S, S], augmented and normalised; their type and memory format are kept.
        labels: int64 [B] on the same device.
        draws: float32 [B, MIXING_DRAWS] in [0, 1) on the same device, from `randomness.uniform`.
        config: what to do. If it is off, or the batch has a single sample, the images are returned as they are.
    """
    if not config.on or len(images) < 2:
        return Mixed(images, labels, labels, torch.ones(len(images), dtype=torch.float32, device=images.device))
    partner = partners(draws)
    pixels, weight = sample_shares(draws, config, images.shape[3])
    # In float32 also for narrower images. The memory format is that of the first operand.
    mixed = images * pixels + images.index_select(0, partner) * (1 - pixels)
    return Mixed(mixed.to(images.dtype), labels, labels.index_select(0, partner), weight)


def partners(draws: Tensor) -> Tensor:
    """Whom each sample is mixed with, int64 [B]: the next one in a random cyclic order, so each serves once."""
    order = draws[:, _ORDER].argsort(stable=True)
    place = order.argsort()  # the inverse permutation
    return order.roll(-1).index_select(0, place)


def sample_shares(draws: Tensor, config: MixingConfig, size: int) -> tuple[Tensor, Tensor]:
    """Turn uniform numbers into the share of each image, of S x S pixels, that stays, for a config that is on.

    Returns:
        Of each pixel, float32 [B, 1, S, S], 0 or 1 under CutMix; [B, 1, 1, 1] without CutMix. And float32 [B], their
        mean.
    """
    mixed = draws[:, _MIXED] < config.probability
    weight = torch.ones_like(draws[:, _SHARE])
    if config.mixup > 0:
        weight = torch.where(mixed, symmetric_beta(draws[:, _SHARE], config.mixup), weight)
    pixels = weight[:, None, None, None]
    if config.cutmix > 0:
        boxed = mixed & (draws[:, _METHOD] < (0.5 if config.mixup > 0 else 1.0))
        outside = outside_boxes(symmetric_beta(draws[:, _SHARE], config.cutmix), draws[:, _PLACE], size)
        weight = torch.where(boxed, outside.mean(dim=(1, 2, 3)), weight)
        pixels = torch.where(boxed[:, None, None, None], outside, pixels)
    return pixels, weight


def outside_boxes(share: Tensor, place: Tensor, size: int) -> Tensor:
    """CutMix's boxes, clipped at the border: float32 [B, 1, S, S], 0 inside and 1 outside.

    Args:
        share: float32 [B], the area outside a box that nothing clips.
        place: float32 [B, 2] in [0, 1), row and column of the centre, in heights and widths of the image.
        size: height and width of the image, in pixels.
    """
    # float64, so that the root on another device rounds down to the same whole pixels.
    half = ((1 - share.double()).sqrt() * size).floor().div(2, rounding_mode="floor")[:, None]
    centre = (place.double() * size).floor()
    line = torch.arange(size, device=share.device)
    first, end = (centre - half)[:, :, None], (centre + half)[:, :, None]
    rows, columns = ((line >= first) & (line < end)).unbind(dim=1)
    return (rows[:, None, :, None] & columns[:, None, None, :]).logical_not().float()


def mixed_loss(logits: Tensor, mixed: Mixed, label_smoothing: float = 0.0) -> Tensor:
    """Summed cross-entropy with both labels by their shares, in float32; that of the soft labels.

    Args:
        logits: [B, classes].
    """
    own, other = (
        F.cross_entropy(logits.float(), labels, label_smoothing=label_smoothing, reduction="none")
        for labels in (mixed.labels, mixed.other_labels)
    )
    return (mixed.weight * own + (1 - mixed.weight) * other).sum()


def mixed_correct(logits: Tensor, mixed: Mixed) -> Tensor:
    """Summed share of the label that has the largest logit, float64."""
    chosen, weight = logits.argmax(dim=1), mixed.weight.double()
    return (weight * (chosen == mixed.labels) + (1 - weight) * (chosen == mixed.other_labels)).sum()


def resize(images: Tensor, size: int) -> Tensor:
    """Scale images down, each one alone, with the linear filter and antialiasing.

    Args:
        images: float [B, 3, S, S].
        size: height and width of the result, in pixels.

    Returns:
        [B, 3, size, size], channels_last; `images` itself where that is their size.
    """
    if size == images.shape[-1]:
        return images
    small = F.interpolate(images, size=(size, size), mode="bilinear", antialias=True)
    return small.contiguous(memory_format=torch.channels_last)

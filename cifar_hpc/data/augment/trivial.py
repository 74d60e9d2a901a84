"""TrivialAugmentWide, batched on the device: one operation a sample, with one of 31 magnitudes.

Source: Müller, Hutter, "TrivialAugment: Tuning-free Yet State-of-the-Art Data Augmentation", ICCV 2021
(arXiv:2103.10158). Torchvision defines the operations and their defaults; the results here are equal to the bit, from
draws that belong to the sample alone: each operation on colours is one multiplication, addition or comparison at a
time, of numbers that torchvision has, too, or exact in whole numbers. Nothing waits for the device, except that the
first call on one copies the tables there (0.8 MB for 32x32 pixels). On a CPU, which has nothing to wait for, the
samples are sorted by operation; the bits are the same."""

import math
from enum import IntEnum
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from cifar_hpc.data.augment.kernels import centred, exact_mean, pixels_

_LEVELS = 256
BINS = 31  # magnitudes that an operation has
LARGEST_TABLE = 181  # pixels in height and width, of which int16 can number each


class Operation(IntEnum):
    """The 14 operations, in torchvision's order: first what moves pixels, then what blends, then the rest."""

    IDENTITY, SHEAR_X, SHEAR_Y, TRANSLATE_X, TRANSLATE_Y, ROTATE = range(6)
    BRIGHTNESS, COLOR, CONTRAST, SHARPNESS = range(6, 10)
    POSTERIZE, SOLARIZE, AUTO_CONTRAST, EQUALIZE = range(10, 14)


LAST_MOVE = Operation.ROTATE
IDENTITY_CASE = 0
_LARGEST = dict.fromkeys(Operation, 0.0) | dict.fromkeys(list(Operation)[Operation.SHEAR_X : Operation.POSTERIZE], 0.99)
_LARGEST |= {Operation.TRANSLATE_X: 32.0, Operation.TRANSLATE_Y: 32.0, Operation.ROTATE: 135.0}


class Tables(NamedTuple):
    """Tables of all cases, one row a case; a row is neutral where the operation has no such value.

    A case is an operation, one of 31 magnitude bins and a sign: 868 of them, so that all that needs a tangent or a
    division is worked out once, on the host, and a batch looks it up. Torchvision 0.27 defines the magnitudes and
    what each operation does to a tensor (TrivialAugmentWide with its defaults: nearest pixel, fill 0); the tests
    compare every case with it.

    Attributes:
        source: int16 [372, S * S], the pixel that each pixel shows, or S * S where that has none; for the operations up
            to ROTATE. Of images above LARGEST_TABLE, float32 [372, 6], what `_sources` computes it from.
        own, other: float32 [868], weights of the image and of what it is blended with.
        mask: uint8 [868], the bits that stay.
        threshold: int16 [868], the least value that is inverted.
    """

    source: Tensor
    own: Tensor
    other: Tensor
    mask: Tensor
    threshold: Tensor


def magnitudes(operation: Operation) -> list[float]:
    """The 31 magnitudes of an operation, without their sign; zeros where it has none."""
    if operation is Operation.POSTERIZE:
        return [8.0 - round(n * 6 / (BINS - 1)) for n in range(BINS)]
    first = 255.0 if operation is Operation.SOLARIZE else 0.0
    # Rounded to float32, as torchvision's are.
    return torch.linspace(first, _LARGEST[operation], BINS, dtype=torch.float32, device="cpu").tolist()


@lru_cache(maxsize=8)
def tables(size: int, device: torch.device) -> Tables:
    """The tables for images of S x S pixels on a device, made and copied there at the first call."""
    cases = [
        (operation, sign * magnitude)
        for operation in Operation
        for sign in (1.0, -1.0)
        for magnitude in magnitudes(operation)
    ]
    factors = [1.0 + m if Operation.BRIGHTNESS <= op <= Operation.SHARPNESS else 1.0 for op, m in cases]
    masks = [256 - 2 ** (8 - int(abs(m))) if op is Operation.POSTERIZE else 255 for op, m in cases]
    thresholds = [math.ceil(abs(m)) if op is Operation.SOLARIZE else 256 for op, m in cases]
    moves = [_matrix(op, m, size) for op, m in cases if op <= LAST_MOVE]
    matrices = torch.tensor(moves, dtype=torch.float32, device="cpu")
    if size <= LARGEST_TABLE:
        matrices = torch.cat([_sources(some, size).to(torch.int16) for some in matrices.split(BINS)])
    made = Tables(
        source=matrices,
        own=torch.tensor(factors, dtype=torch.float32, device="cpu"),
        other=torch.tensor([1.0 - factor for factor in factors], dtype=torch.float32, device="cpu"),
        mask=torch.tensor(masks, dtype=torch.uint8, device="cpu"),
        threshold=torch.tensor(thresholds, dtype=torch.int16, device="cpu"),
    )
    return Tables(*(table.to(device, non_blocking=True) for table in made))


def _matrix(operation: Operation, magnitude: float, size: int) -> list[float]:
    """Inverse affine map: column = a x + b y + c, row = d x + e y + f, from the picture's centre.

    As torchvision's _get_inverse_affine_matrix, for what TrivialAugment asks of it: shears are about the upper
    left corner and take an angle, in degrees, and shifts are whole pixels.
    """
    shear = math.tan(math.radians(math.degrees(math.atan(magnitude))))
    half = size / 2
    moved = half + shear * half - half
    turn = math.radians(-magnitude)
    cosine, sine = math.cos(turn), math.sin(turn)
    return {
        Operation.SHEAR_X: [1.0, shear, moved, 0.0, 1.0, 0.0],
        Operation.SHEAR_Y: [1.0, 0.0, 0.0, shear, 1.0, moved],
        Operation.TRANSLATE_X: [1.0, 0.0, -float(int(magnitude)), 0.0, 1.0, 0.0],
        Operation.TRANSLATE_Y: [1.0, 0.0, 0.0, 0.0, 1.0, -float(int(magnitude))],
        Operation.ROTATE: [cosine, sine, 0.0, -sine, cosine, 0.0],
    }.get(operation, [1.0, 0.0, 0.0, 0.0, 1.0, 0.0])


def _sources(matrices: Tensor, size: int) -> Tensor:
    """The pixel that each pixel shows, or size * size where that has none; int64 [B, size * size].

    Repeats torchvision's roundings as far as `kernels.move` does.

    Args:
        matrices: float32 [B, 6], as `_matrix` makes them.
    """
    line = centred(size, matrices.device)
    down, weights = line.double()[:, None], matrices[:, :, None, None]
    places = [
        (line * weights[:, n] + down * weights[:, n + 1].double()).float().add_(weights[:, n + 2]) for n in (0, 3)
    ]
    column, row = (pixels_(place, size) for place in places)
    inside = (column >= 0) & (column < size) & (row >= 0) & (row < size)
    return torch.where(inside, row * size + column, size * size).flatten(1).to(torch.int64)


def blend(images: Tensor, operation: Operation, own: Tensor, other: Tensor) -> Tensor:
    """Brightness, Color, Contrast or Sharpness of uint8 [B, 3, S, S], by the weights float32 [B, 1, 1, 1].

    A sample whose weights are 1 and 0 stays as it is.
    """
    x = images.float()
    mixed = x * own
    if operation is not Operation.BRIGHTNESS:
        mixed += _BLENDED_WITH[operation](x) * other
    return mixed.clamp_(0, _LEVELS - 1).to(torch.uint8)


def _gray(x: Tensor) -> Tensor:
    """The luma, [B, 1, S, S], cut to whole levels."""
    red, green, blue = x.split(1, dim=1)
    return torch.floor(red * 0.2989 + green * 0.587 + blue * 0.114)


def _mean(x: Tensor) -> Tensor:
    return exact_mean(_gray(x).flatten(2))[..., None]


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
    channels = images.flatten(2).flatten(0, 1)
    below = _pixels_below(channels)
    # All pixels but those of the highest level that there is, over 255; torchvision lets a channel be where it is 0.
    step = below.gather(1, channels.amax(dim=1, keepdim=True).long()).div_(_LEVELS - 1, rounding_mode="floor")
    spread = (below + step // 2).div_(step.clamp(min=1), rounding_mode="floor").clamp_(max=_LEVELS - 1)
    levels = torch.arange(_LEVELS, device=images.device)
    return torch.where(step > 0, spread, levels).to(torch.uint8).gather(1, channels.long()).view(images.shape)


def _pixels_below(channels: Tensor) -> Tensor:
    """Count the pixels of each channel, uint8 [N, S * S], below each level; int64 [N, 256]."""
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


_OPERATION, _BIN, _SIGN = range(3)  # columns of `draws`
TRIVIAL_DRAWS = 3  # uniform numbers that one sample takes


class Choices(NamedTuple):
    """Operation of each of B samples; tensors [B] on one device.

    Attributes:
        operation: int64, an Operation.
        magnitude_bin: int64, 0 to 30; 0 for an operation without magnitudes.
        negative: bool, whether the magnitude counts as negative; False for an operation without a sign.
    """

    operation: Tensor
    magnitude_bin: Tensor
    negative: Tensor


def sample_choices(draws: Tensor) -> Choices:
    """Turn uniform numbers into choices, each value as likely as any other.

    Args:
        draws: float32 [B, TRIVIAL_DRAWS] in [0, 1), from `randomness.uniform`.
    """
    # floor(u * n) stays below n: u is at most 1 - 2**-24, and n * u does not round up to n in float32.
    operation = (draws[:, _OPERATION] * len(Operation)).to(torch.int64)
    has_bins = (operation >= Operation.SHEAR_X) & (operation <= Operation.SOLARIZE)
    return Choices(
        operation=operation,
        magnitude_bin=(draws[:, _BIN] * BINS).to(torch.int64) * has_bins,
        negative=(draws[:, _SIGN] < 0.5) & has_bins & (operation <= Operation.SHARPNESS),
    )


def trivial_augment(images: Tensor, draws: Tensor) -> Tensor:
    """Augment a batch.

    Args:
        images: uint8 [B, 3, S, S], on any device.
        draws: float32 [B, TRIVIAL_DRAWS] in [0, 1) on the same device.

    Returns:
        uint8 [B, 3, S, S], a new tensor; each sample depends on its own image and draws only.
    """
    return apply_choices(images, sample_choices(draws))


def apply_choices(images: Tensor, choices: Choices) -> Tensor:
    """`trivial_augment` with given choices."""
    # What moves pixels is one step, whichever operation it is.
    step = choices.operation.clamp(min=LAST_MOVE)
    case = (choices.operation * 2 + choices.negative.to(torch.int64)) * BINS + choices.magnitude_bin  # its row
    if images.device.type == "cpu" and not torch.compiler.is_compiling():
        return _sorted_by_step(images, step, case)
    return _all_at_once(images, step, case)


_STEPS = list(Operation)[LAST_MOVE:]


def _all_at_once(images: Tensor, step: Tensor, case: Tensor) -> Tensor:
    """Every step on every sample; only a sample's own changes it."""
    known = tables(images.shape[3], images.device)
    for each in _STEPS:
        own = step == each
        changed = _take_step(images, each, torch.where(own, case, IDENTITY_CASE), known)
        if each in (Operation.AUTO_CONTRAST, Operation.EQUALIZE):
            changed = torch.where(own[:, None, None, None], changed, images)
        images = changed
    return images


def _sorted_by_step(images: Tensor, step: Tensor, case: Tensor) -> Tensor:
    """Each step on the samples that chose it. Reads values of `step`."""
    known = tables(images.shape[3], images.device)
    order = step.argsort(stable=True)
    sizes = torch.bincount(step, minlength=len(Operation))[LAST_MOVE:].tolist()
    out = torch.empty(images.shape, dtype=torch.uint8, device=images.device)
    parts = (t.split(sizes) for t in (order, images.index_select(0, order), case.index_select(0, order)))
    for each, rows, pixels, chosen in zip(_STEPS, *parts, strict=True):
        if len(rows) > 0:
            out.index_copy_(0, rows, _take_step(pixels, each, chosen, known))
    return out


def _take_step(images: Tensor, step: Operation, case: Tensor, known: Tables) -> Tensor:
    """A step on every sample, as its case says, which is the step's own or IDENTITY_CASE.

    AutoContrast and Equalize, which have no values, change every sample.
    """

    def of_case(table: Tensor) -> Tensor:
        return table.index_select(0, case)[:, None, None, None]

    if step <= LAST_MOVE:
        return _move(images, known.source.index_select(0, case))
    if step <= Operation.SHARPNESS:
        return blend(images, step, of_case(known.own), of_case(known.other))
    if step is Operation.POSTERIZE:
        return images & of_case(known.mask)
    if step is Operation.SOLARIZE:
        return solarize(images, of_case(known.threshold))
    return auto_contrast(images) if step is Operation.AUTO_CONTRAST else equalize(images)


def _move(images: Tensor, source: Tensor) -> Tensor:
    """Each pixel from its source, a row of Tables.source for each sample."""
    size = images.shape[3]
    source = source.to(torch.int64) if size <= LARGEST_TABLE else _sources(source, size)
    pixels = torch.nn.functional.pad(images.flatten(2), (0, 1))  # and a black one, for those that have no source
    index = source[:, None].expand(-1, 3, -1)
    return pixels.gather(2, index).view(images.shape)

"""The steps of the augmentation: crop, flip and rotation in one lookup, colours, normalisation, erasing.

Torchvision defines what each means. `sample_parameters` computes each sample's parameters from uniform numbers that
belong to that sample alone. `make_plan` computes what is worth computing for a batch at once; the kernels then work on
all of its samples or on a part of them.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from cifar_hpc.config.spec import AugmentConfig
from cifar_hpc.data.info import DatasetInfo

LUMA = (0.2989, 0.587, 0.114)  # torchvision.transforms.functional.rgb_to_grayscale
# In steps of 2**-14 the sum of 1024 pixels stays within 2**24, so float32 adds them exactly, in whatever order a
# device sums. The mean moves by at most 2**-15, the result by a fifth of that.
_STEPS = 2.0**14
_EXACTLY_ADDED = 1024  # pixels; also the largest data.image_size
# Columns of `draws`. Fixed, so that switching one step off changes no other.
_CROP, _FLIP, _ROTATION, _JITTER, _ORDER = slice(0, 2), 2, 3, slice(4, 8), slice(8, 12)
_ERASE, _AREA, _RATIO, _PLACE = 12, slice(13, 23), slice(23, 33), slice(33, 35)
DRAWS = 35  # uniform numbers that one sample takes


class Parameters(NamedTuple):
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


def sample_parameters(draws: Tensor, config: AugmentConfig, size: int) -> Parameters:
    """Turn uniform numbers into parameters.

    Args:
        draws: float32 [B, DRAWS] in [0, 1), from `randomness.uniform`.
        config: what to augment.
        size: height and width of the images, in pixels.
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
        box=_erase_boxes(draws, config, size),
    )


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


def _erase_boxes(draws: Tensor, config: AugmentConfig, size: int) -> Tensor:
    """Boxes as RandomErasing.get_params makes them: the first of ten proposals that fits, or none."""
    if config.erasing == 0:
        return torch.zeros(len(draws), 4, dtype=torch.int64, device=draws.device)
    # float64, so that exp and sqrt of another device round to the same whole pixels.
    area = _between(draws[:, _AREA].double(), *config.erasing_scale) * size**2
    low, high = (math.log(ratio) for ratio in config.erasing_ratio)
    ratio = _between(draws[:, _RATIO].double(), low, high).exp()
    heights, widths = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
    fits = (heights < size) & (widths < size)
    first = fits.to(torch.int32).argmax(dim=1, keepdim=True)
    erase = fits.gather(1, first) & (draws[:, _ERASE, None] < config.erasing)
    sides = torch.cat([heights.gather(1, first), widths.gather(1, first)], dim=1) * erase
    place = draws[:, _PLACE].double() * (size + 1 - sides)
    return torch.cat([place, sides], dim=1).to(torch.int64)


class Plan(NamedTuple):
    """The inputs of the kernels for B samples of S x S pixels; they are the second dimension of every tensor.

    Attributes:
        across, down: the two summands of each pixel's source, float64 (float32 without a rotation) [2, B, 1, S] and
            [2, B, S, 1]: rows, then columns, in pixels from the picture's centre.
        low, high: the sources that show a pixel, float32 [2, B, 1, 1].
        scale, start: index of a pixel = sum of source * scale + start; float32 [2, B, 1, 1] and [1, B, 1, 1].
        image, luma, mean: weights of the image, its luma and the luma's mean at each of T turns, float32 [T, B, 1, 1].
        hue: float32 [1, B, 1, 1], turns of the circle.
        rows, columns: 0 in those of the box to erase, else -1; int32 [1, B, S, 1] and [1, B, 1, S].
    """

    across: Tensor
    down: Tensor
    low: Tensor
    high: Tensor
    scale: Tensor
    start: Tensor
    image: Tensor
    luma: Tensor
    mean: Tensor
    hue: Tensor
    rows: Tensor
    columns: Tensor


def make_plan(p: Parameters, config: AugmentConfig, size: int, sorted_by_hue: bool) -> Plan:
    """Compute the inputs of the kernels.

    Args:
        size: height and width of the images, in pixels.
        sorted_by_hue: count no turn for a sample that has no blend at it.
    """
    blends, hue = _blends(p, config, sorted_by_hue), p.hue[None, :, None, None]
    return Plan(*_sources(p, config, size), *blends, hue, *_boxes(p, size))


class Channels(NamedTuple):
    """Constants of red, green and blue, float32 [3, 1] on the device; made once for a batch.

    Attributes:
        luma: weights of the luma, in steps of 2**-14.
        hue: turns that put each channel's opposite hue at a whole number of turns and a half.
        mean, deviation: the data set's.
    """

    luma: Tensor
    hue: Tensor
    mean: Tensor
    deviation: Tensor


def channels(device: torch.device, info: DatasetInfo) -> Channels:
    """The constants, filled on that device: torch.tensor(...) would wait for a copy from the host."""
    values = ([weight * _STEPS for weight in LUMA], [2, 2 - 1 / 3, 2 - 2 / 3], info.mean, info.std)
    filled = ([torch.full((1,), value, dtype=torch.float32, device=device) for value in three] for three in values)
    return Channels(*map(torch.stack, filled))


def centred(size: int, device: torch.device) -> Tensor:
    """The places of a row's pixels from its middle, float32 [size]."""
    return torch.arange(size, dtype=torch.float32, device=device) - (size / 2 - 0.5)


def pixels_(place: Tensor, size: int) -> Tensor:
    """Turn float32 places from the picture's centre into whole pixels, in place."""
    return place.add_(size / 2).sub_(0.5).round_()


def _sources(p: Parameters, config: AugmentConfig, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    # From a place in the rotated picture back to the image: mirror, then shift. What lies outside the crop
    # window or outside the image is 0. Both are intervals of the place, so one clamp per axis finds it.
    shift = torch.stack([p.top, p.left]) - config.crop_padding
    mirror = p.flip.to(torch.int64)
    first, last = (-shift).clamp_(min=0), size - 1 - shift.clamp(min=0)
    turned = mirror * (size - 1 - last[1] - first[1])
    low, high = (torch.stack([side[0], side[1] + turned]) for side in (first, last))
    scale = torch.stack([torch.full_like(mirror, size), 1 - 2 * mirror])
    start = mirror * (size - 1) + shift[1] + shift[0] * size
    dtype = torch.float64 if config.rotation > 0 else torch.float32
    line = centred(size, p.angle.device)
    radians = p.angle.double() * (-math.pi / 180)
    cosine, sine = radians.cos().float()[:, None], radians.sin().float()[:, None]
    across = torch.stack([line * -sine, line * cosine]).to(dtype)
    down = line.to(dtype) * torch.stack([cosine, sine]).to(dtype)
    # float32 holds these small integers exactly.
    low, high, scale, start = (t.float()[:, :, None, None] for t in (low, high, scale, start[None]))
    return across[:, :, None, :], down[:, :, :, None], low, high, scale, start


def move(images: Tensor, plan: Plan, scratch: Tensor) -> Tensor:
    """Pad, crop, flip and rotate in one lookup; equal to torchvision's (tensors, nearest pixel, fill 0).

    Repeats the roundings of torchvision's _gen_affine_grid (a matrix product, which most CPUs do with fused
    multiply-adds) and grid_sample, but for their scaling by half a picture. The fused step is done as an exact
    product and a sum in float64. Where a source is in the middle between two pixels but for float32's roundings,
    torchvision's choice depends on the size, the BLAS and TF32 settings; this one on nothing.

    Args:
        images: uint8 [B, 3, S, S].
        scratch: float32 [4, B, S, S].

    Returns:
        uint8 [B, 3, S * S].
    """
    batch, size = images.shape[0], images.shape[3]
    pixels = size * size
    place = pixels_(torch.add(plan.across, plan.down, out=scratch[:2]), size)
    # Not torch.clamp, which is not vectorised for limits that broadcast.
    inside = torch.maximum(place, plan.low, out=scratch[2:])
    torch.minimum(inside, plan.high, out=inside)
    # A conversion to bool, because a CPU takes several times as long for a comparison.
    outside = place.sub_(inside).to(torch.bool)
    keep = (outside[0] | outside[1]).logical_not_().view(torch.uint8)
    inside.mul_(plan.scale)
    index = (inside[0] + inside[1]).add_(plan.start[0]).to(torch.int64)
    index = index.view(batch, 1, pixels).expand(batch, 3, pixels)
    return images.reshape(batch, 3, pixels).gather(2, index).mul_(keep.view(batch, 1, pixels))


def _blends(p: Parameters, config: AugmentConfig, sorted_by_hue: bool) -> tuple[Tensor, Tensor, Tensor]:
    sizes = (config.brightness, config.contrast, config.saturation)
    factors = (p.brightness, p.contrast, p.saturation)
    columns = [column for column, size in enumerate(sizes) if size > 0]
    if not columns:
        nothing = p.hue.new_empty(0, p.hue.shape[0], 1, 1)
        return nothing, nothing, nothing
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
    return image[:, :, None, None], luma[:, :, None, None], mean[:, :, None, None]


def jitter_(x: Tensor, scratch: Tensor, plan: Plan, before: int, constants: Channels, config: AugmentConfig) -> None:
    """Change brightness, contrast, saturation and hue of x, float32 [B, 3, P] in [0, 1], in place.

    As ColorJitter on floats, in each sample's own order. The first three are all
    `clamp(factor * image + (1 - factor) * other)`, with nothing, the mean of the luma, or the luma as the other. So hue
    is done once for all samples, and up to three such blends before and after it, where a sample that has no blend at
    some turn takes factor 1. Samples with as many blends before hue as one another take no more turns than there are
    blends. The result is within 1e-5 of torchvision's, for factors in [0.8, 1.2].

    Args:
        scratch: float32 [4, B, 1, P], reused by every step: less memory to fetch than a new tensor for each.
            Each of its planes is contiguous, because torch.compile refuses `out=` otherwise.
        before: how many turns come before hue.
    """
    turns = list(zip(plan.image.unbind(), plan.luma.unbind(), plan.mean.unbind(), strict=True))
    products, plane = scratch[:3].view(x.shape), scratch[3]
    for turn in turns[:before]:
        _blend_(x, products, plane, turn, constants.luma, config)
    if config.hue > 0:
        _shift_hue_(x, scratch, plan.hue[0], constants.hue)
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
            average = exact_mean(torch.round(gray, out=plane))
            gray.mul_(luma).add_(average.mul_(mean))
        else:
            gray.mul_(luma)
        x.mul_(image).add_(gray)
    else:
        x.mul_(image)
    x.clamp_(0, 1)


def exact_mean(whole: Tensor) -> Tensor:
    """The mean [B, 1, 1] of float32 [B, 1, P], whole numbers up to 2**14: the same bits in whatever order of adding."""
    pixels = whole.shape[2]
    if pixels <= _EXACTLY_ADDED:
        return whole.mean(dim=2, keepdim=True)
    side = math.isqrt(pixels)
    rows = whole.view(-1, 1, side, side).sum(dim=3)
    return rows.sum(dim=2, keepdim=True, dtype=torch.float64).div_(pixels).float()


def _shift_hue_(x: Tensor, scratch: Tensor, shift: Tensor, channel: Tensor) -> None:
    """Turn the hue of x [B, 3, P] by `shift` [B, 1, 1] turns without leaving RGB.

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


def unit_(x: Tensor, images: Tensor) -> Tensor:
    """Write uint8 images into x, float32 [B, 3, P] in [0, 1], as torchvision's ToTensor; returns x."""
    # CUDA would divide by a Python number through its reciprocal; a tensor gives the CPU's bits.
    return x.copy_(images.reshape(x.shape)).div_(torch.full((1,), 255.0, dtype=torch.float32, device=x.device))


def normalize_(x: Tensor, constants: Channels) -> Tensor:
    """Subtract the data set's mean and divide by its deviation, in place; returns x."""
    return x.sub_(constants.mean).div_(constants.deviation)


def _boxes(p: Parameters, size: int) -> tuple[Tensor, Tensor]:
    line = torch.arange(size, device=p.box.device)
    top, left, height, width = p.box[:, :, None].unbind(dim=1)
    rows, columns = (line >= top) & (line < top + height), (line >= left) & (line < left + width)
    return rows.to(torch.int32).sub_(1)[None, :, :, None], columns.to(torch.int32).sub_(1)[None, :, None, :]


def erase_(x: Tensor, plan: Plan) -> None:
    """Set each sample's box in x, float32 [B, 3, P], to 0, in place."""
    # All bits of a pixel or none: a product would need a second step, for the -0 of a negative pixel times 0.
    x.view(torch.int32).bitwise_and_((plan.rows[0] | plan.columns[0]).view(-1, 1, x.shape[2]))

"""Pictures that need no download: 10 classes of shapes and textures, 32x32, drawn from integers.

For demos, tests and machines without CIFAR-10. The classes stay apart under the project's augmentation (a
flip, 15 degrees, a shift by 4 pixels, other colours), and colour tells nothing about them: foreground and
background are drawn alike for every class, so a model has to look at shapes.

All arithmetic is on integers, so the pictures are the same bytes on every machine, with any number of
threads.
"""

import torch
from torch import Tensor

from cifar_hpc.data.info import SYNTHETIC as CLASSES
from cifar_hpc.randomness import Stream, mix, permutation, uniform

_SIZE = 32
_ONE = 1024  # fixed point: units of one pixel
_CHUNK = 1024  # images drawn at a time; bounds memory, and each image depends on its own index only
# Columns of the draws of an image.
_BACK, _STEP, _SIGN = 0, 3, 6  # three each
_X, _Y, _RADIUS, _ANGLE, _PHASE_X, _PHASE_Y, _FRACTION = range(9, 16)
_DRAWS = 16


def make_synthetic(train_size: int, test_size: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draw a training and a test set.

    Args:
        train_size, test_size: how many images; classes are equal in number to within one, in shuffled order.
        seed: another seed gives other pictures in another order.

    Returns:
        Training images uint8 [train_size, 3, 32, 32], their labels int64 [train_size] in 0..9 (CLASSES), and
        the same two for the test; all on the CPU. Sizes other than these give other pictures.

    Raises:
        ValueError: for a negative size.
    """
    train = _make(train_size, mix(seed, Stream.SYNTHETIC, 0))
    test = _make(test_size, mix(seed, Stream.SYNTHETIC, 1))
    return *train, *test


def _make(size: int, key: int) -> tuple[Tensor, Tensor]:
    labels = permutation(key, 0, size) % len(CLASSES)
    images = torch.empty(size, 3, _SIZE, _SIZE, dtype=torch.uint8)
    for start in range(0, size, _CHUNK):
        part = labels[start : start + _CHUNK]
        images[start : start + _CHUNK] = _draw(torch.arange(start, start + len(part)), part, key)
    return images, labels


def _draw(samples: Tensor, labels: Tensor, key: int) -> Tensor:
    """uint8 [B, 3, 32, 32]."""
    # Whole numbers below 2**24 from here on.
    bits = (uniform(mix(key, 1), samples, _DRAWS) * 2**24).to(torch.int32)
    ink = _masks(labels, bits)[:, None]
    # Each channel of the foreground is 56 to 119 away from the background, up or down, wrapping around: by
    # itself, every foreground colour is as likely as any other.
    back = bits[:, _BACK : _BACK + 3] >> 16
    step = 56 + (bits[:, _STEP : _STEP + 3] & 63)
    fore = torch.where(bits[:, _SIGN : _SIGN + 3] & 1 == 0, back + step, back - step) & 255
    picture = torch.where(ink, fore[:, :, None, None], back[:, :, None, None])
    noise = (uniform(mix(key, 2), samples, _SIZE * _SIZE) * 2**24).to(torch.int32)
    noise = noise.view(-1, 1, _SIZE, _SIZE)
    noise = torch.cat([noise & 255, (noise >> 8) & 255, noise >> 16], dim=1)
    return (picture + (noise * 33 >> 8) - 16).clamp_(0, 255).to(torch.uint8)


def _masks(labels: Tensor, bits: Tensor) -> Tensor:
    """Masks of the foreground, bool [B, 32, 32]."""

    def number(column: int, low: int, high: int) -> Tensor:
        """A whole number in low..high of each image, [B, 1, 1]."""
        return (low + (bits[:, column] >> 8) * (high - low + 1) // 2**16)[:, None, None]

    line = torch.arange(_SIZE, dtype=torch.int32) * _ONE - (_SIZE - 1) * _ONE // 2
    x = line[None, None, :] - number(_X, -4 * _ONE, 4 * _ONE)
    y = line[None, :, None] - number(_Y, -4 * _ONE, 4 * _ONE)
    # A turn of up to 5 degrees: with a tangent below 0.09, its scale is right to within half a per cent.
    tangent = number(_ANGLE, -89, 89)
    u, v = x + (y * tangent >> 10), y - (x * tangent >> 10)
    radius = number(_RADIUS, 7 * _ONE, 11 * _ONE)
    phase_u, phase_v = number(_PHASE_X, 0, 64 * _ONE), number(_PHASE_Y, 0, 64 * _ONE)
    half = number(_RADIUS, 2 * _ONE, 4 * _ONE)  # half a period of a texture
    fraction = number(_FRACTION, 50, 70)  # inner over outer radius of the ring, in hundredths

    masks = torch.empty(labels.shape[0], _SIZE, _SIZE, dtype=torch.bool)
    for kind, name in enumerate(CLASSES):
        chosen = (labels == kind).nonzero().squeeze(1)
        a, b, r, h, pu, pv, f = (t[chosen] for t in (u, v, radius, half, phase_u, phase_v, fraction))
        masks[chosen] = _mask(name, a, b, r, h, pu, pv, f)
    return masks


def _mask(name: str, a: Tensor, b: Tensor, r: Tensor, h: Tensor, pu: Tensor, pv: Tensor, f: Tensor) -> Tensor:
    """One class: a to the right and b down from the centre, r the radius, h half a period, pu and pv phases,
    all int32 in 1024ths of a pixel; f the ring's inner radius in hundredths.
    """
    # Sixteenths of a pixel, so that squares stay within int32.
    distance = (a >> 6) ** 2 + (b >> 6) ** 2
    if name == "disc":
        return distance < (r >> 6) ** 2
    if name == "ring":
        return (distance < (r >> 6) ** 2) & (distance >= ((r >> 6) * f // 100) ** 2)
    if name == "square":
        return torch.maximum(a.abs(), b.abs()) < r * 9 // 10
    if name == "triangle":
        return (b < r * 4 // 5) & (a.abs() * 2 < b + r)
    if name == "cross":
        near, far = torch.minimum(a.abs(), b.abs()), torch.maximum(a.abs(), b.abs())
        return (near < r * 3 // 10) & (far < r)
    across, down = (a + pu) // h, (b + pv) // h
    if name == "horizontal":
        return (down % 2 == 0).expand(-1, _SIZE, _SIZE)
    if name == "vertical":
        return (across % 2 == 0).expand(-1, _SIZE, _SIZE)
    if name == "diagonal":
        return ((a + b + pu) * 7 // 10 // h) % 2 == 0  # 7 / 10: a step along x or y is 0.7 across the stripes
    if name == "checkerboard":
        return (across + down) % 2 == 0
    x, y = (((t + p) % (2 * h) - h) >> 6 for t, p in ((a, pu), (b, pv)))  # dots
    return x**2 + y**2 < ((h * 6 // 10) >> 6) ** 2

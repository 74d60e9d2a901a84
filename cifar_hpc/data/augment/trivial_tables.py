"""TrivialAugmentWide's operations with their magnitudes, as tables with a row for each case.

A case is an operation, one of 31 magnitude bins and a sign: 868 of them, so that all that needs a tangent or a
division is worked out once, on the host, and a batch looks it up. Torchvision 0.27 defines the magnitudes and
what each operation does to a tensor (TrivialAugmentWide with its defaults: nearest pixel, fill 0); the tests
compare every case with it.
"""

from __future__ import annotations

import math
from enum import IntEnum
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from cifar_hpc.config.spec import IMAGE_SIZE

BINS = 31
"""Magnitudes that an operation has."""
PIXELS = IMAGE_SIZE * IMAGE_SIZE
OUTSIDE = PIXELS
"""What a pixel without a source shows: the pixel after the image's last."""
_HALF = IMAGE_SIZE / 2


class Operation(IntEnum):
    """The 14 operations, in torchvision's order: first what moves pixels, then what blends, then the rest."""

    IDENTITY = 0
    SHEAR_X = 1
    SHEAR_Y = 2
    TRANSLATE_X = 3
    TRANSLATE_Y = 4
    ROTATE = 5
    BRIGHTNESS = 6
    COLOR = 7
    CONTRAST = 8
    SHARPNESS = 9
    POSTERIZE = 10
    SOLARIZE = 11
    AUTO_CONTRAST = 12
    EQUALIZE = 13


FIRST_SIGNED, LAST_SIGNED = Operation.SHEAR_X, Operation.SHARPNESS
LAST_MOVE = Operation.ROTATE
LAST_WITH_BINS = Operation.SOLARIZE
IDENTITY_CASE = 0
_CASES_OF_ONE = 2 * BINS
_LARGEST = {
    Operation.SHEAR_X: 0.99,
    Operation.SHEAR_Y: 0.99,
    Operation.TRANSLATE_X: 32.0,
    Operation.TRANSLATE_Y: 32.0,
    Operation.ROTATE: 135.0,
    Operation.BRIGHTNESS: 0.99,
    Operation.COLOR: 0.99,
    Operation.CONTRAST: 0.99,
    Operation.SHARPNESS: 0.99,
}


class Tables(NamedTuple):
    """Tables of all cases, one row a case; a row is neutral where the operation has no such value.

    Attributes:
        source: int16 [372, 1024], the pixel that each pixel shows, or OUTSIDE; for the operations up to ROTATE.
        own, other: float32 [868], weights of the image and of what it is blended with.
        mask: uint8 [868], the bits that stay.
        threshold: int16 [868], the least value that is inverted.
    """

    source: Tensor
    own: Tensor
    other: Tensor
    mask: Tensor
    threshold: Tensor


def case_number(operation: Tensor, magnitude_bin: Tensor, negative: Tensor) -> Tensor:
    """The row of each sample's case, int64 [B]."""
    return operation * _CASES_OF_ONE + negative.to(torch.int64) * BINS + magnitude_bin


def magnitudes(operation: Operation) -> list[float]:
    """The 31 magnitudes of an operation, without their sign; zeros where it has none."""
    if operation is Operation.POSTERIZE:
        return [8.0 - round(n * 6 / (BINS - 1)) for n in range(BINS)]
    first = 255.0 if operation is Operation.SOLARIZE else 0.0
    # Rounded to float32, as torchvision's are.
    return torch.linspace(first, _LARGEST.get(operation, 0.0), BINS, dtype=torch.float32, device="cpu").tolist()


@lru_cache(maxsize=8)
def tables(device: torch.device) -> Tables:
    """The tables on a device, made and copied there at the first call."""
    cases = [
        (operation, sign * magnitude)
        for operation in Operation
        for sign in (1.0, -1.0)
        for magnitude in magnitudes(operation)
    ]
    factors = [1.0 + m if Operation.BRIGHTNESS <= op <= Operation.SHARPNESS else 1.0 for op, m in cases]
    masks = [256 - 2 ** (8 - int(abs(m))) if op is Operation.POSTERIZE else 255 for op, m in cases]
    thresholds = [math.ceil(abs(m)) if op is Operation.SOLARIZE else 256 for op, m in cases]
    made = Tables(
        source=_sources([_matrix(op, m) for op, m in cases if op <= LAST_MOVE]),
        own=torch.tensor(factors, dtype=torch.float32, device="cpu"),
        other=torch.tensor([1.0 - factor for factor in factors], dtype=torch.float32, device="cpu"),
        mask=torch.tensor(masks, dtype=torch.uint8, device="cpu"),
        threshold=torch.tensor(thresholds, dtype=torch.int16, device="cpu"),
    )
    return Tables(*(table.to(device, non_blocking=True) for table in made))


def _matrix(operation: Operation, magnitude: float) -> list[float]:
    """Inverse affine map: column = a x + b y + c, row = d x + e y + f, from the picture's centre.

    As torchvision's _get_inverse_affine_matrix, for what TrivialAugment asks of it: shears are about the upper
    left corner and take an angle, in degrees, and shifts are whole pixels.
    """
    shear = math.tan(math.radians(math.degrees(math.atan(magnitude))))
    moved = _HALF + shear * _HALF - _HALF
    turn = math.radians(-magnitude)
    cosine, sine = math.cos(turn), math.sin(turn)
    return {
        Operation.SHEAR_X: [1.0, shear, moved, 0.0, 1.0, 0.0],
        Operation.SHEAR_Y: [1.0, 0.0, 0.0, shear, 1.0, moved],
        Operation.TRANSLATE_X: [1.0, 0.0, -float(int(magnitude)), 0.0, 1.0, 0.0],
        Operation.TRANSLATE_Y: [1.0, 0.0, 0.0, 0.0, 1.0, -float(int(magnitude))],
        Operation.ROTATE: [cosine, sine, 0.0, -sine, cosine, 0.0],
    }.get(operation, [1.0, 0.0, 0.0, 0.0, 1.0, 0.0])


def _sources(matrices: list[list[float]]) -> Tensor:
    """The source of each pixel, int16 [len(matrices), 1024].

    At 45 and 135 degrees a diagonal lies in the middle between two pixels, but for the error of a sine. Adding 16
    in float32 rounds that away, as in torchvision; no other place is nearer than 5e-5 to such a middle.
    """
    line = torch.arange(IMAGE_SIZE, dtype=torch.float64, device="cpu") - (_HALF - 0.5)
    weights = torch.tensor(matrices, dtype=torch.float64, device="cpu")[:, :, None, None]
    place = [weights[:, n] * line + weights[:, n + 1] * line[:, None] + weights[:, n + 2] for n in (0, 3)]
    column, row = (p.float().add_(_HALF).sub_(0.5).round_() for p in place)
    inside = (column >= 0) & (column < IMAGE_SIZE) & (row >= 0) & (row < IMAGE_SIZE)
    return torch.where(inside, row * IMAGE_SIZE + column, OUTSIDE).flatten(1).to(torch.int16)

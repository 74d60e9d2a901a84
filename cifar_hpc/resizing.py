"""Progressive resizing: small training images first, whole ones at the end, which makes the early epochs cheap.

Source: Howard, "Training Imagenet in 3 hours for $25; and CIFAR10 for $0.26", fast.ai 2018; the keys are those of
MosaicML Composer's ProgressiveResizing. What epoch takes what size is a pure function of the spec: nothing to save.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from cifar_hpc.augment_config import IMAGE_SIZE
from cifar_hpc.spec import Spec


def training_size(spec: Spec, epoch: int) -> int:
    """Height and width in pixels of the training images of one epoch; of the last one always 32.

    Args:
        spec: of the run.
        epoch: epochs completed.
    """
    initial, increment, epochs = spec.resizing.initial, spec.resizing.increment, spec.train.epochs
    if initial is None:
        return IMAGE_SIZE
    # Rounded first: 0.29 of 100 epochs is 29, whatever floating point makes of it.
    first = int(round(spec.resizing.delay * epochs, 6))
    last = epochs - max(1, int(round(spec.resizing.finetune * epochs, 6)))
    if epoch >= last:
        return IMAGE_SIZE
    if epoch < first:
        return initial
    grown = math.ceil((IMAGE_SIZE - initial) / increment * (epoch - first + 1) / (last - first + 1)) * increment
    return min(IMAGE_SIZE, initial + grown)


def resize(images: Tensor, size: int) -> Tensor:
    """Scale images down, each one alone, with the linear filter and antialiasing.

    Args:
        images: float [B, 3, 32, 32].
        size: height and width of the result, in pixels.

    Returns:
        [B, 3, size, size], channels_last; `images` itself where that is their size.
    """
    if size == images.shape[-1]:
        return images
    small = F.interpolate(images, size=(size, size), mode="bilinear", antialias=True)
    return small.contiguous(memory_format=torch.channels_last)

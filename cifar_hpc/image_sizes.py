"""Progressive resizing: what epoch takes images of what size, as a pure function of the spec. Nothing to save.

Source: Howard, "Training Imagenet in 3 hours for $25; and CIFAR10 for $0.26", fast.ai 2018; the keys are those of
MosaicML Composer's ProgressiveResizing. Never imports torch: the login node tells from it how long a run will take.
"""

from __future__ import annotations

import math

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


def epochs_left(spec: Spec, done: float) -> float:
    """The epochs to the run's end, each counted as so many of the one under way as it has more pixels.

    Args:
        spec: of the run.
        done: epochs done, with the part of the one under way.
    """
    epochs = spec.train.epochs
    if done >= epochs or not spec.resizing.on:
        return max(0.0, epochs - done)
    under_way = int(done)
    sizes = [training_size(spec, epoch) for epoch in range(under_way, epochs)]
    return sum(size**2 for size in sizes) / sizes[0] ** 2 - (done - under_way)

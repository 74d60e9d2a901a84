"""Learning rate and image size of each epoch, as pure functions of the spec: nothing to save, nothing to resume.

Progressive resizing: Howard, "Training Imagenet in 3 hours for $25; and CIFAR10 for $0.26", fast.ai 2018; the keys are
those of MosaicML Composer's ProgressiveResizing."""

import math

from cifar_hpc.config.spec import Spec


def training_size(spec: Spec, epoch: int) -> int:
    """Height and width in pixels of the training images of one epoch; of the last one always data.image_size.

    Args:
        spec: of the run.
        epoch: epochs completed.
    """
    initial, increment, epochs, size = spec.resizing.initial, spec.resizing.increment, spec.train.epochs, spec.data.size
    if initial is None:
        return size
    # Rounded first: 0.29 of 100 epochs is 29, whatever floating point makes of it.
    first = int(round(spec.resizing.delay * epochs, 6))
    last = epochs - max(1, int(round(spec.resizing.finetune * epochs, 6)))
    if epoch >= last:
        return size
    if epoch < first:
        return initial
    grown = math.ceil((size - initial) / increment * (epoch - first + 1) / (last - first + 1)) * increment
    return min(size, initial + grown)


def resizes(spec: Spec) -> bool:
    """Return whether any epoch trains on smaller images."""
    return spec.resizing.initial is not None and spec.resizing.initial < spec.data.size


def epochs_left(spec: Spec, done: float) -> float:
    """The epochs to the run's end, each counted as so many of the one under way as it has more pixels.

    Args:
        spec: of the run.
        done: epochs done, with the part of the one under way.
    """
    epochs = spec.train.epochs
    if done >= epochs or not resizes(spec):
        return max(0.0, epochs - done)
    under_way = int(done)
    sizes = [training_size(spec, epoch) for epoch in range(under_way, epochs)]
    return sum(size**2 for size in sizes) / sizes[0] ** 2 - (done - under_way)


def learning_rate(spec: Spec, epoch: int, updates: int, steps_per_epoch: int) -> float:
    """The rate of the next update.

    Over schedule.warmup_epochs it rises linearly with each update (Goyal et al. 2017, arXiv:1706.02677, section 2.2);
    then it falls to zero over the epochs that are left, in a line or by cosine annealing (Loshchilov and Hutter 2017,
    arXiv:1608.03983, without restarts) in the closed form of torch's CosineAnnealingLR.

    Args:
        epoch: epochs completed.
        updates: optimizer updates applied; a step that GradScaler skipped is none, so it does not advance the rate.
        steps_per_epoch: steps in an epoch.
    """
    base, warmup = spec.optimizer.lr, spec.schedule.warmup_epochs
    rising = warmup * steps_per_epoch
    if updates < rising:
        return base * (updates + 1) / (rising + 1)
    if spec.schedule.name == "constant":
        return base
    if spec.schedule.per == "epoch":
        fraction = max(0.0, epoch - warmup) / (spec.train.epochs - warmup)
    else:
        fraction = (updates - rising) / (spec.train.epochs * steps_per_epoch - rising)
    fraction = min(1.0, fraction)
    if spec.schedule.name == "linear":
        return base * (1 - fraction)
    return 0.5 * base * (1 + math.cos(math.pi * fraction))

"""The learning rate as a pure function of progress: nothing to save, nothing to resume."""

from __future__ import annotations

import math

from cifar_hpc.spec import Spec


def learning_rate(spec: Spec, epoch: int, updates: int, steps_per_epoch: int) -> float:
    """The rate of the next update.

    Over schedule.warmup_epochs it rises linearly with each update (Goyal et al. 2017, arXiv:1706.02677, section 2.2);
    then cosine annealing to zero over the epochs that are left (Loshchilov and Hutter 2017, arXiv:1608.03983, without
    restarts), in the closed form of torch's CosineAnnealingLR.

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
    return 0.5 * base * (1 + math.cos(math.pi * min(1.0, fraction)))

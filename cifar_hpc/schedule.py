"""The learning rate as a pure function of progress: nothing to save, nothing to resume."""

from __future__ import annotations

import math

from cifar_hpc.spec import Spec


def learning_rate(spec: Spec, epoch: int, updates: int, steps_per_epoch: int) -> float:
    """The rate of the next update.

    Cosine annealing to zero over train.epochs (Loshchilov and Hutter 2017, arXiv:1608.03983, without restarts), in
    the closed form of torch's CosineAnnealingLR with T_max = train.epochs.

    Args:
        epoch: epochs completed.
        updates: optimizer updates applied; a step that GradScaler skipped is none, so it does not advance the rate.
        steps_per_epoch: steps in an epoch.
    """
    base = spec.optimizer.lr
    if spec.schedule.name == "constant":
        return base
    if spec.schedule.per == "epoch":
        fraction = epoch / spec.train.epochs
    else:
        fraction = updates / (spec.train.epochs * steps_per_epoch)
    return 0.5 * base * (1 + math.cos(math.pi * min(1.0, fraction)))

"""A model over many images, a batch at a time."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator

from torch import Tensor

from cifar_hpc.evaluation import BATCH
from cifar_hpc.trained_model import TrainedModel

SAY_SECONDS = 10.0


def batches(
    trained: TrainedModel, read: Callable[[int, int], Tensor], count: int, what: str
) -> Iterator[tuple[int, Tensor]]:
    """Logits of the images 0 to `count`, in the batches of the trainer's evaluation: (index of the first, logits).

    Says on standard error how far it is, where it takes long.

    Args:
        read: gives the images from one index up to another, uint8 [n, 3, 32, 32].
        what: the first word of that line.
    """
    said = time.monotonic()
    for first in range(0, count, BATCH):
        yield first, trained.logits(read(first, min(first + BATCH, count)))
        now = time.monotonic()
        if now - said >= SAY_SECONDS:
            print(f"{what}: {min(first + BATCH, count):,} of {count:,} images", file=sys.stderr, flush=True)
            said = now

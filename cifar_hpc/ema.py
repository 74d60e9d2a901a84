"""An exponential moving average of the weights, for evaluation (Polyak and Juditsky 1992; Tarvainen 2017)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from cifar_hpc.lookahead import replaced


class WeightAverage:
    """The average of `parameters`, which begins as their clone.

    After update number n it is average + (1 - d) * (weights - average) with d = min(decay, (1 + n) / (10 + n)), so that
    the initial weights, which mean nothing, are soon forgotten (tf.train.ExponentialMovingAverage, num_updates).

    Args:
        parameters: of the model, whose values others change.
        decay: share that an update keeps, in (0, 1).
    """

    def __init__(self, parameters: Sequence[Tensor], decay: float) -> None:
        if not 0 < decay < 1:
            raise ValueError(f"decay must be in (0, 1), not {decay}")
        self.decay = decay
        self._parameters = list(parameters)
        self.average = [p.detach().clone() for p in self._parameters]

    @torch.no_grad()
    def update(self, updates: int) -> None:
        """Take in the weights as they are after update number `updates`, from 1."""
        decay = min(self.decay, (1 + updates) / (10 + updates))
        torch._foreach_add_(self.average, torch._foreach_sub(self._parameters, self.average), alpha=1 - decay)

    @torch.no_grad()
    def load(self, average: Sequence[Tensor]) -> None:
        """Take over a saved average, by copy.

        Raises:
            ValueError: where its shapes do not fit.
        """
        if [a.shape for a in average] != [a.shape for a in self.average]:
            raise ValueError("the averaged weights' shapes do not fit the parameters")
        for mine, saved in zip(self.average, average, strict=True):
            mine.copy_(saved)

    def averaged_weights(self) -> AbstractContextManager[None]:
        """Within the context the parameters hold the average; afterwards their own values again, bit for bit."""
        return replaced(self._parameters, self.average)

"""Lookahead as public scripts have it: one parameter after the other, slow weights in a list."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer


class Lookahead(Optimizer):
    """Every k steps of `optimizer`: slow += alpha * (fast - slow); fast = slow."""

    def __init__(self, optimizer: Optimizer, k: int = 5, alpha: float = 0.5) -> None:
        self.optimizer, self.k, self.alpha, self.count = optimizer, k, alpha, 0
        super().__init__(optimizer.param_groups, optimizer.defaults)
        self.param_groups, self.state = optimizer.param_groups, optimizer.state
        self.slow = [[p.detach().clone() for p in group["params"]] for group in self.param_groups]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = self.optimizer.step(closure)
        self.count += 1
        if self.count % self.k == 0:
            for group, slow_weights in zip(self.param_groups, self.slow, strict=True):
                for fast, slow in zip(group["params"], slow_weights, strict=True):
                    slow.add_(fast - slow, alpha=self.alpha)
                    fast.copy_(slow)
        return loss

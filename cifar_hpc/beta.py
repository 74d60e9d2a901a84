"""Numbers from Beta(alpha, alpha), each from one uniform number by the inverse of the distribution function."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

_KNOTS = 4097


def symmetric_beta(uniform: Tensor, alpha: float) -> Tensor:
    """The quantiles of Beta(alpha, alpha): a pure function of each number, without waiting for the device.

    Args:
        uniform: float32 [B] in [0, 1), on any device.
        alpha: above 0, at most 100.

    Returns:
        float32 [B] in [0, 1]: `uniform` itself for alpha 1, else within 1e-6 of the exact quantile.
    """
    if alpha == 1:
        return uniform
    scaled, quantile = _table(alpha, uniform.device)
    u = uniform.double()
    # The lower half of the distribution serves both.
    place = (2 * torch.minimum(u, 1 - u)).pow_(1 / alpha)
    upper = torch.searchsorted(scaled, place).clamp_(1, _KNOTS - 1)
    left, right = scaled.index_select(0, upper - 1), scaled.index_select(0, upper)
    low, high = quantile.index_select(0, upper - 1), quantile.index_select(0, upper)
    lower_half = low + (place - left) / (right - left) * (high - low)
    return torch.where(u < 0.5, lower_half, 1 - lower_half).float()


@lru_cache(maxsize=16)
def _table(alpha: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Knots (2 F(x)) ** (1 / alpha) and x in [0, 0.5], float64 [4097] each; F is the distribution function.

    At small x, F is like x ** alpha, which no line follows. Its root of that degree is smooth, in whatever alpha, so
    lines between the knots do: F(x) = c (x (1 - x)) ** alpha (1 + T(x)), with the constant c by F(0.5) = 0.5 and
    T(x) = sum over k > 0 of (2 alpha)_k / (alpha + 1)_k x ** k (DLMF 8.17.8), all of whose terms are positive.
    """
    x = torch.linspace(0, 0.5, _KNOTS, dtype=torch.float64, device="cpu")
    term, total, k = torch.ones_like(x), torch.zeros_like(x), 0
    while float(term[-1]) > 1e-17 * float(total[-1]):
        term = term * x * ((2 * alpha + k) / (alpha + 1 + k))
        total, k = total + term, k + 1
    logarithm = total.log1p()
    scaled = 4 * x * (1 - x) * ((logarithm - logarithm[-1]) / alpha).exp()
    return scaled.to(device, non_blocking=True), x.to(device, non_blocking=True)

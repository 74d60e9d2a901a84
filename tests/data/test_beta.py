"""Numbers from Beta(alpha, alpha) against the distribution function, integrated numerically."""

from __future__ import annotations

import math

import numpy
import pytest
import torch
from torch import Tensor

from cifar_hpc.data.augment.mixing import symmetric_beta
from cifar_hpc.randomness import uniform

ALPHAS = [0.02, 0.1, 0.2, 0.4, 0.5, 0.8, 1.0, 1.5, 2.0, 8.0, 100.0]
_NODES, _WEIGHTS = numpy.polynomial.legendre.leggauss(80)  # of the interval from -1 to 1
NODES, WEIGHTS = torch.from_numpy((_NODES + 1) / 2), torch.from_numpy(_WEIGHTS / 2)
EPSILON = 2.0**-24
"""What float32 cannot tell from 1; of Beta(0.2, 0.2) 1.6 % are nearer to 1."""


def distribution(x: Tensor, alpha: float) -> Tensor:
    """P(X <= x) under Beta(alpha, alpha), float64 [N], by Gauss's rule on the side of x that is nearer to its end.

    Without its pole: in v = t ** alpha below 1, where the density of t goes to infinity at 0, else in t = sin(v) ** 2.
    """
    near = torch.minimum(x, 1 - x)[:, None].clamp(min=0)
    if alpha < 1:
        end = near**alpha
        heights = (1 - (end * NODES) ** (1 / alpha)) ** (alpha - 1) / alpha
    else:
        end = near.sqrt().asin()
        heights = 2 * ((end * NODES).sin() * (end * NODES).cos()) ** (2 * alpha - 1)
    constant = math.exp(math.lgamma(2 * alpha) - 2 * math.lgamma(alpha))
    tail = (heights * WEIGHTS).sum(1) * end[:, 0] * constant
    return torch.where(x < 0.5, tail, 1 - tail)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_quantiles_are_exact_to_a_millionth(alpha: float) -> None:
    u = torch.cat(
        [2.0 ** -torch.arange(1.0, 25), torch.linspace(0.0007, 0.9993, 501), 1 - 2.0 ** -torch.arange(2.0, 25)]
    )
    x = symmetric_beta(u, alpha).double()
    assert distribution(torch.tensor([0.5], dtype=torch.float64), alpha).item() == pytest.approx(0.5, abs=1e-9)
    assert bool((distribution(x - 1e-6, alpha) <= u + 1e-9).all())
    assert bool((distribution(x + 1e-6, alpha) >= u - 1e-9).all())


@pytest.mark.parametrize("alpha", ALPHAS)
def test_many_draws_have_the_distribution(alpha: float) -> None:
    count = 100_000
    x = symmetric_beta(uniform(7, torch.arange(count), 1)[:, 0], alpha).double().sort().values
    variance = 1 / (4 * (2 * alpha + 1))
    assert abs(float(x.mean()) - 0.5) < 4 * math.sqrt(variance / count)
    fourth = 3 * variance**2 * (2 * alpha + 1) / (2 * alpha + 3)  # the fourth central moment
    assert abs(float(x.var()) - variance) < 4 * math.sqrt((fourth - variance**2) / count)
    some = torch.arange(49, count, 100)
    # Kolmogorov and Smirnov's, at every 100th draw, as exactly as float32 knows it.
    above = (some + 0.5) / count - distribution(x[some] + EPSILON, alpha)
    below = distribution(x[some] - EPSILON, alpha) - (some + 0.5) / count
    assert float(torch.maximum(above, below).max()) * math.sqrt(count) < 1.95
    for end in (0.001, 0.01, 0.1, 0.9, 0.99, 0.999):
        share = distribution(torch.tensor([end], dtype=torch.float64), alpha).item()
        got = float((x <= end).double().mean())
        assert abs(got - share) <= 4 * math.sqrt(share * (1 - share) / count) + 1e-9, end


@pytest.mark.parametrize("alpha", ALPHAS)
def test_it_is_symmetric_and_rises(alpha: float) -> None:
    u = torch.arange(1, 2048) / 2048
    x = symmetric_beta(u, alpha)
    assert x.dtype == torch.float32 and float(symmetric_beta(torch.zeros(1), alpha)) == 0
    assert bool((x.diff() >= 0).all()) and float(x.min()) >= 0 and float(x.max()) <= 1
    torch.testing.assert_close(x, 1 - x.flip(0), rtol=0, atol=1e-7)


def test_alpha_1_is_the_uniform_number_itself() -> None:
    u = torch.rand(10)
    assert symmetric_beta(u, 1.0) is u


def test_nothing_depends_on_data() -> None:
    assert symmetric_beta(torch.empty(5, device="meta"), 0.2).shape == (5,)

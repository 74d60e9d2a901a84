"""Fixtures for all tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from helpers import Ranks


@pytest.fixture(autouse=True)
def torch_switches() -> Iterator[None]:
    """Global switches of PyTorch are back in place after each test."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Four processes that can form gloo groups of 1 to 4."""
    pool = Ranks(4)
    yield pool
    pool.close()

"""Fixtures for all tests."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers import Ranks
from processes import Runs

from cifar_hpc.training.signals import STOP_SIGNALS

# A shell without job control lets what it runs in the background ignore SIGINT, and so would every test's children.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def global_switches() -> Iterator[None]:
    """Switches of PyTorch and handlers of signals are back in place after each test."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    handlers = {number: signal.getsignal(number) for number in (*STOP_SIGNALS, signal.SIGCONT, signal.SIGINT)}
    yield
    for number, handler in handlers.items():  # of a run that was played in this very process
        signal.signal(number, handler)
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Four processes that can form gloo groups of 1 to 4."""
    pool = Ranks(4)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with a finished run called tiny: 2 epochs of 9 steps, and checkpoints 4, 8, 9, 12, 16, 18. Read only."""
    made = Runs(tmp_path_factory.mktemp("tiny"))
    made.finish("tiny", 1, "checkpoint.keep=9")
    return made.root


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    """A root for runs of real processes, none of which outlives the module's tests."""
    made = Runs(tmp_path_factory.mktemp("root"))
    yield made
    for process in made.processes:
        process.kill()
        process.wait()

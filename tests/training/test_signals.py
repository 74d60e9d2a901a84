"""The flag that handlers of stop signals set."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import pytest

from cifar_hpc.training.signals import STOP_SIGNALS, StopFlag


@pytest.fixture
def flag() -> Any:
    before = {number: signal.getsignal(number) for number in (*STOP_SIGNALS, signal.SIGCONT)}
    yield StopFlag().install()
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_the_first_signal_sets_the_flag(flag: StopFlag, number: signal.Signals) -> None:
    assert not flag.requested
    os.kill(os.getpid(), number)
    assert flag.requested
    assert flag.signal is number
    os.kill(os.getpid(), signal.SIGTERM)
    assert flag.signal is number


def test_sigcont_is_ignored(flag: StopFlag) -> None:
    os.kill(os.getpid(), signal.SIGCONT)
    assert not flag.requested


def test_raise_flag_counts_as_sigterm_unless_a_signal_came_first(flag: StopFlag) -> None:
    other = StopFlag()
    other.raise_flag()
    assert other.requested and other.signal is signal.SIGTERM
    os.kill(os.getpid(), signal.SIGUSR2)
    flag.raise_flag()
    assert flag.signal is signal.SIGUSR2


def test_seconds_since_the_first_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    flag = StopFlag()
    assert flag.seconds is None
    clock = iter([100.0, 107.5])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    flag.raise_flag()
    flag.raise_flag()
    seconds = flag.seconds
    monkeypatch.undo()
    assert seconds == 7.5

"""The helpers of the tests themselves, where a mistake would make other tests fail or pass for no reason."""

from __future__ import annotations

import warnings

import pytest
import torch
from helpers import no_waiting


class Switch:
    """`torch.cuda.set_sync_debug_mode`, which sets the mode and warns of it once in a process."""

    def __init__(self) -> None:
        self.mode, self.warned = "default", False

    def __call__(self, mode: str) -> None:
        self.mode = mode
        if not self.warned:
            self.warned = True
            words = "Synchronization debug mode is a prototype feature and does not yet detect all synchronizing"
            warnings.warn(words, UserWarning, stacklevel=2)


@pytest.fixture
def switch(monkeypatch: pytest.MonkeyPatch) -> Switch:
    made = Switch()
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", made)
    return made


def test_the_first_and_later_uses_of_no_waiting_leave_the_mode_as_it_was(switch: Switch) -> None:
    with pytest.raises(UserWarning):
        Switch()("error")  # pytest makes it an error
    for _ in range(2):
        with no_waiting("cuda"):
            assert switch.mode == "error"
        assert switch.mode == "default"
    assert switch.warned


def test_an_operation_that_waits_leaves_the_mode_as_it_was(switch: Switch) -> None:
    with pytest.raises(RuntimeError, match="synchronizing"), no_waiting("cuda"):
        raise RuntimeError("called a synchronizing CUDA operation")
    assert switch.mode == "default"


def test_a_mode_that_could_not_be_set_is_set_back(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[str] = []

    def other_words(mode: str) -> None:
        modes.append(mode)
        if mode == "error":
            warnings.warn("another warning", UserWarning, stacklevel=2)

    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", other_words)
    with pytest.raises(UserWarning, match="another warning"), no_waiting("cuda"):
        pass
    assert modes == ["error", "default"]


def test_nothing_is_switched_for_a_cpu(switch: Switch) -> None:
    with no_waiting("cpu"):
        assert (switch.mode, switch.warned) == ("default", False)

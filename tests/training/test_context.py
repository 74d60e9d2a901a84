"""Parts of a start: mentioned in the log and in status where they take their time, and nowhere else."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import tiny_spec

from cifar_hpc.runs import logs
from cifar_hpc.runs.events import FirstStep
from cifar_hpc.runs.paths import RunPaths
from cifar_hpc.runs.progress import read_progress, update_progress
from cifar_hpc.runs.state import read_state
from cifar_hpc.training.context import Context
from cifar_hpc.training.process import Launch, StopFlag


@pytest.fixture
def context(tmp_path: Path) -> Context:
    """Of a run whose lock it has."""
    paths = RunPaths(tmp_path, "run")
    paths.create()
    made = Context(paths, tiny_spec(), Launch(), StopFlag())
    made.lock.acquire({"host": "n1"})
    return made


def test_a_long_part_of_a_start_is_in_the_log_and_in_status(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "SAID_AFTER_SECONDS", 0)
    context.begin("loading the images")
    context._timer.join()
    assert context.paths.train_log.read_text().endswith(" loading the images\n")
    assert context.heart.doing == "loading the images"
    state = read_state(context.paths, {})
    assert (state.state, state.detail) == ("running", "on n1: loading the images")
    context.emit(FirstStep(step=1, startup={}))
    assert read_state(context.paths, {}).detail == "on n1"


def test_training_ends_what_the_start_was_doing(context: Context) -> None:
    update_progress(context.paths, doing="decoding images: 12,000 of 50,000")
    assert read_progress(context.paths).doing is not None
    context.report(step=1)
    assert read_progress(context.paths).doing is None


def test_a_short_part_of_a_start_is_not_mentioned(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "SAID_AFTER_SECONDS", 3600)
    context.begin("loading the images")
    timers = [context._timer]
    context.begin("setting up the model")
    timers.append(context._timer)
    context.quiet()
    for timer in timers:
        timer.join()
    assert not context.paths.train_log.exists() and read_progress(context.paths).doing is None


def test_other_ranks_mention_nothing(tmp_path: Path) -> None:
    context = Context(RunPaths(tmp_path, "run"), tiny_spec(), Launch(1, 2, 1), StopFlag())
    context.begin("loading the images")
    assert context.heart.doing == "loading the images" and not context._timer.is_alive()

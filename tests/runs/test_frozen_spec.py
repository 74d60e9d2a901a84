"""The frozen spec: what the first start fixes, every later start must fit."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import tiny_spec

from cifar_hpc.config.spec import Spec
from cifar_hpc.errors import SpecError
from cifar_hpc.runs.events import Attempted, Submitted, append_event
from cifar_hpc.runs.frozen_spec import freeze, read_frozen, resolve
from cifar_hpc.runs.logs import append_line
from cifar_hpc.runs.paths import RunPaths

OPEN = {"shards": None, "cpu_threads": None}


@pytest.fixture
def paths(tmp_path: Path) -> RunPaths:
    run = RunPaths(tmp_path, "demo-1")
    run.create()
    return run


def start(paths: RunPaths, spec: Spec, tasks: int, threads: int = 1) -> Spec:
    resolved = resolve(paths, spec, tasks, threads)
    freeze(paths, resolved)
    append_line(paths.events, '{"event": "started", "restart": 0, "step": 0}')
    return resolved


def test_the_first_start_fixes_shards_and_threads(paths: RunPaths) -> None:
    assert read_frozen(paths) is None
    first = start(paths, tiny_spec(train=OPEN), 4, threads=2)
    assert (first.train.shards, first.train.cpu_threads) == (4, 2)
    assert read_frozen(paths) == first
    later = start(paths, tiny_spec(train=OPEN), 3, threads=8)
    assert later == first


def test_the_spec_rules_over_the_first_start(paths: RunPaths) -> None:
    spec = start(paths, tiny_spec(train={"shards": 8, "cpu_threads": 3}), 2, threads=1)
    assert (spec.train.shards, spec.train.cpu_threads) == (8, 3)


def test_resources_and_epochs_may_change_later(paths: RunPaths) -> None:
    start(paths, tiny_spec(), 1)
    changed = tiny_spec(train={"epochs": 9}, resources={"partition": "other"})
    assert start(paths, changed, 2) == changed == read_frozen(paths)


def test_anything_else_is_refused(paths: RunPaths) -> None:
    start(paths, tiny_spec(), 1)
    with pytest.raises(SpecError, match=r"run demo-1.*\n  train\.seed: 0 -> 1\n"):
        resolve(paths, tiny_spec(train={"seed": 1}), 1, 1)


@pytest.mark.parametrize("shards", [2, None])
def test_more_processes_than_shards_are_refused(paths: RunPaths, shards: int | None) -> None:
    start(paths, tiny_spec(train={"shards": shards}), 2)
    with pytest.raises(SpecError, match=r"3 ranks are more than train\.shards: 2.*at most 2 .*train\.shards=3"):
        resolve(paths, tiny_spec(train={"shards": shards}), 3, 1)


def test_a_damaged_frozen_spec_is_named(paths: RunPaths) -> None:
    paths.spec.write_text("train: [")
    with pytest.raises(SpecError, match=r"spec\.yaml: not readable"):
        read_frozen(paths)


@pytest.mark.parametrize("recorded", [0, 1, 2])
def test_a_submission_whose_job_never_trained_fixes_nothing(paths: RunPaths, recorded: int) -> None:
    """It was killed half-way, its job was cancelled in the queue, or could not be started."""
    freeze(paths, tiny_spec())
    submitted = Submitted(scheduler="slurm", code="c", command="python submit.py")
    for event in (submitted, Attempted(restart_count=0, nodes="n"))[:recorded]:
        append_event(paths.events, event, job_id="7", restart=None, world_size=None)
    assert resolve(paths, tiny_spec(train={"seed": 1}), 1, 1).train.seed == 1


def test_checkpoints_alone_show_that_a_run_has_begun(paths: RunPaths) -> None:
    freeze(paths, tiny_spec())
    (paths.checkpoints / "step_00000001.pt").touch()
    with pytest.raises(SpecError, match=r"train\.seed: 0 -> 1"):
        resolve(paths, tiny_spec(train={"seed": 1}), 1, 1)


def test_a_wrong_spec_under_which_no_start_trained_does_not_keep_out_the_right_one(paths: RunPaths) -> None:
    """The logs were lost while the run was in the queue; then a wrong spec was submitted, whose start refused it."""
    wrong, right = tiny_spec(train={"seed": 1, "shards": 2}), tiny_spec(train={"shards": None})
    (paths.checkpoints / "step_00000001.pt").touch()
    freeze(paths, resolve(paths, wrong, 2, 1))
    submitted = Submitted(scheduler="slurm", code="c", command="python submit.py")
    for event in (submitted, Attempted(restart_count=0, nodes="n")):
        append_event(paths.events, event, job_id="7", restart=None, world_size=None)
    resolved = resolve(paths, right, 1, 1)
    assert (resolved.train.seed, resolved.train.shards) == (0, 2)  # the number that is known, not that of this start
    start(paths, resolved, 1)
    with pytest.raises(SpecError, match=r"train\.seed: 0 -> 1"):
        resolve(paths, wrong, 1, 1)


@pytest.mark.parametrize(
    ("step_in_epoch", "epochs", "words"),
    [
        (0, 5, None),
        (0, 4, "train.epochs: 4 is not allowed; allowed: 5 or more, since run demo-1 has done 5 epochs. HINT: another"),
        (9, 6, None),
        (9, 5, "train.epochs: 5 is not allowed; allowed: 6 or more, since run demo-1 has done 5 epochs and 9 steps."),
        (None, 1, None),  # a line that makes no sense: the start reads it in the checkpoint
    ],
)
def test_fewer_epochs_than_are_done_are_refused(
    paths: RunPaths, step_in_epoch: int | None, epochs: int, words: str | None
) -> None:
    start(paths, tiny_spec(train={"epochs": 40}), 1)
    saved = {"event": "checkpoint", "file": "a", "step": 109, "epoch": 5, "step_in_epoch": step_in_epoch, "bytes": 1}
    append_line(paths.events, json.dumps(saved))
    less = tiny_spec(train={"epochs": epochs})
    if words is None:
        assert resolve(paths, less, 1, 1).train.epochs == epochs
    else:
        with pytest.raises(SpecError, match=re.escape(words)):
            resolve(paths, less, 1, 1)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_something_else_in_the_place_of_the_frozen_spec_is_named(paths: RunPaths, make: Callable[[Path], None]) -> None:
    make(paths.spec)
    with pytest.raises(SpecError, match=r"spec\.yaml: is no regular file"):
        read_frozen(paths)

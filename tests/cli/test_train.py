"""The command train: its output; and whose spec is frozen where two processes begin one run at the same moment."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import yaml
from helpers import PROJECT, TINY

from cifar_hpc.__main__ import main
from cifar_hpc.cli.train import Screen
from cifar_hpc.errors import RunBusyError, SpecError
from cifar_hpc.runs import frozen_spec, lock
from cifar_hpc.runs.lock import RunLock, WriterLock, holder
from cifar_hpc.runs.logs import listeners, read_jsonl
from cifar_hpc.runs.paths import RunPaths
from cifar_hpc.training.process import StopFlag

KEYS = ["data.source=synthetic", "train.device=cpu", "lookahead.k=7"]
FROZEN = "lookahead: {k: 3}\n"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunPaths:
    """A run whose spec another process has frozen just now."""
    monkeypatch.setenv("CIFAR_HPC_ROOT", str(tmp_path))
    monkeypatch.setattr(StopFlag, "install", lambda self, **_: self)
    paths = RunPaths(tmp_path, "run")
    paths.create()
    paths.spec.write_text(FROZEN)
    return paths


def train() -> int:
    return main(["train", str(PROJECT / "jobs" / "demo.yaml"), "--name", "run", "--set", *KEYS])


def test_the_spec_of_a_run_that_others_train_or_submit_is_not_touched(
    run: RunPaths, capsys: pytest.CaptureFixture[str]
) -> None:
    submission, writer = RunLock(run.logs / "submit.lock"), WriterLock(run)
    for held, words in ((submission, "submitted by"), (writer, "already being trained by job 5")):
        held.acquire({"job_id": "5"})
        assert train() == RunBusyError.exit_code and words in capsys.readouterr().err
        held.release()
    assert run.spec.read_text() == FROZEN


def test_the_spec_is_frozen_under_the_locks(run: RunPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    def freeze(paths: RunPaths, *_: object) -> None:
        assert all(holder(path) is not None for path in (paths.logs / "submit.lock", paths.owner, paths.lock))
        raise SpecError("seen")

    monkeypatch.setattr(frozen_spec, "freeze", freeze)
    assert train() == SpecError.exit_code


def test_a_process_that_began_and_ended_meanwhile_has_fixed_the_spec(
    run: RunPaths, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def locked(*arguments: object) -> RunLock:
        run.events.write_text(json.dumps({"event": "started"}) + "\n")
        return RunLock(run.logs / "submit.lock")

    monkeypatch.setattr(lock, "lock_submission", locked)
    assert train() == SpecError.exit_code
    assert "lookahead.k: 3 -> 7" in capsys.readouterr().err and run.spec.read_text() == FROZEN


def begin(root: Path, *keys: str, redirected: str = "", **popen: Any) -> subprocess.Popen[bytes]:
    """Begin to train a tiny run in a process of its own."""
    job = root / "tiny.yaml"
    job.write_text(yaml.safe_dump(TINY))
    line = f'exec "$0" -m cifar_hpc train "$@" {redirected}'
    command = ["bash", "-c", line, sys.executable, str(job), "--name", "run", "--set", *(keys or ("train.epochs=1",))]
    return subprocess.Popen(command, cwd=PROJECT, env=os.environ | {"CIFAR_HPC_ROOT": str(root)}, **popen)


@pytest.mark.process
def test_each_line_of_the_log_is_printed_once(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path, "run")
    with begin(tmp_path, "train.epochs=1", "train.log_seconds=0.001", stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        head, printed = ["run run", f"log {paths.train_log}", "loading PyTorch"], process.stdout.read().decode()
    assert process.returncode == 0 and "\x1b" not in printed and "run ETA" in printed
    assert printed.splitlines() == [*head, *paths.train_log.read_text().splitlines()]


@pytest.mark.process
def test_on_a_terminal_a_bar_stands_below_the_lines(tmp_path: Path) -> None:
    ours, terminal = os.openpty()
    environment = {"TERM": "xterm", "COLUMNS": "80"}
    with mock.patch.dict(os.environ, environment), begin(tmp_path, "train.epochs=40", stdout=terminal) as process:
        os.close(terminal)
        seen, bar = "", re.compile(r"\r\x1b\[K(epoch \d+/40 \[#*-*\] \d+/9  [^\r]*)")
        with contextlib.suppress(OSError):  # EIO: the process has ended
            while content := os.read(ours, 4096):
                seen += content.decode()
                if bar.search(seen):
                    process.terminate()
    os.close(ours)
    assert process.returncode == 128 + signal.SIGTERM
    drawn = [text for text in re.split(r"\r\x1b\[K|\n", seen) if text.startswith("epoch ")]
    assert drawn and max(map(len, drawn)) < 80
    assert seen.count("STOPPED by SIGTERM") == 1 and seen.endswith("\r\x1b[K"), "nothing is left of the bar"


@pytest.mark.process
@pytest.mark.parametrize("redirected", [">/dev/full", ">&-", "| true"])
def test_no_output_ends_no_training(tmp_path: Path, redirected: str) -> None:
    process = begin(tmp_path, redirected=redirected.replace("|", "> >(") + ")" * redirected.startswith("|"))
    assert process.wait() == 0
    assert read_jsonl(RunPaths(tmp_path, "run").events)[-1]["event"] == "finished"


@pytest.mark.process
def test_a_reader_that_stands_still_does_not_stop_training(tmp_path: Path) -> None:
    """A pipe is full after 64 KiB, and a terminal after Ctrl-S takes nothing."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    with contextlib.suppress(BlockingIOError):
        while os.write(write, b"x" * 512):
            pass
    os.set_blocking(write, True)
    with begin(tmp_path, stdout=write) as process:
        assert process.wait() == 0
    assert read_jsonl(RunPaths(tmp_path, "run").events)[-1]["event"] == "finished"
    os.close(write)
    os.close(read)


def test_other_ranks_print_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Screen(RunPaths(tmp_path, "run"), enabled=False):
        assert RunPaths(tmp_path, "run").train_log not in listeners
    assert capsys.readouterr().out == ""

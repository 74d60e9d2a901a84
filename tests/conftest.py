"""Fixtures for all tests."""

from __future__ import annotations

import itertools
import json
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import TESTS, Ranks, leftovers
from processes import Runs

from cifar_hpc.__main__ import main
from cifar_hpc.runs import logs
from cifar_hpc.runs.logs import read_jsonl
from cifar_hpc.training.process import STOP_SIGNALS

# A shell without job control lets what it runs in the background ignore SIGINT, and so would every test's children.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def global_switches() -> Iterator[None]:
    """Switches of PyTorch, handlers of signals and kept lines of logs are as before after each test."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    handlers = {number: signal.getsignal(number) for number in (*STOP_SIGNALS, signal.SIGCONT, signal.SIGINT)}
    yield
    for number, handler in handlers.items():  # of a run that was played in this very process
        signal.signal(number, handler)
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)
    logs._kept.clear()  # lines that a test's full disk has refused; the next run to finish would wait for them


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


# ------------------------------------------------------------------------------------------- which tests run where

STARTING = {"ranks", "runs", "tiny_run"}  # fixtures that start processes


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--share", type=Path, help="a folder: run the modules that no other pytest that has it has begun")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what uses a fixture that starts processes, or a real Slurm; skip what needs a GPU where there is none."""
    no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(no_gpu)
        if STARTING.intersection(getattr(item, "fixturenames", ())) or item.get_closest_marker("slurm"):
            item.add_marker("process")


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> bool | None:
    """With --share: run a module after the other, those that start processes first since they take longest."""
    folder = session.config.option.share
    if folder is None or session.testsfailed:
        return None
    modules = [list(items) for _, items in itertools.groupby(session.items, lambda item: item.path)]
    modules.sort(key=lambda items: -sum("process" in item.keywords for item in items))
    mine = (item for items in modules if begin(folder, items[0].path) for item in items)
    item = next(mine, None)
    while item is not None:
        following = next(mine, None)  # decides which fixtures end with this test
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        if session.shouldfail:
            raise session.Failed(session.shouldfail)
        if session.shouldstop:
            raise session.Interrupted(session.shouldstop)
        item = following
    return True


def begin(folder: Path, module: Path) -> bool:
    """Whether no other pytest has begun this module; from now on, none does."""
    try:
        (folder / module.relative_to(TESTS).as_posix().replace("/", "-")).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def watch_starts(event: str, arguments: tuple[Any, ...]) -> None:
    """An audit hook: only tests that are marked may start Python."""
    if event == "os.fork" or (event == "subprocess.Popen" and arguments[0] == sys.executable):
        assert running is None or "process" in running.keywords, f"{running.nodeid} is to be marked with process"


running: pytest.Item | None = None
sys.addaudithook(watch_starts)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    global running
    running = item
    try:
        return (yield)
    finally:
        running = None


@pytest.fixture
def look(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[[Runs, str], dict[str, Any]]:
    """Reads what must not depend on how a run of two epochs came to its end."""

    def sums(runs: Runs, name: str) -> dict[str, Any]:
        monkeypatch.setenv("CIFAR_HPC_ROOT", str(runs.root))
        capsys.readouterr()
        assert main(["inspect", name, "--json"]) == 0
        rows = read_jsonl(runs.root / "logs" / name / "metrics.jsonl")
        assert [row["epoch"] for row in rows] == [1, 2] and leftovers(runs.root) == []
        figures = [(row["train_loss"], row["test_loss"], row["test_accuracy"]) for row in rows]
        return {"figures": figures, **json.loads(capsys.readouterr().out)["sums"]}

    return sums

"""The cache of status: it saves reading, and is never believed about a file that is not what it was."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from cifar_hpc.runs import history as restarts
from cifar_hpc.runs import history as run_facts
from cifar_hpc.runs import history_cache as facts_cache
from cifar_hpc.runs import logs as runlog
from cifar_hpc.runs.history import Facts, read_facts
from cifar_hpc.runs.history_cache import FactsCache
from cifar_hpc.runs.paths import RunPaths

ROW = '{"epoch": 1, "test_accuracy": 50.5}\n'


@pytest.fixture
def paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunPaths:
    """A run that was written long enough ago; the cache is written for one run, too."""
    monkeypatch.setattr(facts_cache, "SETTLED_SECONDS", -1)
    monkeypatch.setattr(facts_cache, "WORTH_WRITING", 1)
    result = RunPaths(tmp_path, "run")
    result.create()
    result.events.write_text('{"event": "started"}\n')
    result.metrics.write_text(ROW)
    return result


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The runs whose logs were read."""
    names: list[str] = []

    def counting(paths: RunPaths) -> Facts:
        names.append(paths.name)
        return read_facts(paths)

    monkeypatch.setattr(facts_cache, "read_facts", counting)
    return names


def look(*runs: RunPaths) -> list[Facts]:
    """One call of status."""
    cache = FactsCache(runs[0].root)
    found = [cache.facts(run) for run in runs]
    cache.save()
    return found


def test_what_has_not_changed_is_not_read_again(paths: RunPaths, reads: list[str]) -> None:
    assert look(paths) == look(paths) == [read_facts(paths)]
    assert reads == ["run"]


def append(path: Path) -> None:
    with path.open("a") as file:
        file.write(ROW.replace("50.5", "60.5"))


def rewrite_with_the_same_size_and_time(path: Path) -> None:
    times = path.stat()
    path.write_text(path.read_text().replace("1", "2").replace("started", "resumed"))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def replace(path: Path) -> None:
    other = path.with_name("other")
    other.write_text(path.read_text().replace("50.5", "70.5"))
    other.replace(path)


def empty(path: Path) -> None:
    path.write_text("")


@pytest.mark.parametrize("change", [append, rewrite_with_the_same_size_and_time, replace, empty, Path.unlink])
@pytest.mark.parametrize("name", ["events", "metrics"])
def test_any_change_of_a_log_is_seen(
    paths: RunPaths, reads: list[str], change: Callable[[Path], Any], name: str
) -> None:
    look(paths)
    change(getattr(paths, name))
    assert look(paths) == look(paths) == [read_facts(paths)]
    assert reads == ["run", "run"]


def test_a_log_that_was_made_since_is_seen(paths: RunPaths) -> None:
    paths.metrics.unlink()
    assert look(paths)[0].last_row == {}
    paths.metrics.write_text(ROW)
    assert look(paths)[0].best_accuracy == 50.5


def test_a_log_that_was_just_written_is_read_each_time(
    paths: RunPaths, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(facts_cache, "SETTLED_SECONDS", 3600)
    look(paths)
    look(paths)
    assert reads == ["run", "run"]


def test_a_log_that_changes_while_it_is_read_is_not_kept(paths: RunPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(run: RunPaths) -> Facts:
        facts = read_facts(run)
        append(run.metrics)
        return facts

    with monkeypatch.context() as patch:
        patch.setattr(facts_cache, "read_facts", slow)
        look(paths)
    assert look(paths)[0].best_accuracy == 60.5


def cut(cache: Path) -> None:
    cache.write_bytes(cache.read_bytes()[:-5])


def lie(cache: Path) -> None:
    cache.write_bytes(cache.read_bytes().replace(b"50.5", b"99.9"))


def fifo(cache: Path) -> None:
    cache.unlink()
    os.mkfifo(cache)


@pytest.mark.parametrize("damage", [cut, lie, fifo, empty])
def test_a_damaged_cache_is_made_anew(paths: RunPaths, reads: list[str], damage: Callable[[Path], None]) -> None:
    cache = paths.root / "logs" / ".status-cache"
    look(paths)
    damage(cache)
    assert look(paths)[0].best_accuracy == 50.5
    assert look(paths)[0].best_accuracy == 50.5
    assert reads == ["run", "run"]


@pytest.mark.parametrize("module", [runlog, restarts, run_facts])
def test_a_cache_of_other_code_is_not_used(
    paths: RunPaths, reads: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, module: ModuleType
) -> None:
    look(paths)
    (tmp_path / "changed.py").write_text("# changed")
    monkeypatch.setattr(module, "__file__", str(tmp_path / "changed.py"))
    look(paths)
    assert reads == ["run", "run"]


def test_where_the_cache_cannot_be_written_nothing_is_lost(paths: RunPaths, reads: list[str]) -> None:
    (paths.root / "logs" / ".status-cache").mkdir()
    assert look(paths) == look(paths) == [read_facts(paths)]
    assert reads == ["run", "run"]
    assert [p.name for p in (paths.root / "logs").iterdir() if p.suffix == ".tmp"] == []


def test_a_log_that_is_no_file_is_as_without_a_cache(paths: RunPaths, reads: list[str]) -> None:
    paths.events.unlink()
    os.mkfifo(paths.events)
    look(paths)
    assert look(paths) == [read_facts(paths)]
    assert reads == ["run", "run"]


def test_runs_that_are_gone_leave_the_cache(paths: RunPaths) -> None:
    other = RunPaths(paths.root, "other")
    other.create()
    look(paths, other)
    append(paths.metrics)
    look(paths)
    content = (paths.root / "logs" / ".status-cache").read_bytes()
    assert list(json.loads(content[facts_cache.DIGEST_BYTES :])) == ["run"]


def test_a_few_runs_leave_no_cache_behind(paths: RunPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(facts_cache, "WORTH_WRITING", 2)
    look(paths)
    assert not (paths.root / "logs" / ".status-cache").exists()

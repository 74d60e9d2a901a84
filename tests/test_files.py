"""Atomic writes: the old file or the new one, whatever goes wrong in between."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from helpers import leftovers

from cifar_hpc.files import write_atomic


def test_creates_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for content in (b"one", b"", b"three" * 1000):
        write_atomic(path, content)
        assert path.read_bytes() == content
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_a_failure_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    path = tmp_path / "a.json"
    write_atomic(path, b"old")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    if broken == "fsync":
        monkeypatch.setattr(os, "fsync", fail)
    else:
        monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="No space"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert leftovers(tmp_path) == []


def test_content_is_synced_before_the_name_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, order = tmp_path / "a.json", []
    fsync, replace = os.fsync, Path.replace

    def seen_fsync(descriptor: int) -> None:
        order.append("sync folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "sync file")  # noqa: PTH112
        fsync(descriptor)

    def seen_replace(self: Path, target: Path) -> Path:
        order.append("rename")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", seen_fsync)
    monkeypatch.setattr(Path, "replace", seen_replace)
    write_atomic(path, b"x")
    assert order == ["sync file", "rename", "sync folder"]

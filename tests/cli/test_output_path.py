"""Where a command is to write is looked at before it works."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from cifar_hpc.cli.terminal import output_file, output_folder
from cifar_hpc.errors import SpecError


def test_files_that_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    old, link = tmp_path / "old.csv", tmp_path / "link.csv"
    old.write_text("x")
    link.symlink_to(old)
    assert output_file("new.csv") == tmp_path / "new.csv"
    assert output_file("old.csv", ".csv") == old
    assert output_file("link.csv") == old  # so that the link stays one


@pytest.mark.parametrize(
    ("out", "words"),
    [
        ("/dev/null", "is no regular file but a device"),
        (".", "not allowed"),
        ("", "not allowed"),
        ("none/x.csv", r"there is no folder .*none. HINT: mkdir -p"),
        ("file/x.csv", "there is no folder"),
        ("folder", "is no regular file but a directory"),
        ("fifo", "is no regular file but a FIFO"),
        ("circle", "cannot be written|no regular file"),
        ("locked/x.csv", "not writable by you"),
        ("a\0b", "cannot be written"),
    ],
)
def test_files_that_cannot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str, words: str) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("folder", "locked"):
        (tmp_path / name).mkdir()
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "circle").symlink_to("circle")
    real = os.access  # root may write everywhere
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "locked" and real(path, mode))
    with pytest.raises(SpecError, match=rf"^--out: .*({words})"):
        output_file(out)


def test_a_name_has_to_end_as_it_should() -> None:
    for name in ("model.pt", ".safetensors", "model.safetensors/"):
        with pytest.raises(SpecError, match=re.escape("ends with .safetensors")):
            output_file(name, ".safetensors")


def test_folders_are_made(tmp_path: Path) -> None:
    assert output_folder(str(tmp_path / "a" / "b")).is_dir()
    (tmp_path / "file").touch()
    for name in ("file", "file/x"):
        with pytest.raises(SpecError, match=r"^--out: .* cannot be made"):
            output_folder(str(tmp_path / name))

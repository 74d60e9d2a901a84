"""The copy of the code that a job runs."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cifar_hpc.launch.snapshot import take_snapshot
from cifar_hpc.runs import paths as module
from cifar_hpc.runs.paths import PACKAGE, RunPaths, package_files


@pytest.mark.process
def test_the_copy_is_whole_and_runs_by_itself(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path, "run")
    code = take_snapshot(paths)
    where = "import cifar_hpc, cifar_hpc.cli.submit; print(cifar_hpc.__file__)"
    result = subprocess.run([sys.executable, "-c", where], cwd=code, capture_output=True, text=True, check=False)
    assert Path(result.stdout.strip()) == code / "cifar_hpc" / "__init__.py", result.stderr
    assert take_snapshot(paths) == code
    assert [p.name for p in paths.code.iterdir()] == [code.name]


def test_an_editors_lock_is_no_part_of_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = take_snapshot(RunPaths(tmp_path, "one")) / PACKAGE.name
    monkeypatch.setattr(module, "PACKAGE", package)
    (package / "runs" / ".#state.py").symlink_to("me@host.123:456")
    assert [file.name for file in package_files() if file.name.startswith(".")] == []
    monkeypatch.setattr("cifar_hpc.launch.snapshot.PACKAGE", package)
    assert take_snapshot(RunPaths(tmp_path, "two")).name == package.parent.name


def edit(code: Path) -> None:
    module = code / "cifar_hpc" / "launch" / "worker.py"
    module.chmod(0o644)
    module.write_text(module.read_text() + "import evil\n")


def tear(code: Path) -> None:
    (code / "cifar_hpc" / "errors.py").unlink()


def add(code: Path) -> None:
    (code / "torch.py").write_text("import evil\n")  # found before the real one, from a job's working directory


def compiled(code: Path) -> None:
    (code / "cifar_hpc" / "__pycache__").mkdir()
    (code / "cifar_hpc" / "__pycache__" / "worker.cpython-311.pyc").write_bytes(b"evil")


def link(code: Path) -> None:
    code.rename(code.with_name("elsewhere"))
    code.symlink_to("elsewhere")


def link_inside(code: Path) -> None:
    module = code / "cifar_hpc" / "launch" / "worker.py"
    (code.parent / "worker.py").write_bytes(module.read_bytes())
    module.unlink()
    module.symlink_to(code.parent / "worker.py")


def open_to_all(code: Path) -> None:
    (code / "cifar_hpc" / "launch" / "worker.py").chmod(0o666)


def fifo(code: Path) -> None:
    os.mkfifo(code / "cifar_hpc" / "pipe.py")


@pytest.mark.parametrize("plant", [edit, tear, add, compiled, link, link_inside, open_to_all, fifo])
def test_what_is_not_this_very_code_is_never_run(tmp_path: Path, plant: Callable[[Path], None]) -> None:
    paths = RunPaths(tmp_path, "run")
    code = take_snapshot(paths)
    good = content(code)
    plant(code)
    assert content(code) != good or plant is open_to_all or code.is_symlink()
    assert take_snapshot(paths) == code and not code.is_symlink()
    assert content(code) == good
    assert not list(paths.code.glob(".*"))


def content(code: Path) -> dict[str, bytes | str]:
    return {
        str(p.relative_to(code)): str(p.readlink()) if p.is_symlink() else p.read_bytes() if p.is_file() else ""
        for p in code.rglob("*")
    }


def test_nobody_else_may_write_a_snapshot(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        code = take_snapshot(RunPaths(tmp_path, "run"))
    finally:
        os.umask(before)
    modes = {p: p.stat().st_mode for p in [code.parent, code, *code.rglob("*")]}
    assert not [p for p, mode in modes.items() if mode & stat.S_IWOTH]
    assert not [p for p, mode in modes.items() if p.suffix == ".py" and mode & (stat.S_IWUSR | stat.S_IWGRP)]


def test_what_a_killed_submission_left_is_removed(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path, "run")
    torn = paths.code / ".0123456789ab.4242.tmp"
    torn.mkdir(parents=True)
    (torn / "half.py").touch()
    code = take_snapshot(paths)
    assert list(paths.code.iterdir()) == [code]

"""The copy of the code that a job runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from cifar_hpc.paths import RunPaths
from cifar_hpc.snapshot import take_snapshot


def test_the_copy_is_whole_and_runs_by_itself(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path, "run")
    code = take_snapshot(paths)
    where = "import cifar_hpc, cifar_hpc.submit; print(cifar_hpc.__file__)"
    result = subprocess.run([sys.executable, "-c", where], cwd=code, capture_output=True, text=True, check=False)
    assert Path(result.stdout.strip()) == code / "cifar_hpc" / "__init__.py", result.stderr
    assert take_snapshot(paths) == code
    assert [p.name for p in paths.code.iterdir()] == [code.name]

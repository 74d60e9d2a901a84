"""Starting a run on this machine, where the start itself fails."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cifar_hpc.config.spec import Spec
from cifar_hpc.errors import SchedulerError
from cifar_hpc.launch import executors as launcher
from cifar_hpc.runs.paths import RunPaths


def test_a_local_start_that_fails_says_why_in_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> str:
        raise OSError("no room for \udcff")

    monkeypatch.setattr(launcher, "_start_local", fail)
    paths = RunPaths(tmp_path, "run")
    paths.create()
    with pytest.raises(SchedulerError, match=r"did not start; see .*controller\.log"):
        launcher.submit_local(paths, Spec(), tmp_path, lambda job_id: None)
    log = (paths.slurm / "controller.log").read_text()
    assert log.startswith("Traceback") and log.endswith("OSError: no room for \\udcff\n")

"""A sweep whose submission is killed: whatever it had done, the next one goes on, and a job that exists can run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import PROJECT, TESTS

PATIENCE_SECONDS = 300  # only bounds how long a hang lasts


@pytest.mark.process
def test_a_killed_submission_of_a_sweep_hinders_no_later_one(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", str(TESTS / "crashing_sweep.py"), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(PROJECT)},
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    killed = done.stdout.splitlines()
    assert sum(line.endswith(" 0 queued") for line in killed) > 20
    assert sum(line.endswith(" 2 queued") for line in killed) > 2

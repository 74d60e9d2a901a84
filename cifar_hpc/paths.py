"""Where a run's files stand."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from cifar_hpc.errors import SpecError, nearest


def project_root() -> Path:
    """The folder that holds checkpoints/ and logs/: $CIFAR_HPC_ROOT, else the one that holds the package."""
    return Path(os.environ.get("CIFAR_HPC_ROOT") or Path(__file__).resolve().parent.parent).resolve()


@dataclass(frozen=True)
class RunPaths:
    """The files of one run."""

    root: Path
    name: str

    @property
    def logs(self) -> Path:
        return self.root / "logs" / self.name

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints" / self.name

    @property
    def spec(self) -> Path:
        return self.logs / "spec.yaml"

    @property
    def train_log(self) -> Path:
        return self.logs / "train.log"

    @property
    def metrics(self) -> Path:
        return self.logs / "metrics.jsonl"

    @property
    def events(self) -> Path:
        return self.logs / "events.jsonl"

    @property
    def lock(self) -> Path:
        return self.logs / "run.lock"

    @property
    def code(self) -> Path:
        return self.logs / "code"

    @property
    def slurm(self) -> Path:
        return self.logs / "slurm"

    def create(self) -> None:
        """Make the directories.

        Raises:
            SpecError: names the directory that cannot be made or written.
        """
        for directory in (self.logs, self.checkpoints, self.slurm):
            try:
                directory.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise SpecError(
                    f"{directory}: cannot be made: {error.strerror}. "
                    "HINT: set CIFAR_HPC_ROOT to a folder you can write."
                ) from None
            if not os.access(directory, os.W_OK | os.X_OK):
                raise SpecError(
                    f"{directory}: is not writable by you. HINT: set CIFAR_HPC_ROOT to a folder you can write."
                )


def all_runs(root: Path) -> list[RunPaths]:
    """Every run that has a spec, by name."""
    return [RunPaths(root, p.parent.name) for p in sorted((root / "logs").glob("*/spec.yaml"))]


def find_run(root: Path, name: str) -> RunPaths:
    """The run called `name`.

    Raises:
        SpecError: lists the nearest name where there is none.
    """
    paths = RunPaths(root, name)
    if paths.logs.is_dir() or paths.checkpoints.is_dir():
        return paths
    names = [r.name for r in all_runs(root)]
    known = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "") if names else "none yet"
    raise SpecError(f"{name}: no such run under {root / 'logs'}; runs: {known}." + nearest(name, names))

"""Site profiles, slurm/clusters/*.yaml: settings of a cluster, not of a job."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cifar_hpc.config.fields import build, option
from cifar_hpc.config.spec import ResourcesSpec
from cifar_hpc.config.yaml_loader import read_mapping
from cifar_hpc.errors import SpecError, nearest
from cifar_hpc.text import shown


@dataclass(frozen=True)
class Site:
    """A site profile."""

    resources: ResourcesSpec = field(default_factory=ResourcesSpec)
    setup: tuple[str, ...] = option((), "shell lines before training, such as module load")
    python: str | None = option(None, "command that runs Python on a compute node; null is this very Python")
    srun: tuple[str, ...] = option((), "further options of srun")
    gpus: str = option(
        "gpus-per-node={gpus}",
        "the option of sbatch that asks for a node's GPUs, such as gres=gpu:{gpus} or gpus-per-node=a100:{gpus}",
    )

    def gpu_option(self, gpus: int) -> tuple[str, str]:
        """(option of sbatch that requests so many GPUs on each node, its value)."""
        name, _, value = self.gpus.partition("=")
        return name, value.replace("{gpus}", str(gpus))


def clusters_directory() -> Path:
    """Folder of the site profiles."""
    return Path(__file__).resolve().parents[2] / "slurm" / "clusters"


def load_site(profile: str | None) -> tuple[Site, dict[str, Any]]:
    """Load a site profile; returns it and the resource keys that it sets, a layer below the job's own.

    Args:
        profile: a name in slurm/clusters, or a path; None is `default`.

    Raises:
        SpecError: names the file and lists the profiles there are.
    """
    path = _find(profile or "default")
    values = read_mapping(path)
    try:
        site = build(Site, values)
    except SpecError as error:
        raise SpecError(f"{path}: {error}") from None
    for line in site.setup:
        if re.match(r"\s*#\s*(SBATCH|PBS|BSUB)", line):
            raise SpecError(
                f"{path}: setup: {shown(line)} is not allowed; allowed: shell lines. HINT: options of sbatch belong "
                "into resources.sbatch, as option: value."
            )
    if re.fullmatch(r"(gpus-per-node|gres)=[^{}]*\{gpus\}[^{}]*", site.gpus) is None:
        raise SpecError(
            f"{path}: gpus: {shown(site.gpus)} is not allowed; allowed: gpus-per-node=... or gres=..., with {{gpus}} "
            "once for the number, such as gres=gpu:a100:{gpus}. HINT: without '--'; put it in quotes."
        )
    chosen = values.get("resources") or {}
    return site, {key: value for key, value in asdict(site.resources).items() if key in chosen}


def _find(profile: str) -> Path:
    if profile.endswith((".yaml", ".yml")):
        return Path(profile)
    directory = clusters_directory()
    names = sorted(p.stem for p in directory.glob("*.yaml"))
    if profile in names:  # and nothing else: a '/' or '..' would lead out of the directory
        return directory / f"{profile}.yaml"
    raise SpecError(
        f"--profile: {shown(profile)} is not in {directory}; there are: {', '.join(names)}, or a path ending in .yaml."
        + nearest(profile[:100], names)
    )

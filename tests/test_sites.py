"""Site profiles."""

from __future__ import annotations

from pathlib import Path

import pytest

from cifar_hpc.errors import SpecError
from cifar_hpc.sites import clusters_directory, load_site


@pytest.mark.parametrize("name", sorted(p.stem for p in clusters_directory().glob("*.yaml")))
def test_every_profile_is_readable(name: str) -> None:
    load_site(name)


def test_only_what_the_profile_names_is_laid_below_the_job(tmp_path: Path) -> None:
    path = tmp_path / "site.yaml"
    path.write_text("resources: {partition: gpu, time: 10:00}\nsetup: [module load cuda]\npython: python3\n")
    site, resources = load_site(str(path))
    assert resources == {"partition": "gpu", "time": "10:00"}
    assert site.setup == ("module load cuda",) and site.python == "python3"


def test_a_wrong_key_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "site.yaml"
    path.write_text("resources: {partitoin: gpu}\n")
    with pytest.raises(SpecError, match=r"site\.yaml: resources\.partitoin: unknown key.*did you mean 'partition'"):
        load_site(str(path))

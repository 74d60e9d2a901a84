"""The real sbatch reads from a batch script exactly the options that the spec has."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from batch_scripts import hostile_text, options, sbatch_arguments
from hypothesis import given, settings
from hypothesis import strategies as st

from cifar_hpc.config.io import Site
from cifar_hpc.config.spec import ResourcesSpec, Spec
from cifar_hpc.launch.batch_script import batch_script
from cifar_hpc.runs.paths import RunPaths

pytestmark = pytest.mark.slurm
FREE_TEXT = ("comment", "account", "qos", "constraint", "reservation")


def found_by_sbatch(cluster: Any, script: str, folder: Path) -> list[str]:
    """What sbatch itself says that it has found in the script; nothing is submitted."""
    path = folder / "script.sh"
    path.write_text(script, encoding="utf-8")
    done = subprocess.run(
        ["sbatch", "--test-only", "-vvvv", path], env=cluster.env, capture_output=True, timeout=60, check=False
    )
    words = done.stderr.decode()
    assert "Unmatched" not in words
    return re.findall(r'debug2: Found in script, argument "(.*)"$', words, re.M)


@given(texts=st.fixed_dictionaries(dict.fromkeys(FREE_TEXT, hostile_text())), user=hostile_text())
@settings(max_examples=15, derandomize=True, deadline=None, database=None)
def test_sbatch_finds_what_the_spec_says(
    minicluster: Any, tmp_path_factory: pytest.TempPathFactory, texts: dict[str, str], user: str
) -> None:
    spec = Spec(resources=ResourcesSpec(**texts, sbatch={"mail-user": f"x{user}"}))
    script = batch_script(RunPaths(Path("/my root"), "run"), spec, Site())
    found = found_by_sbatch(minicluster, script, tmp_path_factory.mktemp("script"))
    assert found == sbatch_arguments(script)  # so that what the tests without a Slurm check is what counts
    assert options(script).items() >= {**texts, "mail-user": f"x{user}"}.items()


def test_a_shells_quotes_are_not_sbatchs(minicluster: Any, tmp_path: Path) -> None:
    script = "#!/bin/bash\n#SBATCH --comment='a\\b'\n#SBATCH --account=\"x'#y\" # z\ntrue\n#SBATCH --hold\n"
    assert found_by_sbatch(minicluster, script, tmp_path) == ["--comment=ab", "--account=x'#y"]


def test_an_any_of_dependency_would_set_singleton_aside(minicluster: Any) -> None:
    """Why check_dependency refuses '?': Slurm turns every ',' of such a list into a '?'."""
    first = minicluster.sbatch("--hold", "--wrap=true")
    second = minicluster.sbatch(f"--dependency=singleton,afterany:{first}?afterok:{first}", "--hold", "--wrap=true")
    try:
        assert minicluster.job(second)["Dependency"].startswith("singleton(unfulfilled)?afterany")
    finally:
        minicluster.run(["scancel", first, second])

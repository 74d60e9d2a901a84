"""Fixtures that give tests a real Slurm on this machine (see slurm/minicluster)."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import pytest
from lab import PATIENCE, PROJECT, Lab, copy_project
from runs import Run

TOOL = Path(__file__).resolve().parents[2] / "slurm" / "minicluster" / "minicluster"
MISSING_PACKAGES = 3  # the tool's exit code
# 30 steps, of which 10 to 19 are the second epoch; four logical shards, so that one to four processes may train it.
SHORT = """
model: {width_multiplier: 0.125, stem_width: 16, blocks: [1, 1, 1], dropout: 0.1}
train: {epochs: 3, batch_size: 32, device: cpu, cpu_threads: 1, shards: 4, log_seconds: 1}
data: {source: synthetic, train_size: 300, test_size: 100}
lookahead: {k: 3, bn_batches: 2}
checkpoint: {every_steps: 4}
resources: {gpus_per_node: 0, tasks_per_node: 2, time: 30}
"""


def pytest_addoption(parser: pytest.Parser) -> None:
    told = "run on the Slurm of this Debian release (see minicluster tree), or on the `other` one than this machine's"
    parser.addoption("--slurm-release", help=told)


def clean_environment(slurm_conf: str) -> dict[str, str]:
    """Our environment without what a surrounding real Slurm job, or another cluster, put there."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH_", "SRUN_", "SQUEUE_", "SACCT_"))}
    return kept | {"SLURM_CONF": slurm_conf}


@dataclasses.dataclass(frozen=True)
class Minicluster:
    """A running cluster: its directory, and an environment in which Slurm's programs reach it."""

    dir: Path
    env: dict[str, str]

    def run(self, command: list[str], timeout: float = 60.0) -> subprocess.CompletedProcess[str]:
        """Run a program against this cluster; output captured as text, exit code unchecked."""
        return subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=timeout, check=False)

    def scontrol(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run scontrol."""
        return self.run(["scontrol", *arguments])

    def tool(self, command: str, *options: str) -> subprocess.CompletedProcess[str]:
        """Run the minicluster tool itself on this cluster's directory."""
        return self.run([sys.executable, str(TOOL), command, "--dir", str(self.dir), *options], timeout=120)

    def sbatch(self, *arguments: str) -> str:
        """Submit a job and return its id."""
        done = self.run(["sbatch", "--parsable", f"--chdir={self.dir}", "--output=/dev/null", *arguments])
        assert done.returncode == 0, done.stderr
        return done.stdout.strip().partition(";")[0]

    def job(self, job_id: str) -> dict[str, str]:
        """The fields of `scontrol show job`: JobState, Restarts, Reason, ... Values with blanks are cut."""
        shown = self.scontrol("show", "job", "-o", job_id)
        assert shown.returncode == 0, shown.stderr
        return {k: v for k, _, v in (word.partition("=") for word in shown.stdout.split())}

    def wait_for(self, job_id: str, timeout: float = 30.0, **fields: str) -> dict[str, str]:
        """Wait until the job's fields have these values; returns all fields."""
        end = time.monotonic() + timeout
        while not fields.items() <= (job := self.job(job_id)).items():
            if time.monotonic() > end:
                pytest.fail(f"job {job_id} did not reach {fields} within {timeout} s: {job}")
            time.sleep(0.2)
        return job


@pytest.fixture(scope="session")
def slurm_on_path(request: pytest.FixtureRequest) -> Iterator[None]:
    """With --slurm-release, Slurm's programs are those of that release for the whole session."""
    release = request.config.getoption("--slurm-release")
    with pytest.MonkeyPatch.context() as patch:
        if release:
            folder = request.getfixturevalue("other_slurm") if release == "other" else make_tree(release)
            patch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
        yield


@pytest.fixture(scope="session")
def other_slurm() -> str:
    """The folder of the programs of another Slurm than this machine's; skips where it cannot be made."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    own = subprocess.run(["/bin/sh", "-c", "slurmctld -V"], env={"PATH": path}, capture_output=True, text=True)
    return make_tree("trixie" if " 22." in own.stdout else "bookworm")


def make_tree(release: str) -> str:
    """minicluster tree; where that is not possible (no root, the archive is out of reach), the tests are skipped."""
    made = subprocess.run([sys.executable, TOOL, "tree", release], capture_output=True, text=True, check=False)
    if made.returncode != 0:
        (pytest.skip if made.returncode == MISSING_PACKAGES else pytest.fail)(made.stderr)
    return made.stdout.strip()


@pytest.fixture(scope="session")
def start_minicluster(slurm_on_path: None) -> Iterator[Callable[..., Minicluster]]:
    """A function (options of `up`) -> Minicluster. What it started is brought down as the session ends."""
    started: list[Minicluster] = []

    def start(*options: str) -> Minicluster:
        directory = Path(tempfile.mkdtemp(prefix="cm"))  # short: it holds unix sockets
        cluster = Minicluster(directory, clean_environment(str(directory / "slurm.conf")))
        started.append(cluster)
        done = cluster.tool("up", *options)
        if done.returncode == MISSING_PACKAGES:
            directory.rmdir()  # the tool looks for programs before it touches anything
            (pytest.fail if os.environ.get("REQUIRE_SLURM") == "1" else pytest.skip)(done.stderr)
        if done.returncode != 0:
            pytest.fail(f"minicluster up failed:\n{done.stdout}{done.stderr}")
        return cluster

    def terminated(number: int, frame: FrameType | None) -> None:
        pytest.exit("terminated", 128 + number)

    # A runner that cancels sends SIGTERM, which would end Python without any teardown.
    previous = signal.signal(signal.SIGTERM, terminated)
    try:
        yield start
    finally:
        signal.signal(signal.SIGTERM, previous)
        for cluster in started:
            if cluster.dir.exists():
                done = cluster.tool("down")
                if done.returncode != 0:
                    print(f"minicluster down: {done.stdout}{done.stderr}", file=sys.stderr)
                    shutil.rmtree(cluster.dir, ignore_errors=True)


@pytest.fixture(scope="session")
def minicluster(start_minicluster: Callable[..., Minicluster]) -> Iterator[Minicluster]:
    """The cluster shared by the session's tests: two nodes, and grace in which even a busy machine starts two ranks.

    SLURM_CONF points to it.
    """
    cluster = start_minicluster("--grace", "120")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(cluster.dir / "slurm.conf"))
        yield cluster


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CIFAR_HPC_ROOT of all runs."""
    return tmp_path_factory.mktemp("root")


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project, so that whoever edits the original during these minutes disturbs no test."""
    return copy_project(PROJECT, tmp_path_factory.mktemp("project"))


@pytest.fixture
def lab(root: Path, project: Path, minicluster: Minicluster) -> Iterator[Lab]:
    """The session's cluster, clear of jobs before and after."""
    yield from _clear_around(Lab(root, project, minicluster))


@pytest.fixture(scope="session")
def short_cluster(start_minicluster: Callable[..., Minicluster]) -> Minicluster:
    """A cluster with next to no grace, for what happens at its end."""
    return start_minicluster("--grace", "5", "--no-accounting")


@pytest.fixture
def short_lab(root: Path, project: Path, short_cluster: Minicluster) -> Iterator[Lab]:
    """The same on the cluster with next to no grace."""
    yield from _clear_around(Lab(root, project, short_cluster))


def _clear_around(lab: Lab) -> Iterator[Lab]:
    try:
        lab.clear()
        yield lab
    finally:
        lab.clear()


@pytest.fixture(scope="session")
def short(root: Path) -> str:
    """The job file of a short run."""
    path = root / "short.yaml"
    path.write_text(SHORT)
    return str(path)


@pytest.fixture(scope="session")
def reference(root: Path, project: Path, short: str, minicluster: Minicluster) -> Iterator[Callable[[], Run]]:
    """Begins the short run undisturbed, one plain process without Slurm; calling it waits for the end."""
    lab = Lab(root, project, minicluster)
    run = Run(lab, "reference")
    command = [sys.executable, "-m", "cifar_hpc", "train", short, "--name", run.name]
    with (root / "reference.out").open("w") as out:
        process = subprocess.Popen(command, cwd=project, env=lab.env, stdout=out, stderr=out)

    def finished() -> Run:
        assert process.wait(timeout=PATIENCE) == 0, (root / "reference.out").read_text()
        return run

    try:
        yield finished
    finally:
        process.kill()
        process.wait()

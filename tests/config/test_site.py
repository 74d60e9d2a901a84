"""Site profiles."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
from batch_scripts import options, run_with_stub_srun
from helpers import PROJECT

from cifar_hpc.cli import submit
from cifar_hpc.config.io import CLUSTERS, Site, check_resumable, load_site, load_values, new_spec, run_name
from cifar_hpc.config.sweep import Point
from cifar_hpc.errors import SpecError
from cifar_hpc.launch.submit import Order


@pytest.mark.parametrize("name", sorted(p.stem for p in CLUSTERS.glob("*.yaml")))
def test_every_profile_is_readable(name: str) -> None:
    load_site(name)


def test_only_what_the_profile_names_is_laid_below_the_job(tmp_path: Path) -> None:
    path = tmp_path / "site.yaml"
    path.write_text("resources: {partition: gpu, time: 10:00}\nsetup: [module load cuda]\npython: python3\n")
    site, layer = load_site(str(path))
    assert layer == {"resources": {"partition": "gpu", "time": "10:00"}, "notify": {}}
    assert site.setup == ("module load cuda",) and site.python == "python3"


def test_a_profile_may_say_who_is_told_and_a_job_may_say_otherwise(tmp_path: Path) -> None:
    site, job = tmp_path / "site.yaml", tmp_path / "job.yaml"
    site.write_text("notify: {command: tell me}\n")
    job.write_text("train: {epochs: 3}\n")
    _, layer = load_site(str(site))
    told = new_spec(load_values(job, [], layer))
    other = new_spec(load_values(job, ["notify.command=null"], layer))
    assert (told.notify.command, other.notify.command) == ("tell me", None)
    assert run_name("job", told) == run_name("job", other)
    check_resumable(told, other, "job")  # it may change while the run is under way


@pytest.mark.parametrize("job", ["improved_resnet", "improved_resnet_plus", "improved_resnet_fast"])
def test_the_projects_jobs_leave_nodes_and_gpus_to_the_site(tmp_path: Path, job: str) -> None:
    site = tmp_path / "site.yaml"
    site.write_text("resources: {nodes: 1-2, gpus_per_node: 4, time: 02:00:00}\n")
    found = new_spec(load_values(PROJECT / "jobs" / f"{job}.yaml", [], load_site(str(site))[1])).resources
    assert (found.nodes, found.gpus_per_node) == ("1-2", 4)
    assert (found.time == "02:00:00") == (job == "improved_resnet")  # the others say how long they take


def test_a_wrong_key_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "site.yaml"
    path.write_text("resources: {partitoin: gpu}\n")
    with pytest.raises(SpecError, match=r"site\.yaml: resources\.partitoin: unknown key.*did you mean 'partition'"):
        load_site(str(path))


@pytest.mark.parametrize(
    "gpus", ["gpu:4", "--gres=gpu:{gpus}", "gres=gpu", "gres={gpus}{gpus}", "time={gpus}", "gres={n}"]
)
def test_a_wrong_way_to_ask_for_gpus_names_the_right_ones(tmp_path: Path, gpus: str) -> None:
    path = tmp_path / "site.yaml"
    path.write_text(f'gpus: "{gpus}"\n')
    with pytest.raises(SpecError, match=r"site\.yaml: gpus: .*gres=gpu:a100:\{gpus\}"):
        load_site(str(path))


def test_the_number_of_gpus_goes_into_the_sites_option() -> None:
    assert Site().gpu_option(4) == {"gpus-per-node": "4"}
    assert Site(gpus="gres=gpu:a100:{gpus},nvme:900").gpu_option(2) == {"gres": "gpu:a100:2,nvme:900"}


@pytest.mark.parametrize(
    ("gpus", "asked", "option"),
    [
        ("gpus-per-node={gpus}", "a100:2", {"gpus-per-node": "a100:2"}),
        ("gpus-per-node={gpus}", "a100:0", {}),
        ("gres=gpu:{gpus}", "a100:2", {"gres": "gpu:a100:2"}),
        ("gres=nvme:9,gres/gpu:{gpus}", "a100:2", {"gres": "nvme:9,gres/gpu:a100:2"}),
        ("gres=gpu:gh200:{gpus}", "gh200:2", {"gres": "gpu:gh200:2"}),
        ("gpus-per-node=a100:{gpus}", "a100:2", {"gpus-per-node": "a100:2"}),
        (None, 4, {}),
        ("", 4, {}),
    ],
)
def test_a_type_of_gpu_fits_the_sites_option(gpus: str | None, asked: int | str, option: dict[str, str]) -> None:
    assert Site(gpus=gpus).gpu_option(asked) == option


@pytest.mark.parametrize("gpus", ["gres=gpu:gh200:{gpus}", "gpus-per-node=v100:{gpus}", None, ""])
def test_another_type_of_gpu_than_the_sites_is_refused(gpus: str | None) -> None:
    with pytest.raises(SpecError, match=r"resources\.gpus_per_node: 'a100:2' is not allowed; .*HINT: without 'a100:'"):
        Site(gpus=gpus).gpu_option("a100:2")


@pytest.mark.parametrize("gpus", ["null", '""'])
def test_a_site_without_gres_asks_for_no_gpus(dry_run: Callable[..., str], tmp_path: Path, gpus: str) -> None:
    path = tmp_path / "site.yaml"
    path.write_text(f"gpus: {gpus}\n")
    found = options(dry_run("--profile", str(path), "--gpus-per-node", "4"))
    assert not [name for name in found if name.startswith("g")] and found["ntasks-per-node"] == "4"


@pytest.fixture
def dry_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """submit.py --dry-run with these flags; returns the script."""
    monkeypatch.setenv("CIFAR_HPC_ROOT", str(tmp_path / "root"))

    def run(*flags: str) -> str:
        assert submit.main([*flags, "--name", "run", "--dry-run"]) == 0
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize(
    ("flags", "cores"),
    [
        ([], "4"),
        (["--gpus-per-node", "a100:2"], "4"),
        (["--cpus-per-task", "2"], "2"),
        (["--set", "resources.cpus_per_task=16"], "16"),
        (["--profile", "nyu-torch"], "8"),
        (["--sbatch", "cpus-per-gpu=6"], None),  # sbatch takes one of the two
        (["--gpus-per-node", "0"], None),
        (["--set", "train.device=cpu"], None),
    ],
)
def test_a_rank_on_a_gpu_gets_four_cores_unless_told_otherwise(
    dry_run: Callable[..., str], flags: list[str], cores: str | None
) -> None:
    """Slurm alone would give one. Since 22.05 srun has to be told as well."""
    script = dry_run(*flags)
    assert options(script).get("cpus-per-task") == cores
    assert (f" --cpus-per-task={cores} " in script) == (cores is not None)


def test_the_cores_of_a_rank_are_no_part_of_the_run(tmp_path: Path) -> None:
    """The default is not in the spec, so neither a run's name nor the threads of its ranks follow it."""
    spec = new_spec({})
    order = Order(tmp_path, [Point("run", {}, spec)], Site(), True)
    resolved = order.resolve(order.points[0])
    assert (resolved.resources.cpus_per_task, resolved.train.cpu_threads) == (None, 1)
    given = dataclasses.replace(spec, resources=dataclasses.replace(spec.resources, cpus_per_task=16))
    assert run_name("job", given) == run_name("job", spec)
    check_resumable(resolved, given, "run")  # its frozen spec may get a number later


def test_a_site_without_partition_and_with_preemption_by_comment(dry_run: Callable[..., str]) -> None:
    found = options(dry_run("--profile", "nyu-torch", "--account", "mine", "--gpus-per-node", "4"))
    assert "partition" not in found and "gpus-per-node" not in found
    assert found["comment"] == "preemption=yes;requeue=true"
    assert (found["account"], found["gres"], found["ntasks-per-node"]) == ("mine", "gpu:4", "4")


def test_a_site_with_accounts_and_gpus_of_a_type_by_gres(dry_run: Callable[..., str]) -> None:
    found = options(dry_run("--profile", "csc-roihu", "--account", "project_1", "--gpus-per-node", "4"))
    assert (found["account"], found["partition"], found["gres"]) == ("project_1", "gpumedium", "gpu:gh200:4")
    assert found["cpus-per-task"] == "72" and "gpus-per-node" not in found
    without = options(dry_run("--profile", "csc-roihu", "--set", "train.device=cpu"))
    assert "gres" not in without


def test_a_site_with_modules_and_a_container(
    dry_run: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = dry_run("--profile", "lumi", "--account", "project_1", "--gpus-per-node", "8")
    found = options(script)
    assert (found["partition"], found["gpus-per-node"], found["mem-per-gpu"]) == ("standard-g", "8", "60G")
    assert script.index("module load lumi-aif-singularity-bindings") < script.index("\nsrun ")
    words = run_with_stub_srun(f"module() {{ :; }}\nUSER=me\n{script}", tmp_path)
    container = words[words.index("singularity") :]
    assert container[1] == "run" and container[2].endswith(".sif")
    assert container[3] == "/scratch/project_465001234/me/cifar_hpc-env/bin/python"
    assert container[4:6] == ["-u", "-m"]


def test_a_command_with_arguments_and_quotes_runs_python(dry_run: Callable[..., str], tmp_path: Path) -> None:
    path = tmp_path / "site.yaml"
    path.write_text("""python: apptainer exec --nv --bind '/my data' "$HOME/x y.sif" python3\n""")
    words = run_with_stub_srun(f"HOME=/home/me\n{dry_run('--profile', str(path))}", tmp_path)
    begin = words.index("apptainer")
    assert words[begin : begin + 7] == [
        "apptainer",
        "exec",
        "--nv",
        "--bind",
        "/my data",
        "/home/me/x y.sif",
        "python3",
    ]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("nvme:100", "gpu:gh200:4,nvme:100"),
        ("gpu:4,nvme:100", "gpu:4,nvme:100"),
        ("shard:2", "shard:2"),
        ("none", "none"),
    ],
)
def test_gres_given_by_hand_stands_beside_the_sites_gpus(
    dry_run: Callable[..., str], given: str, expected: str
) -> None:
    flags = ("--account", "project_1", "--gpus-per-node", "4", "--sbatch", f"gres={given}")
    assert options(dry_run("--profile", "csc-roihu", *flags))["gres"] == expected


def test_an_option_given_by_hand_takes_the_place_of_the_sites(dry_run: Callable[..., str]) -> None:
    found = options(dry_run("--profile", "nyu-torch", "--sbatch", "gres=gpu:h200:2", "--gpus-per-node", "2"))
    assert found["gres"] == "gpu:h200:2"

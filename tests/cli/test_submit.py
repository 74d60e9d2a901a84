"""submit.py from the outside: what it prints, refuses, and leaves behind."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from batch_scripts import options
from helpers import PROJECT
from stub_slurm import StubSlurm

from cifar_hpc.cli import submit
from cifar_hpc.launch.batch_script import IGNORE_SIGNALS
from cifar_hpc.runs.lock import RunLock
from cifar_hpc.runs.paths import program
from cifar_hpc.slurm.options import left_out

SCRIPT = """\
#!/bin/bash

# Parameters
#SBATCH --account=lab
#SBATCH --comment='preemption=yes;requeue=true'
#SBATCH --constraint=a100
#SBATCH --cpus-per-task=8
#SBATCH --dependency=singleton,afterok:7
#SBATCH --exclude=n1
#SBATCH --exclusive
#SBATCH --gpus-per-node=4
#SBATCH --job-name=run
#SBATCH --mail-type=END
#SBATCH --mem=32G
#SBATCH --no-requeue
#SBATCH --nodelist=n2,n3
#SBATCH --nodes=1-2
#SBATCH --ntasks-per-node=4
#SBATCH --open-mode=append
#SBATCH --output='{logs}/%j_0_log.out'
#SBATCH --partition=gpu
#SBATCH --propagate=NONE
#SBATCH --qos=high
#SBATCH --reservation=r
#SBATCH --signal=USR2@120
#SBATCH --time=1-12

# setup
"""
COMMAND = """
# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output '{logs}/%j_%t_log.out' --kill-on-bad-exit=0 --wait=0 --cpus-per-task=8 \
{ignore}{python} -u -m submitit.core._submit '{logs}'
"""


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project root whose path has a quote-worthy blank; no Slurm in reach."""
    monkeypatch.setenv("CIFAR_HPC_ROOT", str(tmp_path / "my root"))
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    for name in ("SLURM_CONF", *left_out(os.environ)):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("cifar_hpc.slurm.client.shutil.which", lambda name: None)
    return tmp_path / "my root"


def job_file(tmp_path: Path, text: str) -> str:
    path = tmp_path / "job.yaml"
    path.write_text(text)
    return str(path)


def files_below(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*")} if folder.exists() else set()


def test_dry_run_prints_the_script_and_writes_nothing(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = (
        "--name run --partition gpu --account lab --qos high --time 1-12 --nodes 1-2 --gpus-per-node 4 "
        "--cpus-per-task 8 --mem 32G --constraint a100 --exclude n1 --nodelist n2,n3 --reservation r "
        "--dependency afterok:7 --comment preemption=yes;requeue=true --sbatch mail-type=END exclusive "
        "--no-requeue --dry-run"
    )
    assert submit.main(flags.split()) == 0
    script = capsys.readouterr().out
    words = {"logs": root / "logs" / "run" / "slurm", "python": sys.executable, "ignore": IGNORE_SIGNALS}
    assert script.startswith(SCRIPT.format(**words)) and COMMAND.format(**words) in script
    assert not root.exists()


@pytest.mark.parametrize(("limit", "seconds"), [("04:00:00", 120), ("4", 60), ("1", 15), ("00:20", 10)])
def test_the_warning_fits_into_the_time_limit(
    root: Path, capsys: pytest.CaptureFixture[str], limit: str, seconds: int
) -> None:
    assert submit.main(["--time", limit, "--dry-run"]) == 0
    assert f"#SBATCH --signal=USR2@{seconds}\n" in capsys.readouterr().out


def test_no_gpu_is_requested_for_the_cpu_but_the_tasks_stay(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert submit.main("--set train.device=cpu --gpus-per-node 2 --dry-run".split()) == 0
    script = capsys.readouterr().out
    assert "gpus" not in script and "#SBATCH --ntasks-per-node=2\n" in script and "--requeue\n" in script


@pytest.mark.parametrize(
    ("job", "arguments", "words"),
    [
        ("train:\n  epoch: 3\n", "", ["train.epoch: unknown key", "did you mean 'epochs'"]),
        ("trian: {}\n", "", ["trian: unknown key", "did you mean 'train'"]),
        ("{}\n", "--set train.epochs=-1", ["train.epochs: -1", "an integer >= 1"]),
        ("{}\n", "--set train.epochs=many", ["train.epochs: 'many'", "an integer"]),
        ("{}\n", "--set optimizer.lr=.nan", ["optimizer.lr: nan", "a number > 0"]),
        ("{}\n", "--set train.epochs", ["--set train.epochs", "key.path=value"]),
        ("{}\n", "--set data.source=cifar", ["data.source: 'cifar'", "did you mean 'cifar10'"]),
        ("{}\n", "--set resources.nodes=x --time 5", ["resources.nodes: 'x'"]),
        ("{}\n", "--set resources.nodes=x --nodes 0", ["--nodes: '0'"]),
        ("{}\n", "--time soon", ["--time: 'soon'", "D-HH:MM:SS"]),
        ("{}\n", "--nodes 3-1", ["--nodes: '3-1'", "MIN-MAX"]),
        ("{}\n", "--gpus-per-node two", ["--gpus-per-node: 'two'", "an integer"]),
        ("{}\n", "--gpus-per-node a100:2,v100:2", ["--gpus-per-node: 'a100:2,v100:2'", "all ranks"]),
        ("{}\n", "--gpus-per-node 2:4", ["--gpus-per-node: '2:4'", "such as a100:4"]),
        ("{}\n", "--gpus-per-node a100:9999", ["--gpus-per-node: 'a100:9999'"]),
        ("{}\n", "--gpus-per-node 9999", ["--gpus-per-node: '9999'", "<= 4096"]),
        ("{}\n", "--gpus-per-node a100:2 --profile csc-roihu --account a", ["--gpus-per-node: 'a100:2'", "gpu:gh200:"]),
        ("{}\n", "--name a/b", ["--name: 'a/b'"]),
        ("{}\n", "--profile nowhere", ["--profile: 'nowhere'", "default"]),
        ("{}\n", "--sbatch =x", ["--sbatch =x", "KEY=VALUE"]),
        ("{}\n", "--sbatch out=x", ["--sbatch out", "short for output", "logs/<run>/slurm"]),
        ("{}\n", "--sbatch job_name=x", ["--sbatch: the option 'job_name'", "did you mean 'job-name'"]),
        ("{}\n", "--sbatch a.b=x", ["--sbatch: the option 'a.b'"]),
        ("{}\n", "--dependency afterok:1?afterok:2", ["--dependency: 'afterok:1?afterok:2'", "singleton"]),
        ("{}\n", "--profile ../clusters/default", ["--profile: '../clusters/default' is not in"]),
        ("{}\n", "--nodes ²", ["--nodes: '²'"]),
        ("{}\n", "--time " + "9" * 400, ["--time: '999", "D-HH:MM:SS"]),
        ("resources: {sbatch: {hold: }}\n", "", ["resources.sbatch.hold: None", "allowed: text"]),
        ("resources: {comment: yes}\n", "", ["resources.comment: True", "HINT: put it in quotes"]),
        ('resources: {comment: "a\\nb"}\n', "", ["resources.comment: 'a\\nb'", "on one line, without '\\n'"]),
        ("{}\n", "--set train.shards=2 --nodes 3", ["3 ranks", "train.shards: 2"]),
        ("- a\n", "", ["job.yaml", "a mapping"]),
        ("a: [\n", "", ["job.yaml", "not readable as YAML", "line"]),
    ],
)
def test_bad_input_is_named(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], job: str, arguments: str, words: list[str]
) -> None:
    assert submit.main([job_file(tmp_path, job), *arguments.split(), "--cluster", "local"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "Traceback" not in error
    for word in words:
        assert word in error
    assert not root.exists()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("README.md", b"# A page\n**This: is: no job file**\n", ["not readable as YAML", "in line 2"]),
        ("notes.txt", b"some words", ["holds 'some words'; allowed: a mapping of sections"]),
        ("model.pt", b"\x80\x02\xff", ["is no text file"]),
        ("folder", None, ["is a folder."]),
    ],
)
def test_what_is_no_job_file_is_told_what_one_is(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: bytes | None, words: list[str]
) -> None:
    path = tmp_path / name
    path.mkdir() if content is None else path.write_bytes(content)
    assert submit.main([str(path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {path}: ") and "<unicode string>" not in error
    assert error.endswith(" HINT: a job file is YAML, such as jobs/demo.yaml.\n")
    assert all(word in error for word in words), error


def test_missing_job_file_suggests_a_name(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job_file(tmp_path, "{}")
    assert submit.main([str(tmp_path / "jobs.yaml")]) == 2
    assert f"did you mean '{tmp_path / 'job.yaml'}'" in capsys.readouterr().err


def test_missing_data_is_named_before_anything_is_written(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = "--cluster local --set train.device=cpu data.source=folder data.root=images".split()
    assert submit.main(arguments) == 2
    assert f"data.root: {root / 'images'} is no folder" in capsys.readouterr().err
    assert not root.exists()


@pytest.mark.process
def test_cifar10_that_cannot_be_downloaded_is_named(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "data").mkdir(parents=True)
    (root / "data" / "cifar-10-batches-py").write_text("a file where a folder should be")
    assert submit.main("--cluster local --set train.device=cpu".split()) == 2
    error = capsys.readouterr().err
    assert "holds no CIFAR-10 and the download failed" in error and "HINT" in error
    assert files_below(root) <= {
        "data",
        "data/cifar-10-batches-py",
        "data/cifar-10-python.tar.gz",
        "data/.cifar10.lock",
    }


def test_gpus_asked_for_on_a_machine_without(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cifar_hpc.launch.preflight.DEVICES", root / "no-device")
    assert submit.main("--cluster local --set data.source=synthetic".split()) == 2
    assert "this machine has none" in capsys.readouterr().err


def test_unwritable_directory_is_named(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root.mkdir()
    (root / "logs").write_text("a file, so that even root cannot make logs/run")
    assert submit.main("--cluster local --set train.device=cpu data.source=synthetic --name run".split()) == 2
    assert f"{root / 'logs' / 'run'}: cannot be made" in capsys.readouterr().err


def test_slurm_asked_for_where_there_is_none(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert submit.main("--cluster slurm --set data.source=synthetic".split()) == 3
    assert "sbatch is not on PATH" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags",
    [
        "--partition gpu",
        "--account lab",
        "--sbatch exclusive",
        "--set resources.qos=high",
        "--mem 8G",
        "--profile lumi",
    ],
)
def test_flags_that_mean_slurm_do_not_train_on_a_machine_without(
    root: Path, capsys: pytest.CaptureFixture[str], flags: str
) -> None:
    arguments = ["--set", "data.source=synthetic", "train.device=cpu", *flags.split()]
    assert submit.main(arguments) == 3
    error, given = capsys.readouterr().err, flags.partition("=")[0].removesuffix(" " + flags.rpartition(" ")[2])
    assert f"error: {given} needs Slurm: sbatch is not on PATH" in error and "--cluster local" in error
    # Who says that it is to be this machine is told that the flag would do nothing.
    assert submit.main([*arguments, "--cluster", "local"]) == 2
    assert f"error: {given}: has no effect with --cluster local" in capsys.readouterr().err
    assert not root.exists()


@pytest.mark.parametrize(
    ("flags", "found"),
    [
        ("--gpus-per-node a100:2", {"gpus-per-node": "a100:2", "ntasks-per-node": "2"}),
        ("--set resources.gpus_per_node=a100:2 train.device=cpu", {"ntasks-per-node": "2"}),
        ("--gpus-per-node 1g.5gb:2", {"gpus-per-node": "1g.5gb:2", "ntasks-per-node": "2"}),
        ("--time UNLIMITED", {"time": "UNLIMITED", "signal": "USR2@120"}),
        ("--time 0", {"time": "0", "signal": "USR2@120"}),
        ("--nodes 1,4", {"nodes": "1,4"}),
        ("--exclude bad/nodes --nodelist n[1-2]", {"exclude": f"{Path.cwd()}/bad/nodes", "nodelist": "n[1-2]"}),
        ("--mem 0 --sbatch begin=now+1hour", {"mem": "0", "begin": "now+1hour"}),
        ("--sbatch propagate=NOFILE", {"propagate": "NOFILE"}),
    ],
)
def test_what_sbatch_takes_is_taken(
    root: Path, capsys: pytest.CaptureFixture[str], flags: str, found: dict[str, str]
) -> None:
    assert submit.main([*flags.split(), "--dry-run"]) == 0
    script = options(capsys.readouterr().out)
    assert script.items() >= found.items()
    assert ("gpus-per-node" in script) == ("cpu" not in flags)


def test_the_script_names_what_it_does_not_hand_on(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SBATCH_PARTITION", "secret")
    assert submit.main(["--dry-run"]) == 0
    script = capsys.readouterr().out
    assert "\n# Not handed on from the environment of the submission: SBATCH_PARTITION SLURM_JOB_ID\n" in script
    assert "secret" not in script and options(script)["propagate"] == "NONE"


def test_a_run_being_trained_is_refused(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lock = RunLock(root / "logs" / "run" / "run.lock")
    lock.acquire({"job_id": "17", "host": "n1", "pid": 4242})
    arguments = "--cluster local --set train.device=cpu data.source=synthetic --name run --json".split()
    assert submit.main(arguments) == 4
    captured = capsys.readouterr()
    assert "job 17 (pid 4242 on n1)" in captured.err
    assert json.loads(captured.out)["exit_code"] == 4
    lock.release()


def test_another_spec_under_a_used_name_is_refused(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = root / "logs" / "run" / "spec.yaml"
    spec.parent.mkdir(parents=True)
    spec.write_text("optimizer:\n  lr: 0.1\ntrain:\n  epochs: 9\n  shards: 1\n")
    (spec.parent / "events.jsonl").write_text('{"event": "started"}\n')
    assert submit.main("--name run --set train.epochs=12 --dry-run".split()) == 2
    error = capsys.readouterr().err
    assert "optimizer.lr: 0.1 -> 0.05" in error and "train.epochs: 9" not in error


def test_sbatch_that_refuses_is_quoted_and_leaves_no_job(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    words = (
        f"printf 'sbatch: error: invalid partition\\nsbatch: error: it failed\\n' >&2; env > {programs}/seen; exit 1"
    )
    for name, body in (("sbatch", words), ("squeue", "exit 0")):
        program = programs / name
        program.write_text(f"#!/bin/sh\n{body}\n")
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.undo()
    monkeypatch.setenv("CIFAR_HPC_ROOT", str(root))
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}/usr/bin:/bin")
    monkeypatch.setenv("SBATCH_ACCOUNT", "lab")
    assert submit.main("--set data.source=synthetic --name run".split()) == 3
    captured = capsys.readouterr()
    assert captured.err.count("sbatch: error: invalid partition; sbatch: error: it failed") == 1 and captured.out == ""
    assert "HINT: SBATCH_ACCOUNT of the environment is not used" in captured.err
    seen = (programs / "seen").read_text()
    assert "SBATCH_ACCOUNT" not in seen and str(programs) in seen
    assert files_below(root / "logs" / "run" / "slurm") == set()
    assert not (root / "logs" / "run" / "events.jsonl").exists()


@pytest.mark.process
def test_it_is_found_where_python_leaves_its_folder_out(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONSAFEPATH": "1"}
    command = [sys.executable, str(PROJECT / "submit.py"), "--help"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.startswith("usage: submit.py"), done.stderr


@pytest.mark.process
def test_help_is_served_without_torch() -> None:
    code = "import sys, cifar_hpc.cli.submit as s\ntry: s.main(['--help'])\nexcept SystemExit: pass\n"
    code += "assert not {'torch', 'submitit', 'rich', 'yaml'} & set(sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "exit status" in result.stdout


def test_a_reader_that_has_gone_is_no_mistake_of_the_user(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(arguments: object) -> int:
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(submit, "_submit", gone)
    assert submit.main([]) == 141
    assert capsys.readouterr().err == ""


# ------------------------------------------------------------------ flags that would have no effect


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--cluster local --test-only", "--test-only: asks Slurm"),
        ("--cluster local --mem 8G", "--mem: has no effect with --cluster local"),
        ("--cluster local --comment x", "--comment: has no effect"),
        ("--cluster local --set resources.qos=a", "--set resources.qos: has no effect"),
        ("--cluster local --nodes 2", "--nodes: 2 needs Slurm"),
        ("--dry-run --follow", "--follow: not allowed with argument --dry-run"),
        ("--test-only --follow", "--follow: not allowed with argument --test-only"),
        ("--dry-run --test-only", "--test-only: not allowed with argument --dry-run"),
        (
            "--cluster local --cpus-per-task 2 --set train.cpu_threads=1",
            "--cpus-per-task: has no effect with train.cpu_",
        ),
        ("--dry-run --partition a --sbatch partition=b", "--partition: has no effect with --sbatch partition"),
        ("--dry-run --gpus-per-node 2 --ntasks-per-node 3", "--gpus-per-node: has no effect with train.device: cpu"),
    ],
)
def test_a_flag_without_an_effect_is_refused(
    root: Path, capsys: pytest.CaptureFixture[str], flags: str, words: str
) -> None:
    assert submit.main([*"--set data.source=synthetic train.device=cpu".split(), *flags.split()]) == 2
    captured = capsys.readouterr()
    assert words in captured.err and captured.out == "" and not root.exists()


def test_a_dry_run_on_this_machine_has_no_script(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = "--cluster local --dry-run --ntasks-per-node 2 --time 30 --no-requeue --cpus-per-task 1 --name run"
    assert submit.main([*"--set data.source=synthetic train.device=cpu".split(), *flags.split()]) == 0
    out = capsys.readouterr().out
    assert out.startswith("run          run\nstart        new run: 400 epochs, 2 ranks\ncluster      local\n")
    assert "SBATCH" not in out and not root.exists()


def test_processes_on_nodes_without_gpus(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = "--set train.device=cpu --gpus-per-node 0 --ntasks-per-node 6 --nodes 1-2 --dry-run"
    assert submit.main(flags.split()) == 0
    out = capsys.readouterr().out
    assert options(out)["ntasks-per-node"] == "6" and "# start        new run: 400 epochs, 6-12 ranks" in out
    assert submit.main("--ntasks-per-node 0".split()) == 2
    assert "--ntasks-per-node: 0 is not allowed" in capsys.readouterr().err


# ------------------------------------------------------------------ new, or from where


def begun(root: Path, *, world_size: int = 2) -> Path:
    """The folder of checkpoints of a run whose first attempt has saved steps 54 and 63."""
    logs, folder = root / "logs" / "run", root / "checkpoints" / "run"
    logs.mkdir(parents=True)
    folder.mkdir(parents=True)
    started = {"event": "started", "job_id": "1", "restart": 0, "world_size": world_size, "step": 0}
    logs.joinpath("events.jsonl").write_text(json.dumps(started) + "\n")
    entries = {}
    for step, epoch in ((54, 0), (63, 1)):
        (folder / f"step_{step:08d}.pt").write_bytes(b"x" * step)
        entries[f"step_{step:08d}.pt"] = {"step": step, "epoch": epoch, "bytes": step}
    (folder / "index.json").write_text(json.dumps({"checkpoints": entries, "best": None}))
    return folder


def started(root: Path, capsys: pytest.CaptureFixture[str]) -> tuple[str, dict[str, object]]:
    """Words and keys by which a dry run says where the run begins."""
    arguments = "--set data.source=synthetic train.device=cpu train.epochs=12 --name run --cluster local --dry-run"
    assert submit.main(arguments.split()) == 0
    words = capsys.readouterr().out.partition("start        ")[2].partition("\n")[0]
    assert submit.main([*arguments.split(), "--json"]) == 0
    return words, json.loads(capsys.readouterr().out)


def test_a_submission_says_where_the_run_goes_on(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words, answer = started(root, capsys)
    assert words == "new run: 12 epochs, 1 rank" and answer["new"] is True
    folder = begun(root)
    words, answer = started(root, capsys)
    assert words == "continues from step 63, epoch 2 of 12, 2 -> 1 rank"
    expected = {"new": False, "step": 63, "epoch": 1, "epochs": 12, "processes": 1, "processes_before": 2}
    assert answer.items() >= expected.items()

    (folder / "step_00000063.pt").write_bytes(b"cut")
    words, answer = started(root, capsys)
    assert words == "continues from step 54, epoch 1 of 12, 2 -> 1 rank; step_00000063.pt is newer, but damaged"
    assert (answer["step"], answer["damaged"]) == (54, "step_00000063.pt")
    (folder / "index.json").write_text("{")
    assert started(root, capsys)[0] == "continues from step 63, 2 -> 1 rank"
    (folder / "index.json").unlink()
    for path in folder.iterdir():
        path.unlink()
    assert started(root, capsys)[0] == "begins again from step 0, epoch 1 of 12, 2 -> 1 rank"


def test_a_finished_run_says_so(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begun(root)
    with (root / "logs" / "run" / "events.jsonl").open("a") as file:
        file.write('{"event": "finished", "epoch": 12}\n')
    assert submit.main("--set train.epochs=12 --name run --dry-run --json".split()) == 0
    assert json.loads(capsys.readouterr().out)["state"] == "finished"


# ------------------------------------------------------------------ names that are nearly right


@pytest.mark.parametrize("name", ["demo", "jobs/demo", "demo.yaml", "Demo.yml", "jobs/dmeo.yaml"])
def test_a_job_file_that_is_nearly_right_is_found_from_any_folder(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert submit.main([name]) == 2
    error = f"error: {name}: there is no such job file. HINT: did you mean 'jobs/demo.yaml'?\n"
    assert capsys.readouterr().err == error
    assert submit.main(["jobs/demo.yaml", "--dry-run"]) == 0
    captured = capsys.readouterr()
    assert (
        captured.err
        == f"note: jobs/demo.yaml is not in this folder: the project's is taken, {PROJECT}/jobs/demo.yaml\n"
    )
    assert "#SBATCH --job-name=demo-" in captured.out

    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "demo.yaml").write_text("{}")
    assert submit.main(["jobs/demo.yaml", "--dry-run"]) == 0
    captured = capsys.readouterr()
    assert captured.err == "" and "new run: 400 epochs" in captured.out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--set lr=0.1", "lr: unknown key; * HINT: did you mean 'optimizer.lr'?"),
        ("--set epochs=3", "epochs: unknown key; * HINT: did you mean 'train.epochs'?"),
        ("--set Batch-Size=3", "Batch-Size: unknown key; * HINT: did you mean 'train.batch_size'?"),
        ("--set train.batch-size=3", "train.batch-size: unknown key; * HINT: did you mean 'batch_size'?"),
        ("--set train.lr=3", "train.lr: unknown key; * HINT: did you mean 'optimizer.lr'?"),
        ("--set cutmix=true", "cutmix: unknown key; * HINT: did you mean 'mixing.cutmix'?"),
        ("--set max=3", "max: unknown key; * HINT: did you mean 'failures.max' or 'timeouts.max'?"),
        ("--set cutmix", "--set cutmix: not understood; * HINT: did you mean 'mixing.cutmix'?"),
        (
            "--set train.seed=1 jobs/demo.yaml",
            "--set jobs/demo.yaml: not understood; * HINT: the job file comes first.",
        ),
        ("epochs=3", "epochs=3: there is no such job file. HINT: overrides come after --set"),
        ("--partion gpu", "unrecognized arguments: --partion. HINT: did you mean '--partition'?"),
        ("--cluster Slrum", "argument --cluster: invalid choice: 'Slrum' * HINT: did you mean 'slurm'?"),
    ],
)
def test_a_name_that_is_nearly_right_gets_the_right_hint(
    root: Path, capsys: pytest.CaptureFixture[str], arguments: str, words: str
) -> None:
    assert submit.main([*arguments.split(), "--dry-run"]) == 2
    begin, _, end = words.partition("*")
    error = capsys.readouterr().err
    assert error.startswith(f"error: {begin}") and error.endswith(f"{end}\n")


# ------------------------------------------------------------------ remarks, with scripted answers of Slurm

GPU = "PartitionName=gpu Default=YES MaxTime=01:00:00 State=UP TotalNodes=2"


@pytest.fixture
def site(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Slurm that knows one partition; --test-only lets any time limit pass, as Slurm 22.05 does."""
    monkeypatch.undo()
    stub = StubSlurm(tmp_path)
    bodies = {
        "sbatch": "for script; do :; done\n"
        'grep -q partition=gpus "$script" && echo "sbatch: error: invalid partition specified: gpus" && exit 1\n'
        'echo "sbatch: Job 7 to start at 2026-11-28T07:16:33 using 1 processors" >&2',
        "scontrol": f'echo "{GPU}"',
    }
    for name, body in bodies.items():
        (stub.programs / name).write_text(f"#!/bin/sh\n{body}\n")
        (stub.programs / name).chmod(0o755)
    for name, text in {**stub.environment, "CIFAR_HPC_ROOT": str(root)}.items():
        monkeypatch.setenv(name, text)
    monkeypatch.delenv("SLURM_CONF", raising=False)
    return root


def test_a_limit_that_sbatch_lets_pass_is_said(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert submit.main("--set data.source=synthetic --time 2:00:00 --test-only".split()) == 0
    captured = capsys.readouterr()
    assert "to start at 2026-11-28T07:16:33" in captured.out and "start        new run" in captured.out
    assert "note: the job may never start: gpu (the default): UP, 2 nodes, up to 01:00:00; --time" in captured.err
    assert submit.main("--set data.source=synthetic --time 1:00:00 --test-only".split()) == 0
    assert capsys.readouterr().err == ""


def test_a_partition_that_is_nearly_right_is_named(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for more in ([], ["--test-only"]):
        assert submit.main(["--set", "data.source=synthetic", "--partition", "gpus", *more]) == 3
        error = capsys.readouterr().err
        assert "gpus is not there; there are: gpu. HINT: did you mean 'gpu'?" in error, error


def test_keys_of_trackers_are_answered_at_submission(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert submit.main("--set tracking.wandb=online --name run --dry-run".split()) == 0
    error = capsys.readouterr().err
    assert error.startswith("note: tracking.*: jobs start no tracker. HINT: ")
    assert "-m cifar_hpc track run --tensorboard DIR, or --wandb online\n" in error


def test_the_lines_to_type_work_in_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(PROJECT)
    monkeypatch.setattr("shutil.which", lambda name: sys.executable)
    assert program() == "python -m cifar_hpc"
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.chdir(tmp_path)
    assert program() == f"cd {PROJECT} && {sys.executable} -m cifar_hpc"

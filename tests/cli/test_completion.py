"""Shell completion: real bash asked what it would offer."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from helpers import PROJECT

from cifar_hpc.__main__ import main
from cifar_hpc.cli import completion
from cifar_hpc.cli.completion import script


@pytest.fixture(scope="module")
def bash_script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("completion") / "script.bash"
    path.write_text(script("bash"))
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root with runs, one of them with a folder but no spec; the name of the root has a blank."""
    root = tmp_path / "my root"
    for name in ("dropout-0a", "dropout-1b", "other"):
        (root / "logs" / name).mkdir(parents=True)
        (root / "logs" / name / "spec.yaml").touch()
    (root / "logs" / "dropout-none").mkdir()
    return root


def offered(bash_script: Path, root: Path | None, line: str) -> list[str]:
    """What bash offers at the end of a line, as its programmable completion is called on Tab."""
    words = shlex.split(line) + ([""] if line.endswith(" ") else [])
    asked = f"""
        set -u
        source {shlex.quote(str(bash_script))}
        function=$(complete -p {Path(words[0]).name} | sed 's/.* -F \\([^ ]*\\) .*/\\1/')
        COMP_WORDS=({shlex.join(words)})
        COMP_CWORD={len(words) - 1}
        $function {shlex.quote(words[0])} {shlex.quote(words[-1])} {shlex.quote(words[-2])} 2>/dev/null
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    done = subprocess.run(
        ["bash", "--norc", "-c", asked],
        cwd=PROJECT,
        env={"PATH": os.environ["PATH"], **({} if root is None else {"CIFAR_HPC_ROOT": str(root)})},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stderr == ""
    return [word for word in done.stdout.splitlines() if word]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("cifar_hpc comp", ["compare", "completion"]),
        ("cifar_hpc status --w", ["--watch"]),
        ("cifar_hpc status dropout", ["dropout-0a", "dropout-1b"]),
        ("cifar_hpc status dropout-0a o", ["other"]),
        ("cifar_hpc inspect other --s", ["--step"]),
        ("cifar_hpc evaluate other --weights ", ["slow", "fast"]),
        ("cifar_hpc train jobs/de", ["jobs/demo.yaml"]),
        ("cifar_hpc doctor --profile nyu", ["nyu-torch"]),
        ("cifar_hpc completion ", ["bash", "zsh"]),
        ("python -m cifar_hpc canc", ["cancel"]),
        ("python -m cifar_hpc tail dropout-1", ["dropout-1b"]),
        ("python3 -m cifar_hpc requeue ot", ["other"]),
        ("submit.py --pro", ["--profile"]),
        ("./submit.py jobs/improved_resnet.y", ["jobs/improved_resnet.yaml"]),
        ("submit.py --set train.epoch", ["train.epochs="]),
        ("submit.py --set train.epochs=3 model.drop", ["model.dropout="]),
        ("submit.py --cluster ", ["auto", "slurm", "local"]),
        ("python submit.py --no", ["--nodes", "--nodelist", "--no-requeue"]),
        ("python ./submit.py --profile l", ["lumi"]),
        ("python other.py --no", []),
        ("python -m cifar_hp", []),
    ],
)
def test_bash_offers(bash_script: Path, root: Path, line: str, expected: list[str]) -> None:
    assert offered(bash_script, root, line) == expected


def test_runs_of_a_project_whose_path_needs_quotes(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = root.rename(tmp_path / "it's my $root")
    monkeypatch.setattr(completion, "PROJECT", project)
    path = tmp_path / "script.bash"
    path.write_text(script("bash"))
    assert offered(path, None, "cifar_hpc status dropout") == ["dropout-0a", "dropout-1b"]


def test_another_completion_of_python_is_kept(bash_script: Path, tmp_path: Path) -> None:
    twice = tmp_path / "twice.bash"
    before = "_theirs() { COMPREPLY=(theirs); }; complete -F _theirs python"
    twice.write_text(f"{before}\nsource {bash_script}\nsource {bash_script}\n")
    assert offered(twice, tmp_path, "python other.p") == ["theirs"]
    assert offered(twice, tmp_path, "python -m cifar_hpc canc") == ["cancel"]


def test_partitions_are_those_of_sinfo(bash_script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sinfo").write_text("#!/bin/sh\nprintf 'gpu\\ncpu\\n'\n")
    (tmp_path / "sinfo").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert offered(bash_script, tmp_path, "submit.py --partition g") == ["gpu"]


def test_the_function_runs_the_commands_from_any_folder(bash_script: Path, root: Path) -> None:
    done = subprocess.run(
        ["bash", "--norc", "-c", f"source {bash_script}; cd /; cifar_hpc status --json"],
        env={"PATH": "/usr/bin:/bin", "CIFAR_HPC_ROOT": str(root)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0 and "dropout-0a" in done.stdout, done.stderr


def test_zsh_has_the_same_commands_and_helpers() -> None:
    text = script("zsh")
    assert "compdef _shtab_cifar_hpc -N cifar_hpc" in text and "compdef _shtab_submit_py -N submit.py" in text
    assert "compdef _cifar_hpc_python python python3" in text
    for helper in set(completion.COMPLETERS.values()):
        assert f"\n{helper}() {{" in text and f":{helper}" in text, helper
    assert "@" not in "".join(line for line in text.splitlines() if "_cifar_hpc" in line).replace('"$@"', "")


def test_every_key_of_the_spec_is_offered() -> None:
    keys = re.findall(r"(?<![\w.])[a-z_0-9]+(?:\.[a-z_0-9]+)+(?== | ?='|=\")", script("bash"))
    assert {"train.epochs", "model.activation", "lookahead.k", "resources.sbatch"} <= set(keys)
    assert len(keys) == len(set(keys)) > 50


def test_another_shell_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "fish"]) == 2
    assert "invalid choice: 'fish'" in capsys.readouterr().err

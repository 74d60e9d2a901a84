"""Hostile input: whatever a value holds, it reaches Slurm and bash as that value, or it is refused by name."""

from __future__ import annotations

import io
import json
import os
import shlex
import sys
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from batch_scripts import hostile_text, options, run_with_stub_srun, sbatch_arguments
from hypothesis import given, settings
from hypothesis import strategies as st

from cifar_hpc.cli import submit
from cifar_hpc.config.io import load_site, load_spec
from cifar_hpc.config.yaml_loader import MAX_CHARACTERS, read_mapping
from cifar_hpc.errors import SpecError
from cifar_hpc.launch.batch_script import IGNORE_SIGNALS, SRUN_PATIENCE
from cifar_hpc.runs.paths import RunPaths, check_run_name, find_run, is_run_name, project_root

settings.register_profile("ci", derandomize=True, deadline=None, database=None)
settings.load_profile("ci")

TEXT_KEYS = ("account", "comment", "constraint", "exclude", "mem", "nodelist", "partition", "qos", "reservation")
CONTROL = st.sampled_from(["\n", "\r", "\0", "\x1b[2J", "\t", "\x7f", "\x85", "\u2028", "\ud800", "\n#SBATCH --hold\n"])


def dry_run(*arguments: str, root: str) -> tuple[int, str, str]:
    """(exit status, standard output, standard error) of submit.py --dry-run, in this process."""
    out, error = io.StringIO(), io.StringIO()
    with patch.dict(os.environ, CIFAR_HPC_ROOT=root), redirect_stdout(out), redirect_stderr(error):
        status = submit.main(["--name", "run", "--dry-run", *arguments])
    return status, out.getvalue(), error.getvalue()


def write_yaml(path: Path, values: Any) -> str:
    path.write_text(json.dumps(values, ensure_ascii=False), encoding="utf-8")
    return str(path)


TEXTS = {key: hostile_text(without="/" * (key in ("exclude", "nodelist"))) for key in TEXT_KEYS}  # with one: a file


@given(st.fixed_dictionaries(TEXTS), hostile_text(without="?"), hostile_text())
@settings(max_examples=100)
def test_every_value_reaches_sbatch_as_it_is(texts: dict[str, str], dependency: str, user: str) -> None:
    flags = [f"--{key}={value}" for key, value in texts.items()]
    status, script, error = dry_run(*flags, f"--dependency={dependency}", f"--sbatch=mail-user={user}", root="/r")
    assert status == 0, error
    bare = {"true": {"mail-user": None}, "false": {}}.get(user, {"mail-user": user})
    assert options(script) == {
        **texts,
        **bare,
        "cpus-per-task": "4",
        "dependency": f"singleton,{dependency}" if dependency else "singleton",
        "gpus-per-node": "1",
        "job-name": "run",
        "nodes": "1",
        "ntasks-per-node": "1",
        "open-mode": "append",
        "output": "/r/logs/run/slurm/%j_0_log.out",
        "propagate": "NONE",
        "requeue": None,
        "signal": "USR2@120",
        "time": "04:00:00",
    }


@given(hostile_text(without="%\\/"), st.lists(hostile_text(), max_size=2), hostile_text())
@settings(max_examples=25)
def test_bash_runs_nothing_but_srun_with_these_very_words(folder: str, srun: list[str], comment: str) -> None:
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory).resolve() / f"x{folder}"
        profile = write_yaml(Path(directory) / "site.yaml", {"srun": srun} if srun else {})
        status, script, error = dry_run(f"--profile={profile}", f"--comment={comment}", root=str(root))
        assert status == 0, error
        slurm = root / "logs" / "run" / "slurm"
        assert run_with_stub_srun(script, Path(directory)) == [
            "--unbuffered",
            "--output",
            f"{slurm}/%j_%t_log.out",
            *SRUN_PATIENCE,
            *srun,
            "--cpus-per-task=4",
            *shlex.split(IGNORE_SIGNALS),
            *(sys.executable, "-u", "-m", "submitit.core._submit", str(slurm)),
        ]
        assert options(script)["output"] == f"{slurm}/%j_0_log.out"


def test_the_reader_of_batch_scripts_sees_what_a_shells_quotes_do_to_sbatch() -> None:
    # What shlex.quote writes for a\b and for x\' is not what sbatch reads: the reason for slurm_parameters.in_script.
    assert sbatch_arguments("#SBATCH --comment='a\\b'") == ["--comment=ab"]
    assert sbatch_arguments("#SBATCH --a='x y' --b # c") == ["--a=x y", "--b"]
    assert sbatch_arguments("#!/bin/bash\n\n#SBATCH --a\n# b\ntrue\n#SBATCH --c") == ["--a"]
    with pytest.raises(ValueError, match="Unmatched"):
        sbatch_arguments("#SBATCH --comment='x\\'")


@given(st.sampled_from([*TEXT_KEYS, "dependency"]), hostile_text(), CONTROL, hostile_text())
@settings(max_examples=60)
def test_control_characters_are_refused_by_key_and_value(key: str, before: str, control: str, after: str) -> None:
    for flag in (f"--{key}={before}{control}{after}", f"--sbatch=comment={before}{control}{after}"):
        status, script, error = dry_run(flag, root="/r")
        assert (status, script) == (2, "")
        assert error.startswith(f"error: --{key}: " if flag.startswith(f"--{key}=") else "error: --sbatch comment: ")
        assert "control characters" in error and error.count("\n") == 1 and "\x1b" not in error


@given(hostile_text() | st.text(max_size=120) | st.from_regex(r"[A-Za-z0-9._-]{1,101}", fullmatch=True))
def test_a_run_stays_below_its_root_or_is_refused(name: str) -> None:
    if is_run_name(name):
        root = Path("/r")
        assert (
            check_run_name(name) == name and Path(os.path.normpath(RunPaths(root, name).logs)).parent == root / "logs"
        )
    else:
        with pytest.raises(SpecError, match=r"^--name: "):
            check_run_name(name)


@pytest.mark.parametrize("name", ["..", "../other", ".", "", "/", "a\nb", "x" * 5000, "\x1b[2J", "\0"])
def test_commands_never_look_outside_the_logs(tmp_path: Path, name: str) -> None:
    (tmp_path / "logs" / "run").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    with pytest.raises(SpecError, match="no such run"):
        find_run(tmp_path, name)
    assert find_run(tmp_path, "run").name == "run"


@given(hostile_text() | st.text())
def test_a_profile_is_one_of_those_there_are_or_refused(name: str) -> None:
    if name != "" and not name.endswith((".yaml", ".yml")):
        with pytest.raises(SpecError, match=r"^--profile: "):
            load_site(name)


@pytest.mark.parametrize("name", ["../clusters/default", "./default", "/etc/passwd", "x" * 300, "a\0b"])
def test_a_profile_that_leads_elsewhere_is_refused(name: str) -> None:
    with pytest.raises(SpecError, match=r"^--profile: "):
        load_site(name)


@pytest.mark.parametrize("line", ["#SBATCH --hold", "  #SBATCH --hold", "# PBS -h", "#BSUB -H"])
def test_options_in_setup_lines_are_refused(tmp_path: Path, line: str) -> None:
    with pytest.raises(SpecError, match=r"site\.yaml: setup: .* resources\.sbatch"):
        load_site(write_yaml(tmp_path / "site.yaml", {"setup": [line]}))
    with pytest.raises(SpecError, match=r"site\.yaml: setup: .*control characters"):
        load_site(write_yaml(tmp_path / "site.yaml", {"setup": [f"true\n{line}"]}))


@pytest.mark.parametrize("name", ["a%jb", "a\\b", "a\nb", "a\x1bb", "a\udcffb"])
def test_a_root_that_slurm_would_read_differently_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("CIFAR_HPC_ROOT", str(tmp_path / name))
    with pytest.raises(SpecError, match=r"^CIFAR_HPC_ROOT: .* is not allowed"):
        project_root()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Mem-Per-CPU", r"the option 'Mem-Per-CPU' .* did you mean 'mem-per-cpu'"),
        ("mail_type", r"the option 'mail_type' .* did you mean 'mail-type'"),
        ("a=b", r"the option 'a=b'"),
        ("hold --uid=0", r"the option 'hold --uid=0'"),
        ("-hold", r"the option '-hold'"),
        ("hold-", r"the option 'hold-'"),
        ("", r"the option ''"),
        ("job-name", r"job-name: is set by cifar_hpc itself\. HINT: use --name"),
        ("out", r"out: is set by cifar_hpc itself \(it is short for output\)"),
        ("wait", r"wait: .* --follow"),
        ("parsable", r"parsable: .* --json"),
        ("e", r"short for error"),
    ],
)
def test_options_that_cannot_go_through(tmp_path: Path, name: str, message: str) -> None:
    job = Path(write_yaml(tmp_path / "job.yaml", {"resources": {"sbatch": {name: "x"}}}))
    with pytest.raises(SpecError, match=rf"^resources\.sbatch.*{message}"):
        load_spec(job)


def laughs(levels: int, merge: bool = False) -> str:
    """Nine aliases of nine aliases of ...: less than a kilobyte that stands for 9 ** levels values."""
    lines = ["a0: &a0 {x: 1}" if merge else "a0: &a0 [1]"]
    for i in range(levels):
        ten = ", ".join([f"*a{i}"] * 9)
        lines.append(f"a{i + 1}: &a{i + 1} " + (f"{{<<: [{ten}]}}" if merge else f"[{ten}]"))
    return "\n".join(lines) + f"\ntrain: *a{levels}\n"


@pytest.mark.parametrize("merge", [False, True])
def test_an_alias_bomb_is_refused_and_costs_nothing(tmp_path: Path, merge: bool) -> None:
    job = tmp_path / "job.yaml"
    job.write_text(laughs(40, merge))
    with pytest.raises(SpecError, match=r"job\.yaml: .*stands for more than 10,000 values.*line \d"):
        read_mapping(job)


def test_aliases_of_reasonable_size_work(tmp_path: Path) -> None:
    job = tmp_path / "job.yaml"
    job.write_text("train: &t {epochs: 3}\nfailures: {<<: {max: 1}}\nmodel: {blocks: &b [4, 4], widths: *b}\n")
    assert load_spec(job).model.widths == (4, 4)


def test_a_file_without_an_end_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=f"is too long; allowed: {MAX_CHARACTERS:,} characters"):
        read_mapping(Path("/dev/zero"))
    job = tmp_path / "job.yaml"
    job.write_text("#" * (MAX_CHARACTERS + 1))
    with pytest.raises(SpecError, match="too long"):
        read_mapping(job)


@given(
    st.binary(max_size=300)
    | st.text().map(str.encode)
    | st.lists(st.sampled_from(list("{}[]:,-&*!|>'\"#%@`<= \nab1"))).map("".join).map(str.encode)
)
@settings(max_examples=300)
def test_any_file_is_a_spec_or_a_named_error(content: bytes) -> None:
    with tempfile.NamedTemporaryFile(suffix=".yaml") as job:
        job.write(content)
        job.flush()
        try:
            load_spec(Path(job.name))
        except SpecError as error:
            assert len(str(error)) < 5000

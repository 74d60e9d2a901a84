"""Batch scripts as sbatch and as bash read them, and text that tries to break out of them."""

from __future__ import annotations

import subprocess
from pathlib import Path

from hypothesis import strategies as st

from cifar_hpc.runs.logs import START_MARK
from cifar_hpc.text import control_character

HOSTILE = (
    " ", "'", '"', ";", "\\", "\\\\", "#", "`", "$", "&", "|", "<", ">", "(", ")", "{", "}", "[", "]", "*", "~", "!",
    "=", ",", ":", "%", "..", "/", "-", "--hold", " --hold", "#SBATCH --hold", "$(touch canary)", "`touch canary`",
    "; touch canary #", "' ; touch canary ; '", '" --hold "', "' --hold '", "\\' --hold \\'", "${PATH}", "é", "日",
    "😀", "\u00a0", "packjob", "x",
)  # fmt: skip


def hostile_text(without: str = "") -> st.SearchStrategy[str]:
    """Text of one line, mostly of quotes and commands, without the characters in `without`."""
    anything = st.characters(exclude_characters=without).filter(lambda c: control_character(c) is None)
    pieces = st.sampled_from([h for h in HOSTILE if not set(h) & set(without)]) | anything
    return st.lists(pieces, max_size=8).map("".join)


def sbatch_arguments(script: str) -> list[str]:
    """The arguments that sbatch finds in a script's #SBATCH lines, up to its first command.

    Slurm's src/sbatch/opt.c (_opt_batch_script, _get_argument) in Python; tests/slurm holds it against the real one.

    Raises:
        ValueError: where sbatch ends with "Unmatched".
    """
    found: list[str] = []
    for line in script.split("\n"):
        if line.startswith("#SBATCH"):
            found += _arguments(line.removeprefix("#SBATCH"))
        elif line.strip() and not line.lstrip().startswith("#"):
            break
    return found


def _arguments(line: str) -> list[str]:
    arguments: list[str] = []
    at = 0
    while True:
        while at < len(line) and line[at] in " \t\v\f\r":
            at += 1
        if at == len(line) or line[at] == "#":
            return arguments
        word, quote = "", ""
        while at < len(line) and (quote or line[at] not in " \t\v\f\r#"):
            character = line[at]
            at += 1
            if character == "\\":
                word += line[at : at + 1]
                at += 1
            elif quote:
                quote, word = ("", word) if character == quote else (quote, word + character)
            elif character in "'\"":
                quote = character
            else:
                word += character
        if quote:
            raise ValueError(f"Unmatched {quote} in {line}")
        arguments.append(word)


def options(script: str) -> dict[str, str | None]:
    """sbatch's options in a script; None for one without a value. Each may stand there once."""
    pairs = [argument.partition("=") for argument in sbatch_arguments(script)]
    assert all(name.startswith("--") for name, _, _ in pairs)
    found = {name.removeprefix("--"): value if equals else None for name, equals, value in pairs}
    assert len(found) == len(pairs), f"an option stands there twice: {pairs}"
    return found


def run_with_stub_srun(script: str, folder: Path) -> list[str]:
    """Run a script under bash in `folder`; returns the arguments of its srun, which does nothing else.

    Nothing but the script's own words may run: a file that it makes in `folder` fails the test.
    """
    programs, work = folder / "bin", folder / "work"
    programs.mkdir(exist_ok=True)
    work.mkdir(exist_ok=True)
    stub = programs / "srun"
    stub.write_text('#!/bin/sh\nprintf "%s\\0" "$@"\n')
    stub.chmod(0o755)
    (programs / "script.sh").write_text(script)
    subprocess.run(["bash", "-n", programs / "script.sh"], check=True, timeout=120)
    done = subprocess.run(
        ["bash", programs / "script.sh"],
        cwd=work,
        env={"PATH": f"{programs}:/usr/bin:/bin"},
        capture_output=True,
        timeout=120,
        check=True,
    )
    assert done.stderr == b"", done.stderr
    assert list(work.iterdir()) == []
    mark, _, words = done.stdout.partition(b"\n")
    assert mark.decode().startswith(START_MARK)
    return [word.decode() for word in words.split(b"\0")[:-1]]

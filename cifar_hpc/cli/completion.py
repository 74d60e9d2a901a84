"""python -m cifar_hpc completion SHELL: what makes bash or zsh complete our commands, through shtab.

Four spellings are completed: `cifar_hpc` (a shell function that the script defines, which works from any folder),
`python -m cifar_hpc`, `submit.py` and `python submit.py`. Runs, profiles and partitions are looked up by the shell
itself when Tab is pressed; no Python is started then.
"""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import sys
import typing
from collections.abc import Iterator
from typing import Any

import shtab

from cifar_hpc.cli.parser import parser as commands_parser
from cifar_hpc.cli.submit import build_parser as submit_parser
from cifar_hpc.config.spec import Spec
from cifar_hpc.errors import SpecError
from cifar_hpc.runs.paths import PROJECT

# What an argument is, by its metavar: the name of the function that completes it in either shell, or shtab's own.
KINDS: dict[str, Any] = {
    "RUN": "_cifar_hpc_runs",
    "PATTERN": "_cifar_hpc_runs",
    "RUN|FILE": "_cifar_hpc_runs_and_files",
    "JOB.yaml": "_cifar_hpc_job_files",
    "KEY.PATH=VALUE": "_cifar_hpc_keys",
    "NAME": "_cifar_hpc_profiles",
    "P": "_cifar_hpc_partitions",
    "DIR": shtab.DIRECTORY,
    "INPUT": shtab.FILE,
    "FILE.csv": shtab.FILE,
    "FILE.safetensors": shtab.FILE,
}


def completion(shell: str) -> int:
    """Print the script for `shell`: bash or zsh."""
    print(script(shell), end="")
    return 0


def script(shell: str) -> str:
    """The whole script, to be read by the shell at its start.

    Raises:
        SpecError: for any other shell.
    """
    if shell not in ("bash", "zsh"):
        raise SpecError(f"completion: {shell!r} is not allowed; allowed: bash, zsh.")
    helpers = BASH if shell == "bash" else ZSH
    words = {
        "@python@": shlex.quote(sys.executable),
        "@project@": shlex.quote(str(PROJECT)),
        "@keys@": " ".join(f"{key}=" for key in spec_keys()),
    }
    for placeholder, word in words.items():
        helpers = helpers.replace(placeholder, word)
    return "\n".join([*(shtab.complete(parser, shell) for parser in _parsers()), helpers])


def _parsers() -> list[argparse.ArgumentParser]:
    commands, submit = commands_parser(), submit_parser()
    commands.prog = "cifar_hpc"  # as which a shell knows it; python is the program that runs it
    for parser in (commands, submit):
        for action in _actions(parser):
            kind = KINDS.get(action.metavar) if isinstance(action.metavar, str) else None
            if kind is not None:
                action.complete = {"bash": kind, "zsh": kind} if isinstance(kind, str) else kind  # type: ignore[attr-defined]
    return [commands, submit]


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                yield from _actions(below)


def spec_keys(cls: type[Any] = Spec, above: str = "") -> list[str]:
    """Every dotted key of a job file."""
    hints = typing.get_type_hints(cls)
    keys: list[str] = []
    for field in dataclasses.fields(cls):
        dotted = f"{above}{field.name}"
        nested = dataclasses.is_dataclass(hints[field.name])
        keys += spec_keys(hints[field.name], f"{dotted}.") if nested else [dotted]
    return keys


# $1 is the beginning of the word.
BASH = r"""
cifar_hpc() { PYTHONPATH=@project@${PYTHONPATH:+:$PYTHONPATH} @python@ -m cifar_hpc "$@"; }

_cifar_hpc_runs() {
  local path root=@project@  # within quotes and braces its own quotes would be taken as they are
  for path in "${CIFAR_HPC_ROOT:-$root}"/logs/"$1"*/spec.yaml; do
    [[ -e $path ]] && path=${path%/*} && printf '%s\n' "${path##*/}"
  done
}
_cifar_hpc_runs_and_files() { _cifar_hpc_runs "$1"; compgen -f -- "$1"; }
_cifar_hpc_job_files() { compgen -f -X '!*.y*ml' -- "$1"; compgen -d -- "$1"; }
_cifar_hpc_keys() { compgen -W '@keys@' -- "$1"; }
_cifar_hpc_profiles() {
  local path
  for path in @project@/slurm/clusters/"$1"*.yaml; do
    [[ -e $path ]] && path=${path##*/} && printf '%s\n' "${path%.yaml}"
  done
}
_cifar_hpc_partitions() { compgen -W "$(sinfo --noheader --format=%R 2>/dev/null)" -- "$1"; }

# A key is followed by its value, not by a blank.
_cifar_hpc_complete() { "$@"; [[ ${COMPREPLY[0]-} == *= ]] && compopt -o nospace 2>/dev/null; return 0; }
_cifar_hpc_commands() { _cifar_hpc_complete _shtab_cifar_hpc "$@"; }
_cifar_hpc_submit() { _cifar_hpc_complete _shtab_submit_py "$@"; }
complete -o bashdefault -o default -F _cifar_hpc_commands cifar_hpc
complete -o bashdefault -o default -F _cifar_hpc_submit submit.py

# python -m cifar_hpc ... and python submit.py ... ; any other use of python is completed as it was before.
for _cifar_hpc_loader in _comp_load _completion_loader; do  # bash-completion's, which else waits for the first Tab
  declare -F "$_cifar_hpc_loader" >/dev/null && "$_cifar_hpc_loader" python 2>/dev/null
done
_cifar_hpc_found=$(complete -p python 2>/dev/null | sed -n 's/.* -F \([^ ]*\) .*/\1/p')
[[ $_cifar_hpc_found == _cifar_hpc_python ]] || _cifar_hpc_python_before=$_cifar_hpc_found
unset _cifar_hpc_loader _cifar_hpc_found
_cifar_hpc_python() {
  local skip=0
  [[ ${COMP_WORDS[1]-} == -m && ${COMP_WORDS[2]-} == cifar_hpc ]] && skip=2
  [[ ${COMP_WORDS[1]-} == submit.py || ${COMP_WORDS[1]-} == */submit.py ]] && skip=1
  if (( skip > 0 && COMP_CWORD > skip )); then
    COMP_WORDS=("${COMP_WORDS[@]:skip}")
    (( COMP_CWORD -= skip ))
    if (( skip == 2 )); then _cifar_hpc_commands; else _cifar_hpc_submit; fi
  elif [[ -n ${_cifar_hpc_python_before-} ]]; then
    "$_cifar_hpc_python_before" "$@"
  else
    COMPREPLY=()
  fi
}
complete -o bashdefault -o default -F _cifar_hpc_python python python3
"""

ZSH = r"""
cifar_hpc() { PYTHONPATH=@project@${PYTHONPATH:+:$PYTHONPATH} @python@ -m cifar_hpc "$@" }

_cifar_hpc_runs() {
  local root=@project@
  root=${CIFAR_HPC_ROOT:-$root}
  local -a runs=($root/logs/*/spec.yaml(N:h:t))
  compadd -a runs
}
_cifar_hpc_runs_and_files() { _cifar_hpc_runs; _files }
_cifar_hpc_job_files() { _files -g '*.(yaml|yml)' }
_cifar_hpc_keys() { local -a keys=(@keys@); compadd -S '' -a keys }
_cifar_hpc_profiles() {
  local -a names=(@project@/slurm/clusters/*.yaml(N:t:r))
  compadd -a names
}
_cifar_hpc_partitions() { local -a names=(${(f)"$(sinfo --noheader --format=%R 2>/dev/null)"}); compadd -a names }

# python -m cifar_hpc ... and python submit.py ... ; any other use of python is completed as it was before.
_cifar_hpc_python() {
  if (( CURRENT > 3 )) && [[ $words[2] == -m && $words[3] == cifar_hpc ]]; then
    shift 2 words; (( CURRENT -= 2 )); _shtab_cifar_hpc
  elif (( CURRENT > 2 )) && [[ ${words[2]:t} == submit.py ]]; then
    shift words; (( CURRENT -= 1 )); _shtab_submit_py
  elif (( $+functions[_python] )); then
    _python "$@"
  else
    _default "$@"
  fi
}
compdef _cifar_hpc_python python python3
"""

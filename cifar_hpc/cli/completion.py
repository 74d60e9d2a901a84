"""python -m cifar_hpc completion SHELL: a script that makes bash or zsh complete these commands, through shtab.

bash, in ~/.bashrc:   source <(python -m cifar_hpc completion bash)
zsh, in ~/.zshrc,
after compinit:       eval "$(python -m cifar_hpc completion zsh)"

(with the path of this Python in place of `python`, where it is not on PATH.)
Tab then completes commands, options, job files, profiles, partitions, runs and
the keys of --set, after `python -m cifar_hpc`, `python submit.py`,
`./submit.py` and `cifar_hpc`. The last one is a shell function that this
defines: the same commands from any folder.
"""

import argparse
import shlex
import sys
from pathlib import Path

from cifar_hpc.cli.parser import actions, build_parser
from cifar_hpc.cli.submit import build_parser as build_submit_parser
from cifar_hpc.config.io import flatten, to_plain
from cifar_hpc.config.spec import Spec
from cifar_hpc.runs.paths import PROJECT

EXAMPLES = ("bash", "zsh")

# Shell functions in completion.bash and completion.zsh that complete an argument, by its metavar. They find runs and
# profiles themselves: Tab starts no Python.
COMPLETERS = {
    **dict.fromkeys(("RUN", "PATTERN"), "_cifar_hpc_runs"),
    "RUN|FILE": "_cifar_hpc_runs_and_files",
    "JOB.yaml": "_cifar_hpc_job_files",
    "KEY.PATH=VALUE": "_cifar_hpc_keys",
    "NAME": "_cifar_hpc_profiles",
    "P": "_cifar_hpc_partitions",
    "DIR": "_cifar_hpc_directories",
    **dict.fromkeys(("INPUT", "FILE.csv", "FILE.html", "FILE.safetensors"), "_cifar_hpc_files"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=("bash", "zsh"))


def main(arguments: argparse.Namespace) -> int:
    """Print the script for a shell."""
    print(script(arguments.shell), end="")
    return 0


def script(shell: str) -> str:
    """The whole script, which the shell reads when it starts."""
    import shtab

    commands, submit = build_parser(), build_submit_parser()
    commands.prog = "cifar_hpc"  # its name for a shell, to which python is the program
    for action in (*actions(commands), *actions(submit)):
        if isinstance(action.metavar, str) and action.metavar in COMPLETERS:
            action.complete = dict.fromkeys(("bash", "zsh"), COMPLETERS[action.metavar])  # type: ignore[attr-defined]
    keys = " ".join(f"{key}=" for key in flatten(to_plain(Spec())))
    helpers = Path(__file__).with_suffix(f".{shell}").read_text().replace("@keys@", keys)
    helpers = helpers.replace("@python@", shlex.quote(sys.executable)).replace("@project@", shlex.quote(str(PROJECT)))
    return "\n".join([shtab.complete(commands, shell), shtab.complete(submit, shell), helpers])

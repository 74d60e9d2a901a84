"""The parser of python -m cifar_hpc, which collects the commands from their files.

A command is a module of this package with

    a docstring                whose first line is for readers of the code; the rest is the text of its --help
    EXAMPLES                   arguments of examples, such as "jobs/demo.yaml --name try"
    add_arguments(parser)
    main(arguments) -> int     which returns the exit status

Heavy packages (torch, numpy, matplotlib, rich, submitit, shtab) are imported inside its functions, and the module only
for its own command: --help stays fast.
"""

import argparse
import json
import re
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from cifar_hpc import __version__
from cifar_hpc.errors import SpecError, UserError, explain, nearest
from cifar_hpc.text import printable

COMMANDS = {  # module in this package: its line in the list of commands, in the order of --help
    "train": "train here: one process, or each process of torchrun",
    "status": "one line per run: state, epoch, accuracy, speed, time left, restarts",
    "show": "all about one run: state and why, position, restarts, epochs, hours, folders",
    "tail": "follow a run's train.log, from its beginning until the run ends",
    "inspect": "verify a checkpoint; show what it holds and its sha256 sums",
    "requeue": "requeue a running job, or let a requeued one start now",
    "cancel": "cancel a run's job; it saves a checkpoint first",
    "du": "disk use of runs: checkpoints, code, logs",
    "rm": "delete runs that have ended",
    "evaluate": "accuracy on the test set: all, by class, and which classes are confused",
    "predict": "the class of each image of a folder, an array file or a CIFAR pickle, as a CSV (ID,Labels)",
    "export": "the model as safetensors, with a card that says what it is and how to load it",
    "figures.plot": "figures of runs: accuracy, loss, learning rate, timeline, architecture",
    "compare": "a table of runs: what differs, accuracy (mean and std over seeds), time, restarts",
    "figures.report": "runs in one HTML file to send: table, figures, spec, restarts, hardware, log",
    "track": "show runs in TensorBoard or Weights & Biases, while they go on or afterwards",
    "doctor.doctor": "what would go wrong here: Slurm, partition, GPUs, file system, data, torch",
    "completion": "print the script that makes a shell complete commands, options and runs",
}
# Of an option that takes several values and may be repeated.
SEVERAL: dict[str, Any] = {"nargs": "+", "action": "extend", "default": []}
EPILOG = """examples:
  python -m cifar_hpc train jobs/demo.yaml --set train.epochs=2
  torchrun --nproc-per-node 4 -m cifar_hpc train jobs/improved_resnet.yaml
  python -m cifar_hpc status --watch
  python -m cifar_hpc plot 'improved_resnet-*' --out figures
  python -m cifar_hpc compare 'dropout-*' --markdown
  python -m cifar_hpc doctor --partition gpu --job
"""


class Parser(argparse.ArgumentParser):
    """Parser whose errors are ours, with the nearest option."""

    def error(self, message: str) -> NoReturn:
        unknown = re.search("unrecognized arguments: (--[^ =]+)|invalid choice: '([^']+)'", message)
        known = [name for a in actions(self) for name in (*a.option_strings, *(a.choices or ()))]
        hint = nearest(unknown[1] or unknown[2], known) if unknown else ""
        raise SpecError(f"{message}.{hint or f' HINT: {self.prog} --help'}")


def actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Arguments of a parser and of those below it."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                yield from actions(below)


def run_command(build: Callable[..., argparse.ArgumentParser], argv: Sequence[str], interrupted: str = "") -> int:
    """Run the command that `argv` names; returns the exit status. With --json an error is an object, too."""
    try:
        arguments = build(argv).parse_args(argv)
        from cifar_hpc.runs.paths import keep_others_out

        keep_others_out()
        status: int = arguments.main(arguments)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        message, status = interrupted, 130
    except BrokenPipeError:
        return 141  # the reader, such as head, has gone
    except (UserError, ImportError, OSError) as error:
        message, status = explain(error)
    if any(len(word) > len("--j") and "--json".startswith(word) for word in argv):
        print(json.dumps({"error": message or "interrupted", "exit_code": status}))
    if message:
        print(f"error: {printable(message)}", file=sys.stderr)
    return status


def note(words: str) -> None:
    """Print a remark that is no part of the answer."""
    print(f"note: {printable(words)}", file=sys.stderr)


def build_parser(argv: Sequence[str] | None = None) -> argparse.ArgumentParser:
    """The parser for `argv`: complete for the command in it, or for all commands if it is None."""
    form = argparse.RawDescriptionHelpFormatter
    text = "Train, watch, control and use runs. To submit one: python submit.py --help"
    top = Parser("python -m cifar_hpc", description=text, epilog=EPILOG, formatter_class=form)
    top.add_argument("--version", action="version", version=f"cifar_hpc {__version__}")
    parsers = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for path, line in COMMANDS.items():
        name = path.rpartition(".")[2]
        parser = parsers.add_parser(name, help=line, formatter_class=form)
        if argv is None or name in argv:
            command = import_module(f"cifar_hpc.cli.{path}")
            text = (command.__doc__ or "").partition("\n\n")[2].strip()
            parser.description = f"{textwrap.fill(f'{line[0].upper()}{line[1:]}.', 79)}\n\n{text}"
            lines = [f"python -m cifar_hpc {name} {example}" for example in command.EXAMPLES]
            folded = (textwrap.wrap(line, 75, break_long_words=False, break_on_hyphens=False) for line in lines)
            parser.epilog = "\n  ".join(["examples:", *(" \\\n      ".join(parts) for parts in folded)])
            command.add_arguments(parser)
            parser.set_defaults(main=command.main)
    return top


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that choose the weights of a run or a checkpoint file."""
    parser.add_argument("run", metavar="RUN|FILE", help="a run (its newest good checkpoint), or a checkpoint file")
    text = "slow: those that the run evaluates, Lookahead's slow or ema's averaged ones (default); or the fast ones"
    parser.add_argument("--weights", choices=("slow", "fast"), default="slow", help=text)


def job_file(name: str) -> Path:
    """The job file of that name: in the current folder, or else in the project's, which is noted.

    Raises:
        SpecError: there is neither; names a similar one of the project or in the same folder.
    """
    from cifar_hpc.runs.paths import PROJECT

    path, own = Path(name), PROJECT / name
    if path.exists():
        return path
    if own.exists():
        note(f"{name} is not in this folder: the project's is taken, {own}")
        return own
    known = {job.stem: str(job.relative_to(PROJECT)) for job in (PROJECT / "jobs").rglob("*.yaml")}
    known |= {job.stem: str(job) for job in path.parent.glob("*.yaml")}
    hint = " HINT: overrides come after --set" if "=" in name else nearest(path.stem, known, known)
    raise SpecError(f"{name}: there is no such job file.{hint}")

"""The parser of python -m cifar_hpc, which collects the commands from their files.

A command is a module of this package with

    HELP                       its line in the list of commands
    DESCRIPTION                the text of its --help
    EXAMPLES                   arguments of examples, such as "jobs/demo.yaml --name try"
    add_arguments(parser)
    main(arguments) -> int     which returns the exit status

Heavy packages (torch, numpy, matplotlib, rich, submitit, shtab) are imported inside its functions: --help stays fast.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib import import_module

COMMANDS = (  # modules in this package, in the order of --help
    "train",
    "status",
    "tail",
    "inspect",
    "requeue",
    "cancel",
    "evaluate",
    "predict",
    "export",
    "figures.plot",
    "compare",
    "track",
    "doctor.doctor",
    "completion",
)
EPILOG = """examples:
  python -m cifar_hpc train jobs/demo.yaml --set train.epochs=2
  torchrun --nproc-per-node 4 -m cifar_hpc train jobs/improved_resnet.yaml
  python -m cifar_hpc status --watch
  python -m cifar_hpc tail improved_resnet-1a2b3c4d
  python -m cifar_hpc plot 'improved_resnet-*' --out figures
  python -m cifar_hpc compare 'dropout-*' --markdown
  python -m cifar_hpc evaluate improved_resnet-1a2b3c4d
  python -m cifar_hpc doctor --partition gpu --job
"""


def build_parser(argv: Sequence[str] = ()) -> argparse.ArgumentParser:
    """The parser for `argv`. It imports the module of the command in it, or of all commands if there is none."""
    top = argparse.ArgumentParser(
        prog="python -m cifar_hpc",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Train, watch, control and use runs. To submit one: python submit.py --help",
    )
    parsers = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for path in [path for path in COMMANDS if argv and argv[0] == _name(path)] or COMMANDS:
        name, command = _name(path), import_module(f"cifar_hpc.cli.{path}")
        examples = "".join(f"\n  python -m cifar_hpc {name} {example}".rstrip() for example in command.EXAMPLES)
        parser = parsers.add_parser(
            name,
            help=command.HELP,
            description=f"{command.HELP[0].upper()}{command.HELP[1:]}.\n\n{command.DESCRIPTION}",
            epilog=f"examples:{examples}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_arguments(parser)
        parser.set_defaults(main=command.main)
    return top


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that choose the weights of a run or a checkpoint file."""
    parser.add_argument("run", metavar="RUN|FILE", help="a run (its newest good checkpoint), or a checkpoint file")
    parser.add_argument(
        "--weights",
        choices=("slow", "fast"),
        default="slow",
        help="slow: those that the run evaluates, Lookahead's slow or ema's averaged ones (default); or the fast ones",
    )


def _name(path: str) -> str:
    return path.rpartition(".")[2]

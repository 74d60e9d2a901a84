"""The parser of python -m cifar_hpc, which collects the commands from their files.

A command is a module of this package with

    DESCRIPTION                the text of its --help
    EXAMPLES                   arguments of examples, such as "jobs/demo.yaml --name try"
    add_arguments(parser)
    main(arguments) -> int     which returns the exit status

Heavy packages (torch, numpy, matplotlib, rich, submitit, shtab) are imported inside its functions, and the module only
for its own command: --help stays fast.
"""

import argparse
from collections.abc import Sequence
from importlib import import_module
from typing import Any

COMMANDS = {  # module in this package: its line in the list of commands, in the order of --help
    "train": "train here: one process, or each process of torchrun",
    "status": "one line per run: state, epoch, accuracy, speed, time left, restarts",
    "tail": "follow a run's train.log, from its beginning until the run ends",
    "inspect": "verify a checkpoint; show what it holds and its sha256 sums",
    "requeue": "requeue a running job, or let a requeued one start now",
    "cancel": "cancel a run's job; it saves a checkpoint first",
    "evaluate": "accuracy on the test set: all, by class, and which classes are confused",
    "predict": "the class of each image of a folder, an array file or a CIFAR pickle, as a CSV (ID,Labels)",
    "export": "the model as safetensors, with a card that says what it is and how to load it",
    "figures.plot": "figures of runs: accuracy, loss, learning rate, architecture, timeline",
    "compare": "a table of runs: what differs, accuracy (mean and std over seeds), time, restarts",
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
  python -m cifar_hpc tail improved_resnet-1a2b3c4d
  python -m cifar_hpc plot 'improved_resnet-*' --out figures
  python -m cifar_hpc compare 'dropout-*' --markdown
  python -m cifar_hpc evaluate improved_resnet-1a2b3c4d
  python -m cifar_hpc doctor --partition gpu --job
"""


def build_parser(argv: Sequence[str] | None = None) -> argparse.ArgumentParser:
    """The parser for `argv`: complete for the command in it, or for all commands if it is None."""
    form = argparse.RawDescriptionHelpFormatter
    text = "Train, watch, control and use runs. To submit one: python submit.py --help"
    top = argparse.ArgumentParser("python -m cifar_hpc", description=text, epilog=EPILOG, formatter_class=form)
    parsers = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for path, line in COMMANDS.items():
        name = path.rpartition(".")[2]
        parser = parsers.add_parser(name, help=line, formatter_class=form)
        if argv is None or name in argv:
            command = import_module(f"cifar_hpc.cli.{path}")
            parser.description = f"{line[0].upper()}{line[1:]}.\n\n{command.DESCRIPTION}"
            examples = [f"\n  python -m cifar_hpc {name} {example}".rstrip() for example in command.EXAMPLES]
            parser.epilog = "examples:" + "".join(examples)
            command.add_arguments(parser)
            parser.set_defaults(main=command.main)
    return top


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that choose the weights of a run or a checkpoint file."""
    parser.add_argument("run", metavar="RUN|FILE", help="a run (its newest good checkpoint), or a checkpoint file")
    text = "slow: those that the run evaluates, Lookahead's slow or ema's averaged ones (default); or the fast ones"
    parser.add_argument("--weights", choices=("slow", "fast"), default="slow", help=text)

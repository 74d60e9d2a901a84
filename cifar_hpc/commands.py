"""The arguments of python -m cifar_hpc COMMAND."""

from __future__ import annotations

import argparse

from cifar_hpc.manual import MANUAL

EXAMPLES = """examples:
  python -m cifar_hpc train jobs/demo.yaml --set train.epochs=2
  torchrun --nproc-per-node 4 -m cifar_hpc train jobs/improved_resnet.yaml
  python -m cifar_hpc status --watch
  python -m cifar_hpc tail improved_resnet-1a2b3c4d
  python -m cifar_hpc plot 'improved_resnet-*' --out figures
  python -m cifar_hpc compare 'dropout-*' --markdown
  python -m cifar_hpc evaluate improved_resnet-1a2b3c4d
  python -m cifar_hpc doctor --partition gpu --job
"""
WEIGHTS_HELP = "slow: those that the run evaluates, Lookahead's slow or ema's averaged ones (default); or the fast ones"


def parser() -> argparse.ArgumentParser:
    """The parser of all commands, which shell completion reads as well."""
    top = argparse.ArgumentParser(
        prog="python -m cifar_hpc",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Train, watch, steer and use runs. To submit one: python submit.py --help",
    )
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _train(commands)
    _watch(commands)
    _steer(commands)
    _use(commands)
    _figures(commands)
    _site(commands)
    return top


def _command(commands: argparse._SubParsersAction, name: str, text: str, *examples: str) -> argparse.ArgumentParser:  # type: ignore[type-arg]
    lines = "".join(f"\n  python -m cifar_hpc {name} {example}".rstrip() for example in examples)
    added: argparse.ArgumentParser = commands.add_parser(
        name,
        help=text,
        description=f"{text[0].upper()}{text[1:]}.\n\n{MANUAL[name]}",
        epilog=f"examples:{lines}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    return added


def _json(command: argparse.ArgumentParser) -> None:
    command.add_argument("--json", action="store_true", help="machine-readable")


def _train(commands: argparse._SubParsersAction) -> None:  # type: ignore[type-arg]
    train = _command(
        commands,
        "train",
        "train here: one process, or each process of torchrun",
        "jobs/demo.yaml --set train.epochs=2",
        "jobs/improved_resnet.yaml --set data.source=synthetic train.device=cpu --name try",
    )
    train.add_argument("job", metavar="JOB.yaml", help="what to train")
    train.add_argument(
        "--set",
        metavar="KEY.PATH=VALUE",
        nargs="+",
        action="extend",
        default=[],
        dest="overrides",
        help="override a key of the job",
    )
    train.add_argument("--name", metavar="RUN", help="the run's name (default: from what differs from the defaults)")


def _watch(commands: argparse._SubParsersAction) -> None:  # type: ignore[type-arg]
    status = _command(
        commands,
        "status",
        "one line a run: state, epoch, accuracy, speed, time left, restarts",
        "",
        "'dropout-*' --watch",
        "improved_resnet-1a2b3c4d --json",
    )
    status.add_argument("runs", metavar="RUN", nargs="*", help="only these runs; names or patterns such as 'dropout-*'")
    status.add_argument("--watch", action="store_true", help="redraw every few seconds until Ctrl-C")
    _json(status)

    tail = _command(
        commands,
        "tail",
        "follow a run's train.log, from its beginning until the run ends",
        "improved_resnet-1a2b3c4d",
        "improved_resnet-1a2b3c4d --epochs",
    )
    tail.add_argument("run", metavar="RUN")
    tail.add_argument("--epochs", action="store_true", help="only the rows of finished epochs")

    inspect = _command(
        commands,
        "inspect",
        "verify a checkpoint; show what it holds and its sha256 sums",
        "improved_resnet-1a2b3c4d",
        "improved_resnet-1a2b3c4d --step 3910 --json",
    )
    inspect.add_argument("run", metavar="RUN", help="a run, or a checkpoint file")
    inspect.add_argument("--step", type=int, metavar="S", help="the checkpoint of this step (default: the newest good)")
    _json(inspect)


def _steer(commands: argparse._SubParsersAction) -> None:  # type: ignore[type-arg]
    requeue = _command(
        commands, "requeue", "requeue a running job, or let a requeued one start now", "improved_resnet-1a2b3c4d"
    )
    requeue.add_argument("run", metavar="RUN")
    cancel = _command(commands, "cancel", "cancel a run's job; it saves a checkpoint first", "improved_resnet-1a2b3c4d")
    cancel.add_argument("run", metavar="RUN")


def _use(commands: argparse._SubParsersAction) -> None:  # type: ignore[type-arg]
    evaluate = _command(
        commands,
        "evaluate",
        "accuracy on the test set: all, by class, and who is taken for whom",
        "improved_resnet-1a2b3c4d",
        "checkpoints/improved_resnet-1a2b3c4d/best.pt --data ~/cifar-10 --weights fast --json",
    )
    evaluate.add_argument("run", metavar="RUN|FILE", help="a run (its newest good checkpoint), or a checkpoint file")
    evaluate.add_argument("--data", metavar="DIR", help="other test images: CIFAR-10 or test/<class>/*")
    evaluate.add_argument("--weights", choices=("slow", "fast"), default="slow", help=WEIGHTS_HELP)
    evaluate.add_argument("--out", metavar="DIR", help="draw the confusion matrix there, as PNG and SVG")
    _json(evaluate)

    predict = _command(
        commands,
        "predict",
        "the class of each image of a folder, an array file or a CIFAR pickle, as a CSV (ID,Labels)",
        "improved_resnet-1a2b3c4d images/ --out labels.csv",
        "improved_resnet-1a2b3c4d cifar_test_nolabels.pkl --out labels.csv --weights fast",
    )
    predict.add_argument("run", metavar="RUN|FILE", help="a run (its newest good checkpoint), or a checkpoint file")
    predict.add_argument("input", metavar="INPUT", help="a folder of images, a .npy or .npz file, or a CIFAR pickle")
    predict.add_argument("--out", metavar="FILE.csv", required=True, help="the CSV to write")
    predict.add_argument("--weights", choices=("slow", "fast"), default="slow", help=WEIGHTS_HELP)

    export = _command(
        commands,
        "export",
        "the model as safetensors, with a card that says what it is and how to load it",
        "improved_resnet-1a2b3c4d --out model.safetensors",
    )
    export.add_argument("run", metavar="RUN|FILE", help="a run (its newest good checkpoint), or a checkpoint file")
    export.add_argument("--out", metavar="FILE.safetensors", required=True, help="the file; the card lies beside it")
    export.add_argument("--weights", choices=("slow", "fast"), default="slow", help=WEIGHTS_HELP)


def _figures(commands: argparse._SubParsersAction) -> None:  # type: ignore[type-arg]
    plot = _command(
        commands,
        "plot",
        "figures of runs: accuracy, loss, learning rate, architecture, timeline",
        "improved_resnet-1a2b3c4d",
        "'dropout-*' --out figures",
        "improved_resnet-1a2b3c4d --terminal",
    )
    plot.add_argument("runs", metavar="RUN", nargs="+", help="names or patterns such as 'dropout-*'")
    plot.add_argument("--out", metavar="DIR", default="figures", help="where the files go (default: figures)")
    plot.add_argument("--terminal", action="store_true", help="draw curves in the terminal instead")

    compare = _command(
        commands,
        "compare",
        "a table of runs: what differs, accuracy (mean and std over seeds), time, restarts",
        "'dropout-*'",
        "'dropout-*' 'activation-*' --sort=-test_accuracy --markdown",
    )
    compare.add_argument("runs", metavar="PATTERN", nargs="+", help="names or patterns such as 'dropout-*'")
    compare.add_argument("--sort", metavar="COLUMN", help="a column, ascending; descending: --sort=-COLUMN")
    compare.add_argument("--each", action="store_true", help="a row for each run, seeds apart")
    form = compare.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_const", const="json", dest="form", help="machine-readable")
    form.add_argument("--csv", action="store_const", const="csv", dest="form", help="for a spreadsheet")
    form.add_argument("--markdown", action="store_const", const="markdown", dest="form", help="for a README")


def _site(commands: argparse._SubParsersAction) -> None:  # type: ignore[type-arg]
    doctor = _command(
        commands,
        "doctor",
        "what would go wrong here: Slurm, partition, GPUs, file system, data, torch",
        "",
        "--profile mycluster --account lab --job",
        "--partition gpu --job --nodes 2 --gpus-per-node 4 --wait 60",
    )
    doctor.add_argument("--profile", metavar="NAME", default="default", help="the site in slurm/clusters")
    doctor.add_argument("--partition", metavar="P", help="the partition that runs would go to")
    doctor.add_argument("--account", metavar="A", help="the account that runs would be charged to")
    doctor.add_argument("--nodes", type=int, default=1, metavar="N", help="on so many nodes (default: 1)")
    doctor.add_argument(
        "--gpus-per-node", type=int, metavar="G", help="with so many GPUs on each (default: the site's, else 1)"
    )
    doctor.add_argument("--job", action="store_true", help="look on the compute nodes as well, in a job of a minute")
    doctor.add_argument(
        "--wait",
        type=float,
        default=10,
        metavar="MINUTES",
        help="how long the job may wait for its start (default: 10)",
    )
    _json(doctor)

    completion = _command(
        commands,
        "completion",
        "print what makes a shell complete commands, options and runs",
        "bash",
        "zsh",
    )
    completion.add_argument("shell", choices=("bash", "zsh"))

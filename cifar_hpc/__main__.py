"""python -m cifar_hpc COMMAND. Each command's module is imported only when it is called."""

from __future__ import annotations

import argparse
import sys

from cifar_hpc.errors import UserError, missing_package
from cifar_hpc.printable import printable

EXAMPLES = """examples:
  python -m cifar_hpc train jobs/demo.yaml --set train.epochs=2
  torchrun --nproc-per-node 4 -m cifar_hpc train jobs/improved_resnet.yaml
  python -m cifar_hpc status --watch
  python -m cifar_hpc tail improved_resnet-1a2b3c4d
  python -m cifar_hpc inspect improved_resnet-1a2b3c4d --json
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m cifar_hpc",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Train, watch and inspect runs. To submit one: python submit.py --help",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    train = commands.add_parser("train", help="train here: one process, or each process of torchrun")
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

    status = commands.add_parser("status", help="one line a run: state, epoch, accuracy, speed, restarts")
    status.add_argument("runs", metavar="RUN", nargs="*", help="only these runs")
    status.add_argument("--watch", action="store_true", help="redraw every few seconds until Ctrl-C")
    status.add_argument("--json", action="store_true", help="machine-readable")

    tail = commands.add_parser("tail", help="follow a run's train.log until the run ends")
    tail.add_argument("run", metavar="RUN")
    tail.add_argument("--epochs", action="store_true", help="only the rows of finished epochs")

    inspect = commands.add_parser("inspect", help="verify a checkpoint; show what it holds and its sha256 sums")
    inspect.add_argument("run", metavar="RUN", help="a run, or a checkpoint file")
    inspect.add_argument("--step", type=int, metavar="S", help="the checkpoint of this step (default: the newest good)")
    inspect.add_argument("--json", action="store_true", help="machine-readable")

    requeue = commands.add_parser("requeue", help="requeue a running job, or let a requeued one start now")
    requeue.add_argument("run", metavar="RUN")
    cancel = commands.add_parser("cancel", help="cancel a run's job; it saves a checkpoint first")
    cancel.add_argument("run", metavar="RUN")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns its exit status."""
    arguments = _parser().parse_args(argv)
    try:
        return _dispatch(arguments)
    except UserError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return error.exit_code
    except ModuleNotFoundError as error:
        print(f"error: {missing_package(error)}", file=sys.stderr)
        return UserError.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return 141  # the reader, such as head, has gone
    except OSError as error:
        words = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        print(f"error: {printable(words)}", file=sys.stderr)
        return UserError.exit_code


def _dispatch(arguments: argparse.Namespace) -> int:
    from cifar_hpc.paths import keep_others_out

    keep_others_out()
    if arguments.command == "train":
        from cifar_hpc.train_command import train

        return train(arguments.job, arguments.overrides, arguments.name)
    if arguments.command == "status":
        from cifar_hpc.status import status

        return status(arguments.runs, watch=arguments.watch, as_json=arguments.json)
    if arguments.command == "tail":
        from cifar_hpc.tail import tail

        return tail(arguments.run, epochs_only=arguments.epochs)
    if arguments.command == "inspect":
        from cifar_hpc.inspection import inspect

        return inspect(arguments.run, arguments.step, as_json=arguments.json)
    from cifar_hpc import steer

    return steer.requeue(arguments.run) if arguments.command == "requeue" else steer.cancel(arguments.run)


if __name__ == "__main__":
    sys.exit(main())

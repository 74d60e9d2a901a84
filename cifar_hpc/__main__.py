"""python -m cifar_hpc COMMAND. Each command's module is imported only when it is called."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from cifar_hpc.cli.parser import parser
from cifar_hpc.errors import UserError, explain
from cifar_hpc.text import printable


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns its exit status."""
    arguments = parser().parse_args(argv)
    try:
        from cifar_hpc.runs.paths import keep_others_out

        keep_others_out()
        return COMMANDS[arguments.command](arguments)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return 141  # the reader, such as head, has gone
    except (UserError, ModuleNotFoundError, OSError) as error:
        message, status = explain(error)
        print(f"error: {printable(message)}", file=sys.stderr)
        return status


def _train(arguments: argparse.Namespace) -> int:
    from cifar_hpc.cli.train import train

    return train(arguments.job, arguments.overrides, arguments.name)


def _status(arguments: argparse.Namespace) -> int:
    from cifar_hpc.cli.status import status

    return status(arguments.runs, watch=arguments.watch, as_json=arguments.json)


def _tail(arguments: argparse.Namespace) -> int:
    from cifar_hpc.cli.tail import tail

    return tail(arguments.run, epochs_only=arguments.epochs)


def _inspect(arguments: argparse.Namespace) -> int:
    from cifar_hpc.cli.inspect import inspect

    return inspect(arguments.run, arguments.step, as_json=arguments.json)


def _requeue(arguments: argparse.Namespace) -> int:
    from cifar_hpc.cli import control as steer

    return steer.requeue(arguments.run)


def _cancel(arguments: argparse.Namespace) -> int:
    from cifar_hpc.cli import control as steer

    return steer.cancel(arguments.run)


def _evaluate(arguments: argparse.Namespace) -> int:
    from cifar_hpc.cli.evaluate import evaluate

    return evaluate(arguments.run, arguments.data, arguments.weights, arguments.out, as_json=arguments.json)


def _predict(arguments: argparse.Namespace) -> int:
    from cifar_hpc.cli.predict import predict

    return predict(arguments.run, arguments.input, arguments.out, arguments.weights)


def _export(arguments: argparse.Namespace) -> int:
    from cifar_hpc.cli.export import export

    return export(arguments.run, arguments.out, arguments.weights)


def _plot(arguments: argparse.Namespace) -> int:
    from cifar_hpc.cli.figures.plot import plot

    return plot(arguments.runs, arguments.out, in_terminal=arguments.terminal)


def _compare(arguments: argparse.Namespace) -> int:
    from cifar_hpc.cli.compare import compare

    return compare(arguments.runs, arguments.sort, arguments.form, each=arguments.each)


def _track(arguments: argparse.Namespace) -> int:
    from cifar_hpc.cli.track import track

    return track(arguments.runs, arguments.tensorboard, arguments.wandb, arguments.project)


def _doctor(arguments: argparse.Namespace) -> int:
    from cifar_hpc.cli.doctor.doctor import doctor

    return doctor(arguments)


def _completion(arguments: argparse.Namespace) -> int:
    from cifar_hpc.cli.completion import completion

    return completion(arguments.shell)


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "train": _train,
    "status": _status,
    "tail": _tail,
    "inspect": _inspect,
    "requeue": _requeue,
    "cancel": _cancel,
    "evaluate": _evaluate,
    "predict": _predict,
    "export": _export,
    "plot": _plot,
    "compare": _compare,
    "track": _track,
    "doctor": _doctor,
    "completion": _completion,
}


if __name__ == "__main__":
    sys.exit(main())

"""python -m cifar_hpc COMMAND."""

import sys
from collections.abc import Sequence

from cifar_hpc.cli.parser import build_parser
from cifar_hpc.errors import UserError, explain
from cifar_hpc.text import printable


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        arguments = build_parser(argv).parse_args(argv)
        from cifar_hpc.runs.paths import keep_others_out

        keep_others_out()
        status: int = arguments.main(arguments)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return 141  # the reader, such as head, has gone
    except (UserError, ModuleNotFoundError, OSError) as error:
        message, status = explain(error)
        print(f"error: {printable(message)}", file=sys.stderr)
        return status


if __name__ == "__main__":
    from cifar_hpc.training.process import open_streams

    open_streams(lossy="train" in sys.argv[1:2])
    sys.exit(main())

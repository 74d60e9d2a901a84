"""python -m cifar_hpc COMMAND."""

import sys
from collections.abc import Sequence

from cifar_hpc.cli.parser import build_parser, run_command


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status. Without one, show the list."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv:
        build_parser(argv).print_help()
        return 2
    return run_command(build_parser, argv)


if __name__ == "__main__":
    from cifar_hpc.training.process import open_streams

    open_streams(lossy="train" in sys.argv[1:2])
    sys.exit(main())

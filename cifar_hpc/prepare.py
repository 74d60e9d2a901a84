"""python -m cifar_hpc.prepare FOLDER: download and verify CIFAR-10, in a process of its own.

torchvision imports torch, which the submitting process never does.
"""

from __future__ import annotations

import sys
from pathlib import Path

from cifar_hpc.cifar10 import check_cifar10, fetch_cifar10
from cifar_hpc.errors import UserError


def main(folder: str) -> int:
    """Exit status 0 where CIFAR-10 stands in `folder`, whole."""
    try:
        fetch_cifar10(Path(folder))
        check_cifar10(Path(folder))
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))

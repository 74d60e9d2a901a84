#!/usr/bin/env python3
"""Submit a training run: `python submit.py --partition gpu`. See --help."""

import sys

from cifar_hpc.cli.submit import main

if __name__ == "__main__":
    sys.exit(main())

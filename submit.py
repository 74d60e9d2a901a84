#!/usr/bin/env python3
"""Submit a training run: `python submit.py --partition gpu`. See --help."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # which PYTHONSAFEPATH leaves out

from cifar_hpc.cli.submit import main
from cifar_hpc.training.process import open_streams

if __name__ == "__main__":
    open_streams()
    sys.exit(main())

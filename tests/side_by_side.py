"""All tests: those on a real Slurm, which mostly wait for it, beside the others. What `make test` runs.

python -m tests.side_by_side
"""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
SLURM = str(HERE / "slurm")
PYTEST = [sys.executable, "-m", "pytest"]


def main() -> int:
    """Exit status 0 where all pass. The output of those on Slurm comes last, in one piece."""
    with tempfile.TemporaryFile() as output:
        beside = subprocess.Popen([*PYTEST, SLURM], cwd=HERE.parent, stdout=output, stderr=subprocess.STDOUT)
        try:
            print("tests/slurm runs beside these tests; what it says comes at the end", flush=True)
            status = subprocess.run([*PYTEST, f"--ignore={SLURM}"], cwd=HERE.parent).returncode
            beside.wait()
        finally:
            if beside.poll() is None:
                beside.send_signal(signal.SIGINT)  # its clusters are to be brought down
                beside.wait()
        output.seek(0)
        print(output.read().decode(errors="replace"), flush=True)
    return status or beside.returncode


if __name__ == "__main__":
    sys.exit(main())

"""All tests: two sessions that share them, and beside them those on a real Slurm, which mostly wait for it.

The last session repeats those in which Slurm decides most on another version of Slurm, where that can be made.

python -m tests.side_by_side: what `make test` runs.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

TESTS = Path(__file__).resolve().parent
SLURM = str(TESTS / "slurm")
OTHER_SLURM = [str(TESTS / "slurm" / f"test_{name}.py") for name in ("preempted", "people", "nodes")]
PYTEST = [sys.executable, "-m", "pytest", "-o", "console_output_style=classic"]  # no session knows its percentage


def main() -> int:
    """Exit status 0 where all pass. The first session's output is shown at once, that of the others at the end."""
    with tempfile.TemporaryDirectory() as shared, ExitStack() as stack:
        part = [*PYTEST, str(TESTS), f"--ignore={SLURM}", f"--share={shared}"]
        beside = []
        for command in (part, [*PYTEST, SLURM], [*PYTEST, *OTHER_SLURM, "--slurm-release=other"]):
            output = stack.enter_context(tempfile.TemporaryFile())
            command = [*command, "-p", "no:cacheprovider"]
            process = subprocess.Popen(command, cwd=TESTS.parent, stdout=output, stderr=subprocess.STDOUT)
            stack.callback(end, process)
            beside.append((process, output))
        print("one of four sessions that run side by side; the output of the other three comes at the end", flush=True)
        statuses = [subprocess.run(part, cwd=TESTS.parent).returncode]
        for process, output in beside:
            statuses.append(process.wait())
            output.seek(0)
            print(output.read().decode(errors="replace"), flush=True)
    return max(statuses, key=abs)


def end(process: subprocess.Popen[bytes]) -> None:
    """Interrupt what still runs, so that it brings its clusters and processes down."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        process.wait()


if __name__ == "__main__":
    sys.exit(main())

"""make demo: a run from end to end on this machine, with a preemption, by the public commands alone."""

import shutil
import signal
import subprocess
import sys
import time

from cifar_hpc.cli.tail import EpochFollower
from cifar_hpc.errors import RunBusyError
from cifar_hpc.launch.preflight import why_busy
from cifar_hpc.runs.events import Resumed
from cifar_hpc.runs.lock import signal_local
from cifar_hpc.runs.logs import read_jsonl
from cifar_hpc.runs.paths import PROJECT, RunPaths, project_root

RUN = "demo"
PREEMPT_AFTER_EPOCH = 2


def main() -> int:
    """Run the demo; exit status 0 if the run was preempted, resumed and finished."""
    paths = RunPaths(project_root(), RUN)
    if reason := why_busy(paths, jobs={}):
        print(f"error: {reason}", file=sys.stderr)
        return RunBusyError.exit_code
    for old in (paths.logs, paths.checkpoints):
        shutil.rmtree(old, ignore_errors=True)
    submit = [sys.executable, "submit.py", "jobs/demo.yaml", "--cluster", "local", "--name", RUN, "--follow"]
    _say(" ".join(["python", *submit[1:]]))
    with subprocess.Popen(submit, cwd=PROJECT) as follower:
        while follower.poll() is None and len(read_jsonl(paths.metrics)) < PREEMPT_AFTER_EPOCH:
            time.sleep(0.2)
        if follower.poll() is None:
            time.sleep(3)  # into the middle of the next epoch
            _say("preempting it now: SIGUSR2, as from a scheduler that needs the machine")
            signal_local(paths, signal.SIGUSR2)
        status = follower.wait()
    if status != 0:
        print(f"error: the demo's run did not finish; see {paths.train_log} and {paths.slurm}", file=sys.stderr)
        return status
    return _report(paths)


def _report(paths: RunPaths) -> int:
    rows, events = read_jsonl(paths.metrics), read_jsonl(paths.events)
    resumed = [e for e in events if e["event"] == Resumed.name]
    print(*EpochFollower(paths.metrics).poll(), sep="\n")
    for event in resumed:
        print(f"preempted and resumed at step {event['step']} (epoch {event['epoch'] + 1}, from {event['file']})")
    print(f"test accuracy after {rows[-1]['epoch']} epochs: {rows[-1]['test_accuracy']:.2f}% of the synthetic images")
    complete = [row["epoch"] for row in rows] == list(range(1, len(rows) + 1))
    print(f"each epoch is exactly once in {paths.metrics}" if complete else "error: metrics.jsonl has gaps")
    print(f"look at {paths.train_log}, and at python -m cifar_hpc inspect {RUN}")
    return 0 if complete and resumed else 1


def _say(text: str) -> None:
    print(f"\n>>> {text}\n", flush=True)


if __name__ == "__main__":
    sys.exit(main())

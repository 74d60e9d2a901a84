"""python -m cifar_hpc inspect: verify a checkpoint and print its contents.

The sums are those of the fast weights, the slow weights, momentum and
BatchNorm buffers: two runs computed the same if and only if they agree. Exit
status 1 where the file is damaged; the message says what is wrong with it.
"""

from __future__ import annotations

import argparse
import json
import os
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cifar_hpc.errors import RunFailedError, SpecError
from cifar_hpc.runs.paths import find_run, project_root
from cifar_hpc.text import printable

if TYPE_CHECKING:
    from cifar_hpc.training.checkpoints.format import TrainingState

SHOWN = ("step", "epoch", "step_in_epoch", "updates", "best", "environment", "digest", "spec")
EXAMPLES = ("improved_resnet-1a2b3c4d", "improved_resnet-1a2b3c4d --step 3910 --json")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run, or a checkpoint file")
    parser.add_argument("--step", type=int, metavar="S", help="the checkpoint of this step (default: the newest good)")
    parser.add_argument("--json", action="store_true", help="machine-readable")


def main(arguments: argparse.Namespace) -> int:
    """Print a checkpoint's position, metrics and digests.

    Raises:
        SpecError: there is no such checkpoint.
        RunFailedError: it does not verify.
    """
    report = describe(*_load(arguments.run, arguments.step))
    if arguments.json:
        print(json.dumps(report, indent=1))
        return 0
    best, environment = report["best"], report["environment"]
    facts = {key: str(report[key]) for key in ("step", "epoch", "step_in_epoch", "updates", "shards")}
    facts["best"] = f"{best['test_accuracy']:.2f}% after epoch {best['epoch']}" if best["epoch"] else "none yet"
    told = ("device", "processor", "gpu", "torch", "cuda", "threads", "amp")  # --json has all
    facts["computed on"] = ", ".join(f"{key} {environment[key]}" for key in told if environment.get(key))
    lines = [f"{'file':14} {report['file']}", f"{'verified':14} yes: it is whole, and its sums are right"]
    for key, text in facts.items():
        lines += textwrap.wrap(f"{key:14} {text}", 80, subsequent_indent=" " * 15, break_on_hyphens=False)
    lines += ["sha256 of", *(f"{name:14} {digest}" for name, digest in report["sums"].items())]
    lines += [f"{'skipped':14} {line}" for line in report["skipped"]]
    print(printable("\n".join(lines)))
    return 0


def describe(path: Path, state: TrainingState, skipped: list[str]) -> dict[str, Any]:
    """The object of `inspect --json`; `skipped` are newer files that did not verify."""
    from cifar_hpc.training.checkpoints.format import FORMAT

    return {
        "file": str(path),
        "verified": True,
        "skipped": skipped,
        "format": FORMAT,
        **{key: getattr(state, key) for key in SHOWN},
        "shards": state.spec["train"]["shards"],
        "last_epoch": state.rows[-1] if state.rows else None,
        "sums": state.digests(),
    }


def _load(run: str, step: int | None) -> tuple[Path, TrainingState, list[str]]:
    from cifar_hpc.tensorfile import BadFileError
    from cifar_hpc.training.checkpoints.format import read_checkpoint
    from cifar_hpc.training.checkpoints.store import candidates, newest_good, step_name

    if run.endswith(".pt"):
        if step is not None:
            raise SpecError(f"--step: {run} is a file. HINT: name its run, or leave --step out.")
        path = Path(run)
        if not os.path.lexists(path):
            raise SpecError(f"{path}: there is no such file.")
    else:
        directory = find_run(project_root(), run).checkpoints
        if step is None:
            found = newest_good(directory)
            if found is None:
                raise SpecError(f"run {run} has no checkpoint in {directory} yet. HINT: show {run} says how it is.")
            return found.path, found.state, [f"{path.name}: {reason}" for path, reason in found.bad]
        path = directory / step_name(step)
        if not path.exists():
            known = ", ".join(str(int(p.stem.removeprefix("step_"))) for p in candidates(directory)) or "none"
            raise SpecError(f"--step: run {run} has no checkpoint of step {step}; there are: {known}.")
    try:
        return path, read_checkpoint(path), []
    except BadFileError as error:
        raise RunFailedError(
            f"{path}: {error}. HINT: inspect RUN, without --step, takes its newest good one."
        ) from None

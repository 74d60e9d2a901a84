"""python -m cifar_hpc show: everything that is known of one run, on one screen.

State and its reason, position and newest checkpoint, accuracy, restarts by
cause, the last epochs, what differs from the defaults of the spec, memory,
hours, folders, and the lines that follow, requeue or cancel the run. Of a
run that has failed or was killed, the end of its log as well.
Exit status: 0; 3 Slurm does not answer, so that the files alone are shown.
"""

import argparse
import json
import os
import shutil
import sys
import textwrap
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from typing import Any

from cifar_hpc.cli.status import CAUSES, STYLES, Reader, cells
from cifar_hpc.cli.terminal import Column, lay_out, paint, shorten, use_colour
from cifar_hpc.config.io import covered, differences, in_words, to_plain
from cifar_hpc.config.spec import Spec
from cifar_hpc.errors import SchedulerError, UserError
from cifar_hpc.runs.events import Checkpoint
from cifar_hpc.runs.frozen_spec import read_frozen
from cifar_hpc.runs.history import History, number_of, time_of
from cifar_hpc.runs.logs import output_of_start, read_jsonl
from cifar_hpc.runs.paths import RunPaths, find_run, program, project_root
from cifar_hpc.runs.progress import DAMAGE, Progress, read_progress
from cifar_hpc.runs.results import read_result
from cifar_hpc.runs.state import AT_WORK, WAITING, RunState
from cifar_hpc.text import counted, duration, one_line, printable

EXAMPLES = ("improved_resnet-1a2b3c4d", "improved_resnet-1a2b3c4d --json")
EPOCHS, RESTARTS, LOG_LINES = 5, 5, 10  # the last ones, on the screen
ASKED = ("time", "nodes", "gpus_per_node")  # shown if they are as usual, too
LABEL = 13  # characters
GIB = 2**30
Report = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="the run's name")
    parser.add_argument("--json", action="store_true", help="machine-readable")


def main(arguments: argparse.Namespace) -> int:
    """Print all that is known of a run; returns the exit status of `status`."""
    paths = find_run(project_root(), arguments.run)
    reader = Reader(paths.root, [paths.name])
    (state,) = reader.read()
    report = describe(paths, state)
    on_terminal = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
    if arguments.json:
        print(json.dumps(report, indent=1))
    else:
        width = shutil.get_terminal_size().columns if on_terminal else None
        print(*screen(state, report, width, use_colour(sys.stdout)), sep="\n")
    if reader.queue.trouble:
        print(f"error: {printable(reader.queue.trouble)}", file=sys.stderr)
        return SchedulerError.exit_code
    return 0


def describe(paths: RunPaths, state: RunState) -> Report:
    """The object of `show --json`: the keys of `status --json`, and more. What damaged files do not tell is null."""
    progress, spec, rows, result = Progress(), None, [], read_result(paths, {})
    with suppress(*DAMAGE):
        progress = read_progress(paths)
    with suppress(UserError, OSError):
        spec = read_frozen(paths)
    with suppress(OSError):
        rows = read_jsonl(paths.metrics)
    saved, changed = progress.history.last_of(Checkpoint), differences(Spec(), spec) if spec else {}
    file = paths.checkpoints / str(saved.get("file"))
    return {
        **state.plain(),
        "checkpoint": {
            **{key: saved.get(key) for key in ("step", "time")},
            "epoch": progress.saved_epoch,
            "file": str(file) if file.is_file() else None,
        }
        if saved
        else None,
        "starts": _starts(progress.history),
        "last_epochs": rows[-EPOCHS:],
        "differences": {key: new for key, (_, new) in changed.items() if not covered(key, ("resources",))},
        "resources": to_plain(spec)["resources"] if spec else None,
        "peak_memory_bytes": progress.peak_memory_bytes,
        **{key: getattr(result, key) for key in ("device", "device_seconds", "hardware", "versions", "command")},
        "logs": str(paths.logs),
        "checkpoints": str(paths.checkpoints),
        "log_end": output_of_start(paths.train_log)[-LOG_LINES:] if paths.train_log.is_file() else [],
    }


def _starts(history: History) -> list[Report]:
    starts: list[Report] = []
    cause = None
    for attempt in history.attempts:
        step = attempt.step if attempt.begun else None
        starts.append({"cause": cause, "time": attempt.start, "step": step, "world_size": attempt.world_size})
        cause = attempt.cause  # of the next one
    return starts


def screen(state: RunState, report: Report, width: int | None, coloured: bool = False) -> list[str]:
    """The lines for a terminal.

    Args:
        width: of the terminal, in characters; None for no wrapping.
    """
    lines: list[str] = []
    for label, text in _facts(state, report):
        one = [one_line(text)] if isinstance(text, str) else text  # lists are tables, paths and commands
        wrapped = textwrap.wrap(one[0], max(20, width - LABEL)) if width and isinstance(text, str) else one
        lines += [f"{heading:{LABEL}}{line}" for heading, line in zip([label, *[""] * len(wrapped)], wrapped)]  # noqa: B905
    if coloured:
        lines[1] = lines[1].replace(state.state, paint(state.state, STYLES[state.state]), 1)
    if state.state in ("failed", "stopped", "hung") and report["log_end"]:
        lines += ["the last lines of train.log:", *(shorten(x, width) if width else x for x in report["log_end"])]
    return lines


def _facts(state: RunState, report: Report) -> Iterator[tuple[str, str | Sequence[str]]]:
    """(label, text to be wrapped, or lines of a table) of all that is known."""
    row = cells(state)
    yield "run", state.run + (f", a point of the sweep {state.sweep}" if state.sweep else "")
    yield "state", f"{state.state}: {state.detail}" if state.detail else state.state
    if state.job_id:
        yield "job", state.job_id + (f", submitted by {state.user}" if state.user else "")
    yield "epoch", f"{row['EPOCH']}{_checkpoint(state, report['checkpoint'])}"
    if state.test_accuracy is not None:
        yield "accuracy", f"{row['ACC']}% after epoch {state.epoch}, best {row['BEST']}%"
    if state.state == "running" and state.images_per_second is not None and state.world_size:
        ranks = counted(state.world_size, "rank")
        yield "speed", f"{row['IMG/S']} images/s on {ranks}; last line of the log {row['LOG AGE']} ago"
    if state.eta_seconds is not None:
        yield "ETA", f"{row['ETA']}, at {datetime.fromtimestamp(time.time() + state.eta_seconds):%Y-%m-%d %H:%M}"
    yield "restarts", row["RESTARTS"]
    if table := _restarts(report["starts"]):
        yield "", table
    if report["last_epochs"]:
        yield "last epochs", _epochs(report["last_epochs"])
    if report["differences"]:
        yield "not default", ", ".join(f"{key}={in_words(value)}" for key, value in report["differences"].items())
    if report["resources"]:
        usual = {key: value for key, value in vars(Spec().resources).items() if key not in ASKED}
        asked = {key: value for key, value in report["resources"].items() if key in ASKED or value != usual[key]}
        yield "resources", ", ".join(f"{key} {in_words(value)}" for key, value in asked.items())
    if memory := _memory(report["peak_memory_bytes"]):
        yield "peak memory", memory
    if report["device_seconds"]:
        hours, of = report["device_seconds"] / 3600, "GPU" if report["device"] == "gpu" else "device"
        lost = f"{duration(state.lost_seconds)} lost to restarts"
        yield "used", f"{hours:,.2f} {of}-hours; {lost}" if hours >= 0.01 else f"less than 0.01 {of}-hours; {lost}"
    yield from (("hardware", text) for text in report["hardware"][-1:])
    yield from (("versions", text) for text in report["versions"][-1:])
    yield from ((label, [printable(report[label])]) for label in ("logs", "checkpoints"))
    if state.state in (*AT_WORK, *WAITING):
        commands = {"follow": "tail", "requeue": "requeue", "cancel": "cancel"}
        known = commands if state.job_id else ("follow", "cancel")  # nothing to requeue in a point that waits here
        yield from ((label, [f"{program()} {commands[label]} {state.run}"]) for label in known)
    elif report["command"]:
        yield "command", report["command"]


def _checkpoint(state: RunState, saved: Mapping[str, Any] | None) -> str:
    """The checkpoint that the next start goes on from, and its age."""
    if state.state == "finished":
        return ""
    if saved is None:
        return "; no checkpoint yet" if state.restarts or state.state in AT_WORK else ""
    epoch, at = number_of(saved, "epoch"), time_of(saved)
    words = f"; newest checkpoint: step {saved['step']}" + (f" (epoch {epoch:.2f})" if epoch is not None else "")
    words += f", {duration(time.time() - at)} ago" if at is not None else ""
    return words if saved["file"] else f"{words}, but its file is gone"


def _restarts(starts: Sequence[Mapping[str, Any]]) -> list[str]:
    """Time, cause and step of each restart."""
    lines = [
        f"{_moment(start['time'])}  {CAUSES.get(start['cause'], start['cause'])}"
        + (", not training yet" if start["step"] is None else f", from step {start['step']}")
        + (f" on {counted(start['world_size'], 'rank')}" if start["world_size"] else "")
        for start in starts[1:]
    ]
    earlier = len(lines) - RESTARTS
    return [*([f"... {earlier} earlier ones"] if earlier > 0 else []), *lines[-RESTARTS:]]


def _moment(seconds: float | None) -> str:
    return "at an unknown time" if seconds is None else f"{datetime.fromtimestamp(seconds):%Y-%m-%d %H:%M:%S}"


def _epochs(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    columns = {  # heading: (key of metrics.jsonl, format)
        "EPOCH": ("epoch", ".0f"), "TRAIN": ("train_accuracy", ".2f"), "TEST": ("test_accuracy", ".2f"),
        "TEST LOSS": ("test_loss", ".4f"), "LR": ("lr", ".5f"), "SECONDS": ("epoch_seconds", ".1f"),
        "IMG/S": ("images_per_second", ",.0f"), "RANKS": ("world_size", ".0f"),
    }  # fmt: skip
    found = {
        heading: ["-" if (value := number_of(row, key)) is None else format(value, form) for row in rows]
        for heading, (key, form) in columns.items()
    }
    return lay_out([Column(heading, texts, right=True) for heading, texts in found.items()])


def _memory(by_rank: Any) -> str:
    sizes = [value / GIB for key in by_rank if (value := number_of(by_rank, key, 1e18)) is not None]
    if len(sizes) > 8:
        return f"{min(sizes):.2f} to {max(sizes):.2f} GiB on {len(sizes)} ranks"
    of = f" (ranks 0 to {len(sizes) - 1})" if len(sizes) > 1 else ""
    return f"{', '.join(f'{size:.2f}' for size in sizes)} GiB{of}" if sizes else ""

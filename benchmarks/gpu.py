"""All that needs a GPU, in two calls: checks, speed against peers, profiles.

    benchmarks/gpu.sh first [--out FOLDER] [--only rates,graph]        # the promise and where time goes: at most 270 s
    benchmarks/gpu.sh second                                           # peers, epochs and other modes: at most 240 s
    benchmarks/gpu.sh first --device cpu --quick                       # a rehearsal, whose figures mean nothing

All pieces of a call run in one process. One that fails is reported, and the others still run, unless CUDA itself has
failed. Each figure is written as it is found: gpu.json, gpu.md (the table), gpu.log (errors and warnings). At the
limit the process is ended, and what it has written stays.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from benchmarks.measure import RESULTS, ROOT, Row, environment, table
from cifar_hpc.files import write_atomic

# Each piece with the module it is in; what matters most comes first.
CALLS = {
    "first": {
        "warm_up": "gpu_speed", "ceilings": "gpu_speed", "same_bits": "gpu_checks", "hook_alone": "gpu_checks",
        "rates": "gpu_speed", "no_syncs": "gpu_checks", "graph": "gpu_speed", "stall": "gpu_parts",
        "profile": "gpu_parts", "resume": "gpu_runs",
    },
    "second": {
        "warm_up": "gpu_speed", "epochs": "gpu_runs", "peers": "gpu_speed", "fp16": "gpu_speed",
        "nondeterministic": "gpu_speed", "fused_sgd": "gpu_speed", "tests": "gpu_checks",
    },
}  # fmt: skip
LIMIT_SECONDS = {"first": 270.0, "second": 240.0}


@dataclass
class Outcome:
    """What became of one piece."""

    status: str = "not reached"  # running | done | failed
    seconds: float = 0.0
    rows: list[Row] = field(default_factory=list)
    text: str = ""
    error: str = ""


class Report:
    """The outcomes of a call, which gpu.json and gpu.md in `folder` hold at every moment.

    Args:
        rehearsal: on a CPU or with a tiny model.
    """

    def __init__(self, folder: Path, rehearsal: bool, pieces: Sequence[str]) -> None:
        self.folder, self.head = folder, {"rehearsal": rehearsal, "environment": environment(), "problem": ""}
        self.outcomes = {name: Outcome() for name in pieces}
        self.write()

    def add(self, *rows: Row, text: str = "") -> None:
        """Append rows, and a paragraph of Markdown, to the piece that is running."""
        outcome = next(outcome for outcome in self.outcomes.values() if outcome.status == "running")
        outcome.rows += rows
        outcome.text += f"{text}\n\n" if text else ""
        self.write()

    def write(self) -> None:
        """Replace both files."""
        pieces, outcomes = {name: asdict(outcome) for name, outcome in self.outcomes.items()}, self.outcomes.values()
        write_atomic(self.folder / "gpu.json", f"{json.dumps({**self.head, 'pieces': pieces}, indent=1)}\n".encode())
        lines = ["A REHEARSAL: these figures mean nothing.", ""] if self.head["rehearsal"] else []
        lines += [", ".join(f"{key} {value}" for key, value in self.head["environment"].items()), ""]
        lines += [table([row for outcome in outcomes for row in outcome.rows]), ""]
        for name, outcome in self.outcomes.items():
            error = f": {outcome.error}" if outcome.error else ""
            lines.append(f"- {name}: {outcome.status} after {outcome.seconds:.0f} s{error}")
        page = "\n".join([*lines, "", *(outcome.text for outcome in outcomes if outcome.text)])
        write_atomic(self.folder / "gpu.md", page.encode())


def main(argv: list[str] | None = None) -> int:
    """Make a call; 1 if any piece did not get through."""
    argv = sys.argv[1:] if argv is None else argv
    options = _options(argv)
    if options.child:
        return be_child(options)
    signal.signal(signal.SIGTERM, _leave)
    options.out.mkdir(parents=True, exist_ok=True)
    for name in ("gpu.json", "gpu.md"):
        (options.out / name).unlink(missing_ok=True)
    return close(options.out, watch([sys.executable, "-m", "benchmarks.gpu", *argv, "--child"], options))


def _options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks/gpu.sh", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("call", choices=CALLS)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="a tiny model and few repetitions")
    parser.add_argument("--only", type=lambda text: text.split(","), metavar="PIECES", help="some, with commas between")
    parser.add_argument("--limit", type=float, metavar="SECONDS", help="for all pieces; default: 270 and 240")
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="default: $OUT, else benchmarks/results/gpu-first or gpu-second"
    )
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    options.out = options.out or Path(os.environ.get("OUT") or RESULTS / f"gpu-{options.call}")
    options.limit = options.limit or LIMIT_SECONDS[options.call]
    unknown = [name for name in options.only or () if name not in CALLS[options.call]]
    if unknown:
        parser.error(f"--only {unknown[0]}: allowed for {options.call}: {', '.join(CALLS[options.call])}")
    return options


def _leave(*_: object) -> NoReturn:
    sys.exit(128 + signal.SIGTERM)  # through every `finally`, so that no process is left behind


def watch(command: list[str], options: argparse.Namespace) -> str:
    """Run the process that measures, in a group of its own, which is gone afterwards. Why it got no further, if so."""
    log = options.out / "gpu.log"
    with log.open("wb") as errors:
        process = subprocess.Popen(command, cwd=ROOT, stdout=2, stderr=errors, process_group=0)
        try:
            status = process.wait(options.limit)
        except subprocess.TimeoutExpired:
            return f"ended at the limit of {options.limit:g} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    lines = log.read_text(errors="replace").strip().splitlines()
    return f"the process ended with status {status}: {lines[-1] if lines else 'it wrote nothing'}" if status else ""


def close(folder: Path, problem: str) -> int:
    """Show what was found, and say why the process that measured got no further; the exit status of the call."""
    if problem:
        print(f"error: {problem}", file=sys.stderr)
    if not (folder / "gpu.json").exists():
        return 1
    found, page = json.loads((folder / "gpu.json").read_text()), (folder / "gpu.md").read_text()
    if problem:
        page = f"THIS CALL CAME TO NO END: {problem}\n\n{page}"
        write_atomic(folder / "gpu.json", f"{json.dumps(found | {'problem': problem}, indent=1)}\n".encode())
        write_atomic(folder / "gpu.md", page.encode())
    print(page)
    return int(any(piece["status"] != "done" for piece in found["pieces"].values()))


def be_child(options: argparse.Namespace) -> int:
    """Be the process that measures."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it once; the default mode needs it
    import torch

    from benchmarks.gpu_bench import Bench

    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("CUDA is not usable here. HINT: look at nvidia-smi, or rehearse with --device cpu --quick.")
    bench = Bench(torch.device("cuda", 0) if options.device == "cuda" else torch.device("cpu"), options.quick)
    pieces = options.only or list(CALLS[options.call])
    report = Report(options.out, options.quick or not bench.cuda, pieces)

    def piece(name: str) -> Callable[[Bench, Report], Any]:
        function = getattr(importlib.import_module(f"benchmarks.{CALLS[options.call][name]}"), name)
        return function  # type: ignore[no-any-return]

    def settle() -> None:
        gc.collect()  # engines are part of reference cycles
        bench.wait()
        if bench.cuda:
            torch.cuda.empty_cache()

    run_all({name: piece(name) for name in pieces}, bench, report, settle)
    return 0


def run_all(
    pieces: Mapping[str, Callable[[Any, Report], Any]], bench: Any, report: Report, settle: Callable[[], None]
) -> None:
    """Run one piece after the other.

    Args:
        settle: called after each; it raises where CUDA itself has failed, and no later piece can run.
    """
    for name, piece in pieces.items():
        outcome, began = report.outcomes[name], time.monotonic()
        outcome.status = "running"
        report.write()
        print(f"{name} ...", file=sys.__stdout__, flush=True)
        print(f"===== {name}", file=sys.stderr, flush=True)
        try:
            with contextlib.redirect_stdout(sys.stderr):
                piece(bench, report)
            status = "done"
        except Exception as error:
            traceback.print_exc()
            status, outcome.error = "failed", f"{type(error).__name__}: {error}".partition("\n")[0]
        usable = True
        try:
            settle()
        except RuntimeError as error:
            traceback.print_exc()
            usable, status = False, "failed"
            said = outcome.error or f"{error}".partition("\n")[0]
            outcome.error = f"CUDA itself has failed, so nothing is run after this: {said}"
        outcome.status, outcome.seconds = status, round(time.monotonic() - began, 1)
        report.write()
        if not usable:
            return


if __name__ == "__main__":
    sys.exit(main())

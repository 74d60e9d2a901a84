"""All that needs a GPU, in one go of less than ten minutes: checks, speed against peers, profiles.

    benchmarks/gpu.sh [--out FOLDER] [--only same_bits,modes] [--limit SECONDS]
    benchmarks/gpu.sh --device cpu --quick        # a rehearsal on a CPU, whose figures mean nothing

Each piece is a process of its own with a time limit. One that fails or takes too long is reported, and the others still
run. The results are written after each piece: gpu.json, gpu.md (the table), gpu.log (what the pieces printed).
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from benchmarks.measure import RESULTS, ROOT, Row, table

# Each with the module it is in and its limit in seconds: what matters most comes first.
PIECES = {
    "same_bits": ("gpu_checks", 60),
    "no_syncs": ("gpu_checks", 40),
    "modes": ("gpu_speed", 90),
    "resume": ("gpu_resume", 120),
    "stall": ("gpu_parts", 40),
    "augmentation": ("gpu_parts", 60),
    "profiles": ("gpu_parts", 60),
    "graph": ("gpu_speed", 60),
    "peers": ("gpu_speed", 120),
    "tests": ("gpu_checks", 60),
    "compile:default": ("gpu_speed", 100),
    "compile:reduce-overhead": ("gpu_speed", 100),
    "compile:max-autotune": ("gpu_speed", 150),
}
LIMIT_SECONDS = 525.0
LEAST_SECONDS = 10.0  # with less left a piece is not begun
EVERY_NTH_IMAGE = 5


@dataclass
class Outcome:
    """What became of one piece."""

    status: str  # done | failed | out of time | left out
    seconds: float = 0.0
    rows: list[Row] = field(default_factory=list)
    text: str = ""
    environment: dict[str, Any] = field(default_factory=dict)
    error: str = ""


def main(argv: list[str] | None = None) -> int:
    """Run the pieces; 1 if any did not get through."""
    options = _options(argv)
    if options.piece:
        _be_piece(options)
        return 0
    signal.signal(signal.SIGTERM, _leave)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "gpu.log").write_text("")
    # On a CPU it is a rehearsal, which may take its time on a machine that does other work, too.
    patience = 10 if options.device == "cpu" else 1
    end, outcomes = time.monotonic() + patience * options.limit, {}
    with tempfile.TemporaryDirectory() as folder:
        if options.images:
            options.images = _unpacked(options.images, Path(folder))
        for name in options.only or PIECES:
            print(f"{name} ...", file=sys.stderr, flush=True)
            outcomes[name] = _run(name, min(patience * PIECES[name][1], end - time.monotonic()), options, Path(folder))
            _write(outcomes, options)
    print((options.out / "gpu.md").read_text())
    return int(any(outcome.status != "done" for outcome in outcomes.values()))


def _options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks/gpu.sh", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="a tiny model and few repetitions")
    parser.add_argument("--only", type=lambda text: text.split(","), help=f"some of {', '.join(PIECES)}")
    parser.add_argument("--limit", type=float, default=LIMIT_SECONDS, metavar="SECONDS", help="for all pieces together")
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", default=os.environ.get("OUT") or RESULTS / "gpu",
        help="default: $OUT, else benchmarks/results/gpu",
    )  # fmt: skip
    parser.add_argument(
        "--images", type=Path, metavar="ARCHIVE", default=os.environ.get("CIFAR_HPC_TEST_IMAGES"),
        help="tar of CIFAR-10 as image files; default: $CIFAR_HPC_TEST_IMAGES, else synthetic images",
    )  # fmt: skip
    parser.add_argument("--piece", help=argparse.SUPPRESS)
    parser.add_argument("--report", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    options.out = Path(options.out)
    unknown = [name for name in options.only or () if name not in PIECES]
    if unknown:
        parser.error(f"--only {unknown[0]}: allowed: {', '.join(PIECES)}")
    return options


def _leave(*_: object) -> NoReturn:
    sys.exit(128 + signal.SIGTERM)  # through every `finally`, so that no piece is left behind


def _unpacked(archive: Path, folder: Path) -> Path:
    """Some images of the archive; it has one folder, with train/ and test/ in it. A folder is taken as it is."""
    if archive.is_dir():
        return archive
    with tarfile.open(archive, "r|*") as tar:
        chosen = (m for number, m in enumerate(tar) if number % EVERY_NTH_IMAGE == 0 or not m.isfile())
        tar.extractall(folder / "images", members=chosen, filter="data")
    return next((folder / "images").iterdir())


def _run(name: str, limit: float, options: argparse.Namespace, folder: Path) -> Outcome:
    """One piece, in a process group of its own, which is gone afterwards."""
    if limit < LEAST_SECONDS:
        return Outcome("left out", error="no time was left")
    report, began = folder / "report.json", time.monotonic()
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.gpu", "--piece", name, "--report", report, "--device", options.device]
    command += [*(["--quick"] if options.quick else []), *(["--images", options.images] if options.images else [])]
    environment = os.environ | {
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        "TRITON_CACHE_DIR": str(folder / "triton"),
    }
    log = options.out / "gpu.log"
    with log.open("ab") as output:
        output.write(f"\n===== {name}\n".encode())
        output.flush()
        process = subprocess.Popen(
            list(map(str, command)), cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL, process_group=0,
        )  # fmt: skip
        try:
            status = "done" if process.wait(limit) == 0 else "failed"
        except subprocess.TimeoutExpired:
            status = "out of time"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    found = json.loads(report.read_text()) if report.exists() else {"rows": [], "text": "", "environment": {}}
    rows = [Row(**row) for row in found["rows"]]
    error = "" if status == "done" else log.read_text(errors="replace").strip().splitlines()[-1]
    return Outcome(status, round(time.monotonic() - began, 1), rows, found["text"], found["environment"], error)


def _write(outcomes: dict[str, Outcome], options: argparse.Namespace) -> None:
    """The results so far."""
    environment = next((o.environment for o in outcomes.values() if o.environment), {})
    content = {
        "environment": environment,
        "device": options.device,
        "quick": options.quick,
        "pieces": {name: asdict(outcome) for name, outcome in outcomes.items()},
    }
    (options.out / "gpu.json").write_text(json.dumps(content, indent=1) + "\n")
    lines = [] if options.device == "cuda" and not options.quick else ["A REHEARSAL: these figures mean nothing.", ""]
    lines += [", ".join(f"{key} {value}" for key, value in environment.items()), ""]
    lines += [table([row for outcome in outcomes.values() for row in outcome.rows]), ""]
    lines += [
        f"{name}: {o.status} in {o.seconds:.0f} s{f' ({o.error})' if o.error else ''}" for name, o in outcomes.items()
    ]
    lines += ["", *(outcome.text for outcome in outcomes.values() if outcome.text)]
    (options.out / "gpu.md").write_text("\n".join(lines))


def _be_piece(options: argparse.Namespace) -> None:
    """Be one of the pieces."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it once; the default mode needs it
    import torch

    from benchmarks.gpu_bench import Bench, Report

    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("CUDA is not usable here. HINT: look at nvidia-smi, or rehearse with --device cpu --quick.")
    bench = Bench(
        torch.device("cuda", 0) if options.device == "cuda" else torch.device("cpu"), options.quick, options.images
    )
    report = Report(options.report)
    report.add()
    module = importlib.import_module(f"benchmarks.{PIECES[options.piece][0]}")
    function, _, mode = options.piece.partition(":")
    piece = module.compiled(mode) if function == "compile" else getattr(module, function)
    piece(bench, report)


if __name__ == "__main__":
    sys.exit(main())

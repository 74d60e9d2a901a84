"""From the start of a process to its first step: resumed runs of the full model, phase by phase.

The images are a folder of 50,000 and 10,000 (--quick: 10,000 drawn ones), decoded and cached before anything is timed.
What is ours is all that a start takes beyond `import torch` and one usual step.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.measure import ROOT, Row, quartiles, rounds, run_part

NAME, BATCH = "startup", 16
SETTINGS = [
    f"train.batch_size={BATCH}", "train.shards=1", "train.device=cpu", "train.cpu_threads=2", "train.amp=fp32",
    "train.log_seconds=1", "checkpoint.every_steps=1000000", "resources.gpus_per_node=0",
]  # fmt: skip
SYNTHETIC = ["data.source=synthetic", "data.train_size=10000", "data.test_size=2000"]
PHASES = {
    "process": "interpreter and command line",
    "import": "imports, PyTorch's included, and the spec",
    "group": "device and process group",
    "lock": "the run's lock",
    "checkpoint": "reading and verifying the checkpoint",
    "data": "reading and verifying the images",
    "model": "model, optimizer, taking over the state",
}
LINES = 3  # of progress, from which a usual step is taken; the first has the first step in it
LIMIT_SECONDS = 120.0


class Starts:
    """Starts of one run, each of which resumes where the one before was stopped."""

    def __init__(self, root: Path, settings: list[str]) -> None:
        self.logs = root / "logs" / NAME
        self.command = [
            sys.executable, "-m", "cifar_hpc", "train", "jobs/improved_resnet.yaml", "--name", NAME,
            "--set", *SETTINGS, *settings,
        ]  # fmt: skip
        self.environment = os.environ | {"CIFAR_HPC_ROOT": str(root)}

    def once(self) -> tuple[dict[str, float], float]:
        """Start, compute a few steps, stop; returns the seconds of each phase and those of a usual step."""
        skip = len(self._rates())
        process = subprocess.Popen(
            self.command, cwd=ROOT, env=self.environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        try:
            end = time.monotonic() + LIMIT_SECONDS
            while len(self._rates()) < skip + LINES:
                if process.poll() is not None or time.monotonic() > end:
                    raise RuntimeError(f"{' '.join(self.command)}: status {process.poll()}\n{self._log()}")
                time.sleep(0.1)
            process.terminate()
            process.communicate(timeout=LIMIT_SECONDS)
        finally:
            process.kill()
            process.wait()
        usual = statistics.median(BATCH / rate for rate in self._rates()[skip + 1 :])
        return self._events("first_step")[-1]["startup"], usual

    def _rates(self) -> list[float]:
        return [float(rate.replace(",", "")) for rate in re.findall(r"([\d.,]+) img/s  run ETA", self._log())]

    def _log(self) -> str:
        log = self.logs / "train.log"
        return log.read_text() if log.exists() else ""

    def _events(self, kind: str) -> list[dict[str, Any]]:
        rows = [json.loads(line) for line in (self.logs / "events.jsonl").read_text().splitlines()]
        return [row for row in rows if row["event"] == kind]


def _draw_folder(folder: Path) -> None:
    """50,000 and 10,000 images, as files."""
    from PIL import Image

    from cifar_hpc.data.synthetic import CLASSES, make_synthetic

    train, train_labels, test, test_labels = make_synthetic(50_000, 10_000)
    for split, images, labels in (("train", train, train_labels), ("test", test, test_labels)):
        for name in CLASSES:
            (folder / split / name).mkdir(parents=True)
        pixels = images.permute(0, 2, 3, 1).contiguous().numpy()
        for number, (image, label) in enumerate(zip(pixels, labels.tolist(), strict=True)):
            Image.fromarray(image).save(folder / split / CLASSES[label] / f"{number}.bmp")


def _import_torch() -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import torch"], check=True)
    return time.perf_counter() - began


def measure(quick: bool) -> list[Row]:
    """Rows of each phase, and of what is ours."""
    with tempfile.TemporaryDirectory() as folder:
        settings = SYNTHETIC
        if not quick:
            _draw_folder(Path(folder) / "images")
            settings = ["data.source=folder", f"data.root={folder}/images"]
        starts = Starts(Path(folder), settings)
        starts.once()  # decodes, caches, and leaves a checkpoint
        _import_torch()
        torch, phases, usual = [], [], []
        for _ in rounds(2 if quick else 5):
            torch.append(_import_torch())
            seconds, step = starts.once()
            phases.append(seconds)
            usual.append(step)
    images = "10,000 images drawn" if quick else "60,000 images from a folder's cache"
    note = f"resumed, full model, batch {BATCH}, 2 threads, {images}"
    rows = [Row(NAME, text, "s", quartiles([p[key] for p in phases]), note=note) for key, text in PHASES.items()]
    warm_up = [p["first_step"] - step for p, step in zip(phases, usual, strict=True)]
    rows.append(Row(NAME, "first step beyond a usual one", "s", quartiles(warm_up), note=note))
    ours = [p["total"] - step - t for p, step, t in zip(phases, usual, torch, strict=True)]
    total = quartiles([p["total"] for p in phases])
    rows.append(Row(NAME, "start to first step done", "s", total, "import torch", quartiles(torch), note=note))
    met = statistics.median(ours) < 2
    rows.append(Row(NAME, "of it ours", "s", quartiles(ours), target="< 2 s", met=met, note=f"{note}; no usual step"))
    return rows


if __name__ == "__main__":
    run_part(measure, __doc__)

"""Where a training step's time goes: the operators of one step of ours with the largest own time on the CPU.

python -m benchmarks.profile_step [--batch 128] [--top 20] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.contestants import train_ours
from benchmarks.measure import environment

WARM_UP_STEPS = 2


def operators(batch: int, threads: int) -> list[dict[str, Any]]:
    """Name, calls, own milliseconds and share (in %) of each operator of one step, the largest first."""
    torch.set_num_threads(threads)
    profiler = profile(activities=[ProfilerActivity.CPU])
    steps = 0

    def after_step() -> None:
        nonlocal steps
        steps += 1
        if steps == WARM_UP_STEPS:
            profiler.start()
        elif steps > WARM_UP_STEPS:
            profiler.stop()

    train_ours(batch * (WARM_UP_STEPS + 1), after_step, batch, threads, epochs=1)
    found = sorted(profiler.key_averages(), key=lambda e: e.self_cpu_time_total, reverse=True)
    total = sum(e.self_cpu_time_total for e in found)
    return [
        {
            "operator": e.key,
            "calls": e.count,
            "own_ms": round(e.self_cpu_time_total / 1e3, 2),
            "share": round(100 * e.self_cpu_time_total / total, 2),
        }
        for e in found
    ]


def main() -> None:
    """Profile, print and, with --json, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--top", type=int, default=20, help="how many operators to print")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all of them there")
    options = parser.parse_args()
    found = operators(options.batch, options.threads)
    print(f"{'operator':<50} {'calls':>6} {'own ms':>10} {'share':>7}")
    for one in found[: options.top]:
        print(f"{one['operator'][:50]:<50} {one['calls']:>6} {one['own_ms']:>10,.1f} {one['share']:>6.1f}%")
    if options.json:
        report = {"environment": environment(), "batch": options.batch, "operators": found}
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()

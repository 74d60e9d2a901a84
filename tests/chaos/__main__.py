"""python -m tests.chaos: disturb small real runs at many moments, and compare them with undisturbed ones."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from tests.chaos import report
from tests.chaos.cluster import Cluster
from tests.chaos.plan import SHARDS, plan
from tests.chaos.play import Played, Stage
from tests.chaos.trouble import draw
from tests.nursery import nursery


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--runs", type=int, default=10, help="how many runs (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="decides what is done to which run (default: %(default)s)")
    parser.add_argument("--only", type=int, metavar="K", help="just run K of the campaign (from 0)")
    parser.add_argument("--faults", type=int, default=6, help="faults a run, about (default: %(default)s)")
    parser.add_argument(
        "--troubles", type=int, default=2,
        help="storage that fails, lost folders, damaged files, ranks that differ, a run (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--backend", choices=("local", "slurm"), default="local",
        help="processes on this machine, or jobs on the cluster of $SLURM_CONF (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--worlds", default="1,2,3,4", help="numbers of ranks to draw from (default: %(default)s)")
    parser.add_argument(
        "--fresh", type=float, default=0.2, metavar="SHARE",
        help="share of the faults at random times that strike new interpreters, start-up included, instead of "
        "forked ones (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--seconds", type=float, default=1e9, help="no run begins later than that (default: no limit)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="where the runs are played (default: a temporary folder)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the totals there")
    arguments = parser.parse_args(argv)
    try:
        arguments.worlds = [int(word) for word in arguments.worlds.split(",")]
    except ValueError:
        parser.error(f"--worlds: {arguments.worlds!r} is not allowed; allowed: numbers with commas, such as 1,2,4")
    if not all(1 <= world <= SHARDS for world in arguments.worlds):
        parser.error(f"--worlds: {arguments.worlds} is not allowed; allowed: 1 to {SHARDS}, the number of shards")
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Play a campaign; exit status 1 if any run lost anything."""
    arguments = parse(argv)
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="chaos-"))
    began = time.monotonic()
    nursery()  # before there are threads that could each start one
    stage = Stage(folder)
    played: list[Played] = []
    numbers = range(arguments.runs) if arguments.only is None else [arguments.only]

    cluster = Cluster(stage) if arguments.backend == "slurm" else None

    def play(number: int) -> Played | None:
        if time.monotonic() - began > arguments.seconds:
            return None
        what = plan(arguments.seed, number, arguments.faults, arguments.worlds, arguments.fresh)
        if cluster is None:
            return stage.play(what, list(draw(arguments.seed, number, arguments.troubles, arguments.worlds)))
        return cluster.play(what, arguments.faults, arguments.worlds, arguments.seed)

    with ThreadPoolExecutor(arguments.jobs) as pool:
        try:
            for done in as_completed([pool.submit(play, number) for number in numbers]):
                if (run := done.result()) is not None:
                    played.append(run)
                    _say(arguments, run, time.monotonic() - began)
        finally:
            pool.shutdown(cancel_futures=True)
            nursery().close()
    figures = report.totals(played, time.monotonic() - began)
    print(f"\n{report.table(played)}\n")
    if figures["places_never_reached"] and cluster is None:
        print(f"never reached: {', '.join(figures['places_never_reached'])}")
    print(
        "{faults} faults in {starts} starts of {runs} runs, {places_reached} of {places} places, {failed_runs} runs "
        "failed; {seconds} s; survivors ended at most {slowest_survivors_seconds} s after a rank was killed".format(
            **figures
        )
    )
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")
    if figures["failed_runs"]:
        return 1
    if arguments.folder is None:
        shutil.rmtree(folder)
    return 0


def _say(arguments: argparse.Namespace, run: Played, seconds: float) -> None:
    hit = [s for s in run.struck if s.outcome != "not reached"]
    print(
        f"{seconds:7.1f} s  run {run.plan.number:4}  {run.plan.spec:<10} {run.starts:3} starts {len(hit):3} faults  "
        f"{'FAILED' if run.problems else 'kept'}",
        flush=True,
    )
    if run.problems:
        print("\n".join(f"    {line}" for line in [*run.diary, *run.problems]))
        print(f"    folder: {run.folder}\n    again: {_again(arguments, run.plan.number)}", flush=True)


def _again(arguments: argparse.Namespace, number: int) -> str:
    worlds = ",".join(str(world) for world in arguments.worlds)
    return (
        f"python -m tests.chaos --seed {arguments.seed} --only {number} --faults {arguments.faults} "
        f"--troubles {arguments.troubles} --worlds {worlds} --fresh {arguments.fresh} --backend {arguments.backend}"
    )


if __name__ == "__main__":
    sys.exit(main())

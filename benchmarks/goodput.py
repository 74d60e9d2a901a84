"""Goodput against preemption rate: what share of its time a run computes what counts, for several checkpoint intervals.

    python benchmarks/goodput.py [--seeds 40] [--hours 24] [--stall 0.3] [--write 1.4] [--restart 15] [--requeue 121]

A simulation of discrete events, no cluster: starts of a run whose lives are drawn from an exponential distribution,
checkpoints, kills, restarts. `auto` is `checkpoint.every: auto` itself: `training.checkpoints.interval` decides, from
what it would measure in a run. Prints a table, writes benchmarks/results/goodput.json and docs/goodput.png and .svg.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from cifar_hpc.runs.history import Losses  # noqa: E402
from cifar_hpc.training.checkpoints.interval import CheckpointPacer, Costs, best_interval, mean_time_to_loss  # noqa: E402

MINUTE, HOUR, DAY = 60.0, 3600.0, 86_400.0
EPOCH, AUTO, BEST, WARNED = "each epoch", "auto", "best known", "with warning"
MEANS = (1, 2, 3, 5, 8, 15, 30, 60, 120, 240, 480, 1440)  # minutes between two preemptions, in the mean


@dataclass(frozen=True)
class Setting:
    """Seconds. The defaults are near what was measured for the full model (59 MB); docs/goodput.md has the ranges.

    stall: what training loses to a checkpoint. write: from the snapshot, or from the signal, to the file on disk.
    restart: from the start of the processes to the first step. requeue: from a kill to that start.
    epoch: of training. horizon: how long the run is watched.
    """

    stall: float = 0.3
    write: float = 1.4
    restart: float = 15.0
    requeue: float = 0.0
    epoch: float = 1110.0
    horizon: float = DAY

    @property
    def costs(self) -> Costs:
        """What a run can measure of them."""
        return Costs(self.stall, self.write)


def expected_goodput(interval: float, costs: Costs, restart: float, mean: float) -> float:
    """Return the share of a run's time that is not lost, 0 to 1 (Daly 2006, the complete model).

    Args:
        interval: seconds from one checkpoint to the next.
        restart: seconds from a loss to the next step of training.
    """
    lost = restart + costs.write  # the work done during the last write is lost as well
    return max(0.0, interval - costs.stall) / (mean * math.exp(lost / mean) * math.expm1(interval / mean))


def killed(fixed: float | None, setting: Setting, mean: float, rng: random.Random) -> float:
    """Goodput of a run that is killed without warning, every `mean` seconds on average, while its job holds a node.

    Args:
        fixed: seconds between two checkpoints; None is checkpoint.every: auto.
    """
    clock = work = seen_seconds = 0.0
    losses = 0
    while clock < setting.horizon:
        life = rng.expovariate(1 / mean)
        end = min(life, setting.horizon - clock) - setting.restart  # of training, or of our watching
        pacer = CheckpointPacer(Losses(losses, seen_seconds), lambda line: None, 0.0)
        now = here = saved = known = stall = 0.0  # stall: of the checkpoint at the beginning of this stretch, if any
        while now < end:
            wait = max(pacer.interval(now) if fixed is None else fixed, stall)
            if now + wait > end:
                here += max(0.0, end - now - stall)
                break
            now, here, stall = now + wait, here + wait - stall, setting.stall
            written = now + setting.write
            if written <= end:  # else it is killed with the file half written
                saved, known = here, written
                pacer.saved(setting.stall, now + setting.stall)
                pacer.step(0.0, False, written)
        if life > setting.horizon - clock:
            return (work + here) / setting.horizon
        work, seen_seconds, losses = work + saved, seen_seconds + known, losses + 1
        clock += life + setting.requeue
    return work / setting.horizon


def warned(setting: Setting, mean: float, rng: random.Random) -> float:
    """Goodput of a run that is preempted as often, but with a warning: it saves at its stop step and loses no work."""
    clock = work = 0.0
    interval = best_interval(setting.costs, mean_time_to_loss(Losses()))
    while clock < setting.horizon:
        life = rng.expovariate(1 / mean)
        trained = max(0.0, min(life, setting.horizon - clock) - setting.restart)
        work += trained - setting.stall * (trained // interval)
        clock += life + setting.write + setting.requeue
    return work / setting.horizon


def runs(setting: Setting) -> dict[str, Callable[[float, random.Random], float]]:
    """Goodput of one run as a function of (mean seconds between preemptions, randomness), by the names shown."""

    def kill(fixed: float | None) -> Callable[[float, random.Random], float]:
        return lambda mean, rng: killed(fixed, setting, mean, rng)

    return {
        "1 min": kill(MINUTE),
        "5 min": kill(5 * MINUTE),
        "15 min": kill(15 * MINUTE),
        "60 min": kill(HOUR),
        EPOCH: kill(setting.epoch),
        AUTO: kill(None),
        BEST: lambda mean, rng: killed(best_interval(setting.costs, mean), setting, mean, rng),
        WARNED: lambda mean, rng: warned(setting, mean, rng),
    }


def quartiles(values: list[float]) -> list[float]:
    """[first quartile, median, third quartile]."""
    return statistics.quantiles(values, n=4, method="inclusive")


def measure(setting: Setting, seeds: int) -> dict[str, list[list[float]]]:
    """{name: quartiles at each of MEANS}. A seed gives all of them the same lives."""
    return {
        name: [quartiles([run(MINUTE * m, random.Random(f"{seed} {m}")) for seed in range(seeds)]) for m in MEANS]
        for name, run in runs(setting).items()
    }


def table(curves: dict[str, list[list[float]]]) -> str:
    """Medians in percent."""
    lines = [f"{'killed every':>13}" + "".join(f"{name:>16}" for name in curves)]
    for i, minutes in enumerate(MEANS):
        cells = "".join(f"{100 * curve[i][1]:15.1f}%" for curve in curves.values())
        lines.append(f"{span(minutes):>13}{cells}")
    return "\n".join(lines)


def span(minutes: float) -> str:
    """Minutes in the largest unit that fits."""
    if minutes < 60:
        return f"{minutes:g} min"
    return f"{minutes / 60:g} h" if minutes < 1440 else f"{minutes / 1440:g} day"


def draw(panels: list[dict[str, Any]], path: Path) -> None:
    """One panel a setting, as `path`.png and `path`.svg."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "goodput"  # the same figure is the same file
    from matplotlib import pyplot
    from matplotlib.ticker import PercentFormatter

    looks: dict[str, dict[str, Any]] = {
        WARNED: {"color": "#009e73", "ls": "--", "lw": 2, "label": "preempted with a warning (saves first; auto)"},
        AUTO: {"color": "#d55e00", "lw": 3.2, "label": "killed, checkpoints: auto"},
        "1 min": {"color": "#9ecae1"},
        "5 min": {"color": "#5aa2cf"},
        "15 min": {"color": "#2b6ca3"},
        EPOCH: {
            "color": "#777777",
            "ls": ":",
            "label": f"each epoch ({panels[0]['setting']['epoch'] / MINUTE:.1f} min)",
        },
        "60 min": {"color": "#0b3055"},
    }
    figure, axes = pyplot.subplots(1, len(panels), figsize=(12, 6.2), sharey=True, layout="constrained")
    for axis, panel in zip(axes, panels, strict=True):
        setting = panel["setting"]
        for name, look in looks.items():
            low, middle, high = zip(*panel["curves"][name], strict=True)
            (line,) = axis.plot(MEANS, middle, **{"lw": 1.8, "label": f"every {name}"} | look)
            axis.fill_between(MEANS, low, high, color=line.get_color(), alpha=0.15, lw=0)
        wait = f"Slurm's {setting['requeue']:.0f} s after a requeue" if setting["requeue"] else "restarted at once"
        axis.set_title(f"{wait}, {setting['restart']:.0f} s to start up", fontsize=12)
        axis.set_xscale("log")
        ticks = (1, 5, 15, 60, 240, 1440)
        axis.set_xticks(ticks, [span(m) for m in ticks])
        axis.minorticks_off()
        axis.set_xlim(MEANS[0], MEANS[-1])
        axis.set_ylim(0, 1)
        axis.yaxis.set_major_formatter(PercentFormatter(1))
        axis.grid(color="#e4e4e4")
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_xlabel("mean time between preemptions")
    axes[0].set_ylabel("goodput: time that counts / time in all")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=11)
    hours = panels[0]["setting"]["horizon"] / HOUR
    figure.suptitle(f"how much of {hours:g} hours counts for a run that is killed (median; shaded: the middle half)")
    for suffix, metadata in ((".png", None), (".svg", {"Date": None})):
        figure.savefig(path.with_suffix(suffix), dpi=110, metadata=metadata)
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> None:
    """Simulate, print, write, draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seeds", type=int, default=40, help="runs for each point")
    parser.add_argument("--hours", type=float, default=24, help="how long each run is watched")
    parser.add_argument(
        "--stall", type=float, default=Setting.stall, help="seconds of training that a checkpoint costs"
    )
    parser.add_argument("--write", type=float, default=Setting.write, help="seconds until a checkpoint is on disk")
    parser.add_argument("--restart", type=float, default=Setting.restart, help="seconds of starting up")
    parser.add_argument("--requeue", type=float, default=121, help="seconds that Slurm waits after a requeue")
    parser.add_argument("--epoch", type=float, default=Setting.epoch, help="seconds of an epoch")
    parser.add_argument("--out", type=Path, default=ROOT, help="folder that holds benchmarks/ and docs/")
    options = parser.parse_args(argv)
    panels = []
    for requeue in (0.0, options.requeue):
        setting = Setting(options.stall, options.write, options.restart, requeue, options.epoch, options.hours * HOUR)
        curves = measure(setting, options.seeds)
        panels.append({"setting": asdict(setting), "curves": curves})
        print(f"\ngoodput (median of {options.seeds} runs of {options.hours:g} h), {requeue:g} s from kill to start")
        print(table(curves))
    results = options.out / "benchmarks" / "results"
    results.mkdir(parents=True, exist_ok=True)
    report = {"minutes_between_preemptions": MEANS, "seeds": options.seeds, "panels": panels}
    (results / "goodput.json").write_text(json.dumps(report, indent=1) + "\n")
    (options.out / "docs").mkdir(exist_ok=True)
    draw(panels, options.out / "docs" / "goodput")


if __name__ == "__main__":
    main()

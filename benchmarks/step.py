"""Training steps with data loading and augmentation, against what users would write, and against the bf16 GEMM limit.

The full model at batch 128 (quick: 32). Ours and each peer are processes that keep their state and take turns, a few
steps at a time, frozen in between (contestants.py). The limit is the rate of large matrix products in the same run.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.contestants import CAREFUL, LIGHTNING, NAIVE, OURS, Contestant
from benchmarks.measure import Row, alternate, meets, quartiles, ratios, run_part
from benchmarks.peers.network import Network
from cifar_hpc.config.spec import Spec
from cifar_hpc.training.environment import resolve_amp

THREADS = 2
IMAGES = 2048  # more than are used on a CPU: no epoch ends while the clock runs
TURN_SECONDS = 2.0  # the fewest steps that take this long are a turn
PEERS = {
    NAIVE: ("a plain PyTorch script, float32", ">= 4"),
    CAREFUL: ("a careful PyTorch script, bf16, channels_last", ">= 1.3"),
    LIGHTNING: ("Lightning's default Trainer, bf16-mixed", ""),
}
GEMM_TARGET = ">= 0.55"
SQUARES = (2048, 4096)


def measure(quick: bool) -> list[Row]:
    """Rows of the part "step"."""
    batch, repetitions = (32, 3) if quick else (128, 7)
    here = [name for name in (OURS, *PEERS) if name != LIGHTNING or importlib.util.find_spec("lightning")]
    torch.set_num_threads(THREADS)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[resolve_amp(Spec(), device)]
    gemms = {
        **{f"square {n}": _products([(n, n, n)], dtype, device) for n in SQUARES},
        "1x1": _products(pointwise_shapes(batch), dtype, device),
    }
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        racers = []
        for name in here:
            racers.append(Contestant(name, batch, IMAGES, THREADS, folder))
            stack.callback(racers[-1].close)
        for racer in racers:
            racer.wait_ready()
        steps = {}
        for racer in racers:
            racer.take(1)  # sets up the model
            steps[racer.name] = 1 if quick else max(1, round(TURN_SECONDS / racer.take(1)))
        works = {racer.name: _turn(racer, steps[racer.name]) for racer in racers}
        seconds = alternate({**works, **{name: work for name, (work, _) in gemms.items()}}, repetitions)
    speeds = {name: [steps[name] * batch / s for s in seconds[name]] for name in here}
    rates = {name: [flops / s / 1e9 for s in seconds[name]] for name, (_, flops) in gemms.items()}
    return [*peer_rows(speeds, batch), *limit_rows(speeds[OURS], rates, dtype, device)]


def _turn(racer: Contestant, steps: int) -> Callable[[], float]:
    return lambda: racer.take(steps)


def peer_rows(speeds: dict[str, list[float]], batch: int) -> list[Row]:
    """Ours against each peer; one that is not installed says so."""
    what, unit = f"training step, batch {batch}", "img/s"
    rows = []
    for name, (peer, target) in PEERS.items():
        ours = quartiles(speeds[OURS])
        if name not in speeds:
            note = f"{name} is not installed: pip install -r requirements-bench.txt"
            rows.append(Row("step", what, unit, ours, peer, target=target, note=note))
            continue
        ratio = ratios(speeds[OURS], speeds[name])
        met = meets(ratio[1], target) if target else None
        rows.append(Row("step", what, unit, ours, peer, quartiles(speeds[name]), ratio, target, met))
    return rows


def limit_rows(
    ours: Sequence[float], rates: dict[str, list[float]], dtype: torch.dtype, device: torch.device
) -> list[Row]:
    """Ours against matrix products, in floating-point operations of the convolutions and the linear layer."""
    flops = flops_per_image()
    done = [speed * flops / 1e9 for speed in ours]
    kind = str(dtype).removeprefix("torch.")
    limit = [max(both) for both in zip(*(rates[f"square {n}"] for n in SQUARES), strict=True)]
    note = f"{flops / 1e9:.3f} GFLOP for an image, forward and backward, as FlopCounterMode counts them"
    rows = []
    for peer, rate, target in (
        (f"torch.mm in {kind}, the faster of squares of {' and '.join(map(str, SQUARES))}", limit, GEMM_TARGET),
        (f"torch.mm in {kind}, shapes of the model's 1x1 convolutions", rates["1x1"], ""),
    ):
        share = ratios(done, rate)
        met = meets(share[1], target) if target else None
        rows.append(
            Row(
                "step", "arithmetic of a training step", "GFLOP/s", quartiles(done), peer, quartiles(rate), share,
                target, met, note,
            )
        )  # fmt: skip
    return rows


def flops_per_image() -> float:
    """Floating-point operations of one image's forward and backward pass."""
    images = torch.zeros(2, 3, 32, 32)
    with FlopCounterMode(display=False) as counter:
        Network()(images).sum().backward()
    return counter.get_total_flops() / len(images)


def pointwise_shapes(batch: int) -> list[tuple[int, int, int]]:
    """[rows, inner, columns] of the last convolution of a block in each layer: pixels times width to 4 x width."""
    return [(batch * size * size, width, 4 * width) for size, width in ((32, 64), (16, 128), (8, 256))]


def _products(
    shapes: Sequence[tuple[int, int, int]], dtype: torch.dtype, device: torch.device
) -> tuple[Callable[[], None], int]:
    """A work that multiplies matrices of each shape once, and its floating-point operations."""
    pairs = [(torch.randn(m, k), torch.randn(k, n)) for m, k, n in shapes]
    pairs = [(a.to(device, dtype), b.to(device, dtype)) for a, b in pairs]
    outputs = [a @ b for a, b in pairs]

    def work() -> None:
        for (a, b), output in zip(pairs, outputs, strict=True):
            torch.mm(a, b, out=output)
        if device.type == "cuda":
            torch.cuda.synchronize()

    return work, sum(2 * m * k * n for m, k, n in shapes)


if __name__ == "__main__":
    run_part(measure, __doc__)

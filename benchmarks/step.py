"""Training steps with data loading and augmentation, against what users would write, and against their roofline.

The full model at batch 128 (quick: 16). Ours and each peer are processes that keep their state and take turns, a few
steps at a time, frozen in between (contestants.py). The roofline is the least time of a step's operations one after the
other: each takes as long as a copy of as many bytes, or as matrix products of as many FLOPs, whichever is longer. The
rates are those of the same run. A copy that fits into a cache is faster, so each operation is held against the largest
copy that is no larger than it.

--amp fp32 compares in float32 throughout, for a CPU without bf16.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch

from benchmarks.contestants import CAREFUL, LIGHTNING, NAIVE, OURS, Contestant
from benchmarks.launches import Operation, record_on_cpu
from benchmarks.measure import Row, alternate, meets, quartiles, ratios, run_part
from cifar_hpc.config.io import from_plain
from cifar_hpc.training.environment import resolve_amp

THREADS = 2
IMAGES = 2048  # more than are used on a CPU: no epoch ends while the clock runs
TURN_SECONDS = 2.0  # the fewest steps that take this long are a turn
PEERS = {
    NAIVE: ("a plain PyTorch script, float32", ">= 4"),
    CAREFUL: ("a careful PyTorch script, bf16, channels_last", ">= 1.3"),
    LIGHTNING: ("Lightning's default Trainer, bf16-mixed", ""),
}
IN_FLOAT32 = {NAIVE: PEERS[NAIVE][0], CAREFUL: "a careful PyTorch script, float32, channels_last"}  # without targets
ROOFLINE_TARGET = ">= 0.6"
SQUARE = 2048
COPIES = tuple(2**power for power in (18, 21, 24, 25, 26, 27))  # bytes read and written; the largest as activations
COPIED = 2**29  # bytes in a turn
PRODUCTS = 0  # among the sizes of copies


def measure(quick: bool, amp: str = "auto") -> list[Row]:
    """Rows of the part "step"."""
    batch, repetitions = (16, 3) if quick else (128, 7)
    peers = PEERS if amp == "auto" else {name: (text, "") for name, text in IN_FLOAT32.items()}
    here = [name for name in (OURS, *peers) if name != LIGHTNING or importlib.util.find_spec("lightning")]
    torch.set_num_threads(THREADS)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    used = resolve_amp(from_plain({"train": {"amp": amp}}), device)
    rulers, work = (_rulers(used), _operations(batch, amp)) if device.type == "cpu" else ({}, [])
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        racers = []
        for name in here:
            racers.append(Contestant(name, batch, IMAGES, THREADS, folder, amp))
            stack.callback(racers[-1].close)
        for racer in racers:
            racer.wait_ready()
        steps = {}
        for racer in racers:
            racer.take(1)  # sets up the model
            steps[racer.name] = 1 if quick else max(1, round(TURN_SECONDS / racer.take(1)))
        works = {racer.name: partial(racer.take, steps[racer.name]) for racer in racers}
        works |= {str(size): ruler for size, (ruler, _) in rulers.items()}
        seconds = alternate(works, repetitions)
    speeds = {name: [steps[name] * batch / s for s in seconds[name]] for name in here}
    rows = peer_rows(speeds, peers, batch)
    if rulers:
        rates = {size: [amount / s for s in seconds[str(size)]] for size, (_, amount) in rulers.items()}
        rows.append(roofline_row(speeds[OURS], rates, work, batch))
    return rows


def _operations(batch: int, amp: str) -> list[Operation]:
    """Record a step of ours on this CPU, in a process of its own, whose memory goes with it."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(record_on_cpu, batch, THREADS, amp).result()


def peer_rows(speeds: dict[str, list[float]], peers: Mapping[str, tuple[str, str]], batch: int) -> list[Row]:
    """Ours against each peer; one that is not installed says so."""
    what, unit = f"training step, batch {batch}", "img/s"
    rows = []
    for name, (peer, target) in peers.items():
        ours = quartiles(speeds[OURS])
        if name not in speeds:
            note = f"{name} is not installed: pip install -r requirements-bench.txt"
            rows.append(Row("step", what, unit, ours, peer, target=target, note=note))
            continue
        ratio = ratios(speeds[OURS], speeds[name])
        met = meets(ratio[1], target) if target else None
        rows.append(Row("step", what, unit, ours, peer, quartiles(speeds[name]), ratio, target, met))
    return rows


def roofline_row(
    ours: Sequence[float], rates: Mapping[int, Sequence[float]], work: Sequence[Operation], batch: int
) -> Row:
    """Ours against the speed at which each operation takes no longer than its bytes or its arithmetic must.

    Args:
        ours: images a second, one figure a repetition.
        rates: as `roofline` has them, of the same repetitions.
        work: a step's operations.
    """
    repetitions = [dict(zip(rates, one, strict=True)) for one in zip(*rates.values(), strict=True)]
    most = [batch / roofline(work, one) for one in repetitions]
    share = ratios(ours, most)
    flops, size = sum(one.flops for one in work) / batch, sum(one.bytes for one in work) / batch
    speeds = {size: quartiles(values)[1] / 1e9 for size, values in rates.items()}
    copies = ", ".join(f"{speeds[size]:.0f} for {size / 2**20:g} MiB" for size in speeds if size != PRODUCTS)
    note = (
        f"{len(work)} operations, {flops / 1e9:.2f} GFLOP and {size / 1e6:.0f} MB an image; products at "
        f"{speeds[PRODUCTS]:,.0f} GFLOP/s, copies in GB/s: {copies}"
    )
    return Row(
        "step", f"training step, batch {batch}", "img/s", quartiles(ours), "its roofline, operator by operator",
        quartiles(most), share, ROOFLINE_TARGET, meets(share[1], ROOFLINE_TARGET), note,
    )  # fmt: skip


def roofline(work: Sequence[Operation], rates: Mapping[int, float]) -> float:
    """Return the least seconds that the operations take, one after the other.

    Args:
        rates: bytes a second of copies, by the bytes that they read and write; FLOP/s of matrix products.
    """
    copies = sorted(size for size in rates if size != PRODUCTS)
    total = 0.0
    for one in work:
        size = max((size for size in copies if size <= one.bytes), default=copies[0])
        total += max(one.bytes / rates[size], one.flops / rates[PRODUCTS])
    return total


def _rulers(amp: str) -> dict[int, tuple[Callable[[], object], int]]:
    """Works of matrix products and of copies, and the FLOPs or bytes of each."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[amp]
    a, b = (torch.randn(SQUARE, SQUARE).to(dtype) for _ in range(2))
    product = torch.empty_like(a)
    rulers: dict[int, tuple[Callable[[], object], int]] = {
        PRODUCTS: (lambda: torch.mm(a, b, out=product), 2 * SQUARE**3)
    }
    for size in COPIES:
        source, target = torch.zeros(2, size // 2, dtype=torch.uint8)
        rulers[size] = partial(_repeat, COPIED // size, partial(target.copy_, source)), COPIED
    return rulers


def _repeat(times: int, work: Callable[[], object]) -> None:
    for _ in range(times):
        work()


if __name__ == "__main__":
    run_part(measure, __doc__, amp=("auto", "fp32"))

"""What a checkpoint takes from training: ours, torch.save in the loop, and torch.distributed.checkpoint.async_save.

The full model trains on the CPU in blocks of 10 steps, each with one checkpoint at its beginning or none; the four
kinds of blocks take turns in one process. What a checkpoint costs is a block's time beyond that of the block without
one in the same round, so that its work in the background is counted. Memory is measured in processes of their own.
"""

from __future__ import annotations

import gc
import multiprocessing
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

from benchmarks.measure import Row, alternate, meets, quartiles, ratios, run_part
from benchmarks.running import full_trainer, train

PART = "checkpoint"
NONE, OURS, TORCH_SAVE, ASYNC_SAVE = "none", "cifar_hpc", "torch.save in the loop", "DCP async_save"
BATCH = 32
BLOCK = 10
MIB = 2**20
FREED = "0 where it fits into what a step has freed, which malloc keeps (host_memory.py)"


class Contest:
    """One training state, and the ways to save it. Each returns once training may go on.

    Args:
        folder: an empty one for the checkpoints.
    """

    def __init__(self, folder: Path) -> None:
        self.trainer = full_trainer(folder, BATCH)
        assert self.trainer.store is not None
        self.store = self.trainer.store
        self.store.emit = lambda event: self._note(OURS)
        self.files = {TORCH_SAVE: folder / "torch_save.pt", ASYNC_SAVE: folder / "async_save"}
        self.pending: Future[Any] | None = None
        self.blocked: dict[str, list[float]] = {OURS: [], TORCH_SAVE: [], ASYNC_SAVE: []}
        self.durable: dict[str, list[float]] = {OURS: [], ASYNC_SAVE: []}
        self._began = 0.0
        for what in ("torch.distributed is disabled", "Detected an existing checkpoint"):  # both are meant
            warnings.filterwarnings("ignore", what)

    def block(self, way: str, steps: int) -> None:
        """One checkpoint, if any, and the steps after it."""
        if way != NONE:
            self._began = time.perf_counter()
            {OURS: self._ours, TORCH_SAVE: self._torch_save, ASYNC_SAVE: self._async_save}[way]()
            self.blocked[way].append(time.perf_counter() - self._began)
        train(self.trainer, steps)

    def settle(self) -> None:
        """Wait for what is still being written."""
        self.store.wait()
        if self.pending is not None:
            self.pending.result()

    def sizes(self) -> dict[str, int]:
        """Bytes of a checkpoint of each way."""
        newest = max(self.store.directory.glob("step_*.pt"))
        return {
            OURS: newest.stat().st_size,
            TORCH_SAVE: self.files[TORCH_SAVE].stat().st_size,
            ASYNC_SAVE: sum(path.stat().st_size for path in self.files[ASYNC_SAVE].iterdir()),
        }

    def _ours(self) -> None:
        self.trainer.save()  # what the training loop calls

    def _torch_save(self) -> None:
        torch.save(self._state(), self.files[TORCH_SAVE])

    def _async_save(self) -> None:
        if self.pending is not None:
            self.pending.result()  # as its documentation has it: one at a time
        saved = dcp.async_save(self._state(), checkpoint_id=self.files[ASYNC_SAVE], no_dist=True)
        assert isinstance(saved, Future)
        saved.add_done_callback(lambda _: self._note(ASYNC_SAVE))
        self.pending = saved

    def _state(self) -> dict[str, Any]:
        engine = self.trainer.engine
        return {**engine.state(), "step": self.trainer.position.step, "sums": engine.sums}

    def _note(self, way: str) -> None:
        self.durable[way].append(time.perf_counter() - self._began)


def measure(quick: bool) -> list[Row]:
    """Rows of the part "checkpoint"."""
    steps, rounds = (2, 2) if quick else (BLOCK, 9)
    with tempfile.TemporaryDirectory() as folder:
        contest = Contest(Path(folder))
        train(contest.trainer, 3)
        works = {way: _work(contest, way, steps) for way in (NONE, OURS, TORCH_SAVE, ASYNC_SAVE)}
        seconds = alternate(works, rounds, wait=contest.settle)
        sizes = contest.sizes()
    memory = {} if quick else {way: peak_memory(way) for way in (NONE, OURS, TORCH_SAVE, ASYNC_SAVE)}
    extra = {way: max(0.0, peak - memory[NONE]) for way, peak in memory.items()}
    usual = f"{steps} steps of batch {BATCH}, {contest.trainer.engine.amp}: {quartiles(seconds[NONE])[1]:.3g} s"
    rows = []
    for peer in (TORCH_SAVE, ASYNC_SAVE):
        rows += lost_rows(seconds, peer, steps, usual)
        ours, theirs = ([1e3 * s for s in contest.blocked[way][1:]] for way in (OURS, peer))
        rows.append(
            Row(PART, "training stands still", "ms", quartiles(ours), peer, quartiles(theirs), ratios(ours, theirs))
        )
        rows.append(_single("written", "MiB", sizes, peer, 1 / MIB))
        if extra:
            rows.append(_single("peak memory beyond training's", "MiB", extra, peer, 1.0, FREED))
    ours, theirs = contest.durable[OURS][1:], contest.durable[ASYNC_SAVE][1:]
    note = "beside training; torch.save in the loop syncs nothing"
    rows.append(Row(PART, "until it is durable", "s", quartiles(ours), ASYNC_SAVE, quartiles(theirs), note=note))
    return rows


def _work(contest: Contest, way: str, steps: int) -> Callable[[], None]:
    return lambda: contest.block(way, steps)


def lost_rows(seconds: dict[str, list[float]], peer: str, steps: int, usual: str) -> list[Row]:
    """What a checkpoint costs training: as it was measured, and at one a minute."""
    lost = {
        way: [with_one - without for with_one, without in zip(seconds[way], seconds[NONE], strict=True)]
        for way in (OURS, peer)
    }
    shares = {way: [100 * one / without for one, without in zip(lost[way], seconds[NONE], strict=True)] for way in lost}
    minutely = {way: [100 * one / 60 for one in lost[way]] for way in lost}
    return [
        _lost_row(f"training time lost, one per {steps} steps", shares, peer, "< 5 %" if steps >= BLOCK else "", usual),
        _lost_row("training time lost, one a minute", minutely, peer, "< 1 %", "derived: seconds lost by one / 60 s"),
    ]


def _lost_row(what: str, lost: dict[str, list[float]], peer: str, target: str, note: str) -> Row:
    ours = quartiles(lost[OURS])
    met = meets(ours[1], target) if target else None
    return Row(PART, what, "%", ours, peer, quartiles(lost[peer]), (), target, met, note)


def _single(what: str, unit: str, values: dict[str, Any], peer: str, scale: float, note: str = "") -> Row:
    ours, theirs = (quartiles([values[way] * scale]) for way in (OURS, peer))
    return Row(PART, what, unit, ours, peer, theirs, note=note)


def peak_memory(way: str) -> float:
    """MiB of resident memory that training with checkpoints reaches, in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_peak_memory, way).result()


def _peak_memory(way: str) -> float:
    with tempfile.TemporaryDirectory() as folder:
        contest = Contest(Path(folder))
        contest.block(way, 2)  # whatever is set up once
        contest.settle()
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew, see proc_pid_clear_refs(5)
        contest.block(way, 2)
        contest.settle()
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


if __name__ == "__main__":
    run_part(measure, __doc__)

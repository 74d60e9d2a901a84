"""Any number of ranks up to the number of shards, another one at each restart: the same bits.

Whole runs (the real Attempt: data, trainer, evaluation, files) on the pool of real processes, so that a start costs no
import. DDP's buckets are made small here: there are many, and DDP cuts them anew after the first step of each start.
"""

from __future__ import annotations

import functools
import gc
import json
import random
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import PLUS, Ranks, tiny_spec
from torch import Tensor

from cifar_hpc import tensorfile
from cifar_hpc.errors import SpecError
from cifar_hpc.runs.logs import read_jsonl
from cifar_hpc.runs.paths import RunPaths
from cifar_hpc.training import attempt as attempt_module
from cifar_hpc.training import engine, evaluation
from cifar_hpc.training.attempt import Attempt
from cifar_hpc.training.checkpoints.format import read_checkpoint
from cifar_hpc.training.checkpoints.store import newest_good
from cifar_hpc.training.context import Context
from cifar_hpc.training.distributed.group import Agreement
from cifar_hpc.training.distributed.shards import ShardReducer
from cifar_hpc.training.engine import Engine
from cifar_hpc.training.inputs import StepInputs
from cifar_hpc.training.process import Launch, StopFlag

BUCKET_MB = 0.005
TEST_BATCH = 16  # of the evaluation: every rank gets some
# Of `draw`, chosen for variety. With a lag of 1 stops must be two steps apart; 12 then stops after the very last step.
SEEDS = {2: 0, 3: 1, 7: 0, 8: 0, 10: 0, 12: 1}
STATE = ("step", "epoch", "step_in_epoch", "updates", "model", "buffers", "slow_buffers", "optimizer", "scaler", "sums")
SAME = ("epoch", "step", "images", "train_loss", "train_accuracy", "test_loss", "test_accuracy", "lr")


@dataclass(frozen=True)
class Plan:
    """One start of a run on every rank.

    stop: `who` is told to stop in this step, counted from 0; None trains to the end.
    overflow: (step, shard) pairs whose gradients overflow under fp16; each shard is alone in that.
    """

    stop: int | None = None
    who: int = 0
    overflow: tuple[tuple[int, int], ...] = ()


@contextmanager
def patched(plan: Plan, lag: int, stop: StopFlag, rank: int, cuts: list[list[int]]) -> Iterator[None]:
    """Carries out `plan` in this process; `cuts` gets the sizes of DDP's buckets, a list for each step."""
    step, hook, shard_gradient = Engine.step, ShardReducer._hook, Engine._shard_gradient
    bucket, loss_sum, test_batch = engine.BUCKET_MB, Engine.loss_sum, evaluation._PIXELS

    def stepping(self: Engine, epoch: int, step_in_epoch: int, global_step: int, order: Tensor) -> None:
        cuts.append([])
        step(self, epoch, step_in_epoch, global_step, order)
        if plan.stop == global_step and plan.who == rank:
            stop.signal = signal.SIGTERM

    @functools.wraps(hook)  # DDP looks at its annotations
    def hooked(self: ShardReducer, state: object, bucket: dist.GradBucket) -> Any:
        cuts[-1].append(bucket.buffer().numel())
        return hook(self, state, bucket)

    def overflowing(self: Engine, inputs: StepInputs, shard: int, side: int) -> None:
        factor = 1e9 if (int(inputs.number) - 1, shard) in plan.overflow else 1.0
        self.loss_sum = lambda logits, labels: factor * loss_sum(self, logits, labels)  # type: ignore[method-assign]
        shard_gradient(self, inputs, shard, side)

    Engine.step, Engine._shard_gradient = stepping, overflowing  # type: ignore[method-assign]
    ShardReducer._hook = hooked  # type: ignore[method-assign]
    engine.BUCKET_MB = BUCKET_MB
    evaluation._PIXELS = TEST_BATCH * 32 * 32
    attempt_module.Agreement = lambda world, **_: Agreement(world, lag)  # type: ignore[assignment,misc]
    try:
        yield
    finally:
        attempt_module.Agreement = Agreement  # type: ignore[misc]
        Engine.step, Engine._shard_gradient = step, shard_gradient  # type: ignore[method-assign]
        ShardReducer._hook = hook  # type: ignore[method-assign]
        engine.BUCKET_MB = bucket
        evaluation._PIXELS = test_batch


def start(
    rank: int, world: int, root: str, sections: dict[str, Any], plan: Plan, lag: int
) -> tuple[int, list[list[int]]]:
    """One start of the run in `root`: this rank's exit status, and the sizes of its buckets in each step."""
    stop, cuts = StopFlag(), list[list[int]]()
    launch = Launch(rank, world, rank, None, None, Path(root) / "rendezvous" / "now.json")
    attempt = Attempt(Context(RunPaths(Path(root), "run"), tiny_spec(**sections), launch, stop))
    with patched(plan, lag, stop, rank, cuts):
        status = attempt.run()
    attempt.context.lock.release()
    del attempt
    gc.collect()  # the agreement's group goes with it
    return status, cuts


@dataclass(frozen=True)
class Outcome:
    """What must not depend on the number of ranks."""

    sums: dict[str, str | None]
    state: str
    best: str
    rows: list[dict[str, Any]]
    updates: int


def run(
    ranks: Ranks,
    root: Path,
    sections: dict[str, Any],
    worlds: list[int],
    stops: list[Plan],
    last: Plan | None = None,
    lag: int = 0,
) -> tuple[Outcome, list[list[list[int]]]]:
    """A run whose starts have `worlds` ranks; all but the last are stopped. Also rank 0's buckets in each start.

    With lag 1, as on GPUs, several ranks stop a step later, but not beyond the end of an epoch.
    """
    buckets = []
    (root / "rendezvous").mkdir(parents=True)
    for world, plan in zip(worlds, [*stops, last or Plan()], strict=True):
        answers = ranks.run(world, start, str(root), sections, plan, lag, group=False)
        status = 0 if plan.stop is None else 128 + signal.SIGTERM
        assert answers[0][0] == status, (root / "logs" / "run" / "train.log").read_text()
        buckets.append(answers[0][1])
    events = [e for e in read_jsonl(root / "logs" / "run" / "events.jsonl") if e["event"] in ("started", "resumed")]
    assert [e["world_size"] for e in events] == worlds
    found = newest_good(root / "checkpoints" / "run")
    assert found is not None
    steps = found.state.step // found.state.epoch  # of an epoch
    for event, world, plan in zip(events[1:], worlds, stops, strict=False):
        assert plan.stop is not None
        end = -(-(plan.stop + 1) // steps) * steps
        assert event["step"] == min(plan.stop + 1 + lag * (world > 1), end)
    best = read_checkpoint(root / "checkpoints" / "run" / "best.pt")
    rows = read_jsonl(root / "logs" / "run" / "metrics.jsonl")
    outcome = Outcome(
        found.state.digests(),
        tensorfile.digest({k: getattr(found.state, k) for k in STATE}),
        tensorfile.digest({k: getattr(best, k) for k in STATE}),
        [{k: row[k] for k in SAME} for row in rows],
        found.state.updates,
    )
    return outcome, buckets


def sections_of(shards: int, **train: Any) -> dict[str, Any]:
    """Two epochs of 7 steps, the last with a batch of 8 images."""
    return {
        "train": {"shards": shards, "epochs": 2, "batch_size": 20} | train,
        "data": {"train_size": 128, "test_size": 60},
        "lookahead": {"bn_batches": 2, "k": 3},
        "checkpoint": {"every_steps": 100},
    }


@pytest.fixture(scope="module")
def alone(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Outcome of the same run in one process that nobody disturbs, made once for each spec."""
    done: dict[str, Outcome] = {}

    def get(sections: dict[str, Any], plan: Plan | None = None) -> Outcome:
        key = json.dumps([sections, repr(plan)], sort_keys=True)
        if key not in done:
            done[key], _ = run(ranks, tmp_path_factory.mktemp("alone") / "root", sections, [1], [], plan)
        return done[key]

    return get


@pytest.mark.parametrize(
    ("shards", "worlds", "lag"),
    [(2, [2, 1, 2], 0), (3, [2, 3], 1), (4, [3, 4, 2], 1), (4, [1, 3], 0), (5, [2, 3, 4], 0), (5, [4, 3, 1], 1)],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, list) else f"{value}",
)
def test_moved_at_each_restart(
    ranks: Ranks, alone: Any, tmp_path: Path, shards: int, worlds: list[int], lag: int
) -> None:
    """Stopped within the first epoch, and again within the second; the rank that is told is another one each time."""
    sections = sections_of(shards)
    stops = [Plan(2, worlds[0] - 1), Plan(8, 0)][: len(worlds) - 1]
    outcome, buckets = run(ranks, tmp_path / "root", sections, worlds, stops, lag=lag)
    assert outcome == alone(sections)
    assert [row["step"] for row in outcome.rows] == [7, 14]
    for world, steps in zip(worlds, buckets, strict=True):
        if world > 1:
            assert len(steps[-1]) > 3, "there are too few buckets for this test to show anything"
            assert steps[0] != steps[1] == steps[-1], "DDP has not cut its buckets anew after the first step"


def test_gradient_accumulation(ranks: Ranks, alone: Any, tmp_path: Path) -> None:
    """Four shards on one rank are accumulation: four backward passes, one update. On four ranks they are none."""
    sections = sections_of(4)
    outcome, _ = run(ranks, tmp_path / "root", sections, [4], [])
    assert outcome == alone(sections)
    assert outcome.updates == 14
    assert alone(sections_of(2)).sums != outcome.sums, "the number of shards is part of the bits, unlike that of ranks"


def test_bf16_on_changing_numbers_of_ranks(ranks: Ranks, alone: Any, tmp_path: Path) -> None:
    sections = sections_of(5, amp="bf16")
    outcome, _ = run(ranks, tmp_path / "root", sections, [4, 3], [Plan(4, 2)])
    assert outcome == alone(sections)
    assert outcome.sums != alone(sections_of(5)).sums


def test_our_recipes_on_changing_numbers_of_ranks(ranks: Ranks, alone: Any, tmp_path: Path) -> None:
    sections = sections_of(5) | PLUS
    outcome, _ = run(ranks, tmp_path / "root", sections, [4, 3, 1], [Plan(2, 3), Plan(8, 0)])
    assert outcome == alone(sections)
    assert outcome.sums["averaged_weights"] not in (None, outcome.sums["fast_weights"])


def test_an_overflow_in_a_single_shard_is_skipped_by_all_ranks(ranks: Ranks, alone: Any, tmp_path: Path) -> None:
    """Under fp16 the gradients of one shard overflow, in four steps: first of a start, last, and in between.

    The rank of that shard has company that saw only finite gradients. All must skip, and halve the scale, together.
    """
    sections = sections_of(4, amp="fp16")
    overflow = ((0, 3), (2, 0), (3, 1), (9, 2))
    outcome, _ = run(
        ranks,
        tmp_path / "root",
        sections,
        [3, 4, 2],
        [Plan(2, 1, overflow), Plan(7, 3, overflow)],
        Plan(overflow=overflow),
    )
    assert outcome == alone(sections, Plan(overflow=overflow))
    undisturbed = alone(sections)
    assert outcome.updates == undisturbed.updates - len(overflow)
    assert outcome.sums != undisturbed.sums


def draw(seed: int) -> tuple[dict[str, Any], list[int], list[Plan]]:
    """A spec, numbers of ranks, and places to stop."""
    rng = random.Random(f"elastic {seed}")
    shards = rng.randint(2, 6)
    batch = rng.randint(2 * shards, 24)
    # The last batch is whole, or too small for the shards and left out, or short.
    size = batch * rng.randint(2, 4) + rng.choice([0, rng.randrange(1, shards), rng.randrange(shards, batch)])
    sections = {
        "train": {
            "shards": shards, "epochs": 2, "batch_size": batch, "seed": rng.randrange(99),
            "amp": rng.choice(["fp32", "fp32", "bf16", "fp16"]),
        },
        "data": {"train_size": size, "test_size": rng.randint(10, 60)},
        "lookahead": {"enabled": rng.random() < 0.75, "k": rng.randint(1, 5), "bn_batches": rng.randint(0, 3)},
        "schedule": {"per": rng.choice(["epoch", "step"])},
        "checkpoint": {"every_steps": rng.randint(1, 4)},
    }  # fmt: skip
    steps = 2 * (size // batch + (size % batch >= shards))
    stops = sorted(rng.sample(range(steps - 1), min(steps - 1, rng.randint(1, 3))))
    worlds = [rng.randint(1, min(4, shards))]
    while len(worlds) <= len(stops):
        worlds.append(rng.choice([world for world in range(1, min(4, shards) + 1) if world != worlds[-1]]))
    plans = [Plan(stop, rng.randrange(world)) for stop, world in zip(stops, worlds, strict=False)]
    return sections, worlds, plans


@pytest.mark.parametrize(("seed", "lag"), SEEDS.items())
def test_random_runs(ranks: Ranks, alone: Any, tmp_path: Path, seed: int, lag: int) -> None:
    sections, worlds, plans = draw(seed)
    outcome, _ = run(ranks, tmp_path / "root", sections, worlds, plans, lag=lag)
    assert outcome == alone(sections), (sections, worlds, plans)


def test_random_runs_are_of_many_kinds() -> None:
    drawn = [draw(seed) for seed in SEEDS]
    assert {sections["train"]["amp"] for sections, _, _ in drawn} == {"fp32", "bf16", "fp16"}
    assert any(sections["train"]["shards"] % world for sections, worlds, _ in drawn for world in worlds)
    assert any(len(set(worlds)) > 2 for _, worlds, _ in drawn)
    rests = [(s["data"]["train_size"] % s["train"]["batch_size"], s["train"]["shards"]) for s, _, _ in drawn]
    assert any(0 < rest < shards for rest, shards in rests)
    assert any(rest >= shards for rest, shards in rests)


@pytest.mark.parametrize("key", ["sync_batchnorm", "sync_batch_norm"])
def test_synchronised_batch_norm_cannot_be_asked_for(key: str) -> None:
    """Statistics over all ranks would depend on how many there are; see ShardBatchNorm."""
    for section in ("model", "train"):
        with pytest.raises(SpecError, match=rf"{section}\.{key}: unknown key; allowed in {section}: "):
            tiny_spec(**{section: {key: True}})


def normalised(rank: int, world: int) -> bool:
    """Whether each shard's images alone decide about its BatchNorm, for the shards of this rank."""
    spec = tiny_spec(train={"shards": 4, "batch_size": 32}, model={"dropout": 0})
    made = engine.Engine(spec, torch.device("cpu"), *_layout_and_data(rank, world), "fp32")
    seen: list[Tensor] = []
    norm = next(m for m in made.model.modules() if isinstance(m, torch.nn.BatchNorm2d))
    norm.register_forward_hook(lambda module, inputs, output: seen.append(output.detach().mean((0, 2, 3)).abs().max()))
    made.step(0, 0, 0, torch.arange(32))
    return len(seen) == len(made.layout.mine) and all(mean < 1e-4 for mean in seen)


def _layout_and_data(rank: int, world: int) -> tuple[Any, Any]:
    from cifar_hpc.data.datasets import Dataset
    from cifar_hpc.data.synthetic import make_synthetic
    from cifar_hpc.training.distributed.shards import ShardLayout

    return ShardLayout(4, world, rank), Dataset(*make_synthetic(64, 16))


def test_batch_norm_is_over_a_shard_however_many_ranks_there_are(ranks: Ranks) -> None:
    for world in (1, 3, 4):
        assert ranks.run(world, normalised, group=world > 1) == [True] * world

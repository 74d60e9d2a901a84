"""Logical shards: the layout, and sums that have the same bits for every number of real processes."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from helpers import CPU, Ranks, take_steps, tiny_engine, tiny_spec
from torch import Tensor

from benchmarks import reduction
from cifar_hpc.errors import RunFailedError
from cifar_hpc.tensorfile import digest
from cifar_hpc.training.distributed.shards import ShardLayout, ShardSum

SHARDS = 4
PAIRS = [(shards, world) for shards in range(1, 9) for world in range(1, shards + 1)]


@pytest.mark.parametrize(("shards", "world"), PAIRS)
def test_every_shard_has_one_rank(shards: int, world: int) -> None:
    layouts = [ShardLayout(shards, world, rank) for rank in range(world)]
    assert [shard for layout in layouts for shard in layout.mine] == list(range(shards))
    sizes = [len(layout.mine) for layout in layouts]
    assert max(sizes) - min(sizes) <= 1
    assert layouts[0].mine[0] == 0
    assert all(layouts[0].of_rank(layout.rank) == layout.mine for layout in layouts)


@pytest.mark.parametrize("shards", range(1, 9))
@pytest.mark.parametrize("size", [8, 9, 31, 128])
def test_bounds_cut_a_batch_into_shards(shards: int, size: int) -> None:
    layout = ShardLayout(shards, 1, 0)
    parts = [list(range(size))[layout.bounds(shard, size)] for shard in range(shards)]
    assert [row for part in parts for row in part] == list(range(size))
    lengths = [len(part) for part in parts]
    assert min(lengths) >= 1
    assert max(lengths) - min(lengths) <= 1


def test_more_ranks_than_shards_are_refused() -> None:
    with pytest.raises(RunFailedError, match=r"3 ranks .* 2 shards, .*at most 2 .*train\.shards=3"):
        ShardLayout(2, 3, 0)


def rows(size: int) -> Tensor:
    """A row a shard, so unlike in size that any other order of adding gives other bits."""
    values = torch.randn(SHARDS, size, generator=torch.Generator().manual_seed(3))
    return values * torch.tensor([1e4, 1.0, 1e-3, 1e4])[:, None]


def summed(rank: int, world: int, sizes: list[int]) -> list[list[float]]:
    layout = ShardLayout(SHARDS, world, rank)
    mine = slice(layout.mine.start, layout.mine.stop)
    sums = [
        ShardSum(list(rows(size)[mine].clone()), layout, torch.empty(ShardSum.room(size, layout))) for size in sizes
    ]
    for one in sums:  # all are under way at once
        one.add()
    return [one.result().tolist() for one in sums]


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_sums_are_sequential_sums_bit_for_bit(ranks: Ranks, world: int) -> None:
    sizes = [1, 2, 7, 1000, 4099]
    expected = []
    for size in sizes:
        total = rows(size)[0]
        for row in rows(size)[1:]:
            total = total + row
        assert size < 7 or not torch.equal(total, rows(size).flip(0).cumsum(0)[-1])  # the order does matter
        expected.append(total.tolist())
    assert ranks.run(world, summed, sizes) == [expected] * world


def trained(rank: int, world: int, sections: dict[str, Any]) -> tuple[str, str]:
    """Sums of weights and gradients after three steps, over DDP buckets before and after DDP re-cuts them."""
    with warnings.catch_warnings(action="error"):  # each rank would print it at each start
        engine = tiny_engine(tiny_spec(**sections), rank, world)
        take_steps(engine, 0, 3)
    gradients = {name: p.grad for name, p in engine.model.named_parameters()}
    return digest(dict(engine.model.named_parameters())), digest(gradients)


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"model": {"width_multiplier": 0.5}},  # several buckets
        {"train": {"amp": "bf16"}},
        {"train": {"batch_size": 30}},  # shards of 7 and 8 images
        {"lookahead": {"enabled": False}, "optimizer": {"nesterov": True}},
    ],
    ids=["plain", "wide", "bf16", "uneven", "nesterov"],
)
def test_training_has_the_same_bits_for_every_number_of_ranks(ranks: Ranks, sections: dict[str, Any]) -> None:
    """Also guards how kept gradients are laid out in DDP's buckets: channels_last, as their parameters are."""
    alone = ranks.run(1, trained, sections, group=False)[0]
    for world in (2, 3, 4):
        assert ranks.run(world, trained, sections) == [alone] * world, f"{world} ranks"


def benchmarked(rank: int, world: int) -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    return [part(rank, world, CPU, 2) for part in (reduction.communication, reduction.training)]


def test_the_benchmark_of_the_reduction_measures_both(ranks: Ranks) -> None:
    """It also compares the two sums over the full model's buckets."""
    communication, step = ranks.run(2, benchmarked)[0]
    assert communication["parameters"] == sum(communication["buckets"]) == 4_903_082
    assert len(communication["buckets"]) > 1
    for part in (communication, step):
        assert part["repetitions"] == 2
        assert all(len(part[key]) == 3 and min(part[key]) > 0 for key in ("fixed_order_ms", "all_reduce_ms", "ratio"))
    table = reduction.table([{"ranks": 2, "communication": communication, "training_step": step}])
    assert "training_step" in table

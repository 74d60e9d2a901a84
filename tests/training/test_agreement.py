"""Ranks stop after the same step, whoever was told first."""

from __future__ import annotations

import pytest
from helpers import Ranks

from cifar_hpc.errors import Interrupted, SpecError
from cifar_hpc.training.distributed.agreement import Agreement, Wish


def answers(rank: int, world: int, lag: int, who: int, when: int, wish: int, steps: int) -> list[int]:
    """What each step answers where rank `who` begins to wish at step `when`; a STOP ends the loop."""
    agreement = Agreement(world, lag)
    heard = []
    for step in range(steps):
        mine = Wish(wish) if rank == who and step >= when else Wish.GO_ON
        heard.append(int(agreement.after_step(mine)))
        if heard[-1] == Wish.STOP:
            break
    return heard


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize(("world", "who"), [(2, 0), (2, 1), (3, 2)])
def test_all_stop_after_the_same_step(ranks: Ranks, lag: int, world: int, who: int) -> None:
    expected = [0] * (4 + lag) + [int(Wish.STOP)]
    assert ranks.run(world, answers, lag, who, 4, int(Wish.STOP), 20) == [expected] * world


def test_a_save_goes_on(ranks: Ranks) -> None:
    assert ranks.run(2, answers, 1, 1, 3, int(Wish.SAVE), 6) == [[0, 0, 0, 0, 1, 1]] * 2


def largest(rank: int, world: int) -> list[int]:
    agreement = Agreement(world, 0)
    return [int(agreement.after_step(Wish(wishes[rank]))) for wishes in [(0, 1, 0), (1, 0, 2), (0, 0, 0)]]


def test_the_largest_wish_is_heeded(ranks: Ranks) -> None:
    assert ranks.run(3, largest) == [[1, 2, 0]] * 3


def under_way(rank: int, world: int) -> tuple[int, int, int]:
    agreement = Agreement(world, 1)
    step = agreement.after_step(Wish.STOP if rank == 1 else Wish.GO_ON)
    return int(step), int(agreement.now(Wish.GO_ON)), int(agreement.now(Wish.GO_ON))


def test_now_hears_wishes_that_are_still_under_way(ranks: Ranks) -> None:
    assert ranks.run(2, under_way) == [(0, 2, 0)] * 2


@pytest.mark.parametrize("lag", [0, 1])
def test_a_single_process_heeds_itself_at_once(lag: int) -> None:
    agreement = Agreement(1, lag)
    assert [agreement.after_step(w) for w in Wish] == list(Wish)
    assert agreement.now(Wish.STOP) is Wish.STOP


def told_by_rank_0(rank: int, world: int, error: type[Exception]) -> str:
    def work() -> None:
        raise error("no such luck")

    try:
        Agreement(world, 0).from_rank_0(work)
    except Exception as raised:
        return f"{type(raised).__name__} {raised} {getattr(raised, 'everywhere', False)}"
    return "nothing"


def test_what_rank_0_could_not_do_ends_every_rank(ranks: Ranks) -> None:
    assert ranks.run(2, told_by_rank_0, SpecError) == ["SpecError no such luck True"] * 2
    assert ranks.run(2, told_by_rank_0, Interrupted) == ["Interrupted no such luck False"] * 2
    assert ranks.run(2, told_by_rank_0, ValueError) == [
        "ValueError no such luck False",  # with the traceback, which only rank 0 has
        "RanksLostError rank 0 failed: ValueError: no such luck True",
    ]

"""Ranks stop after the same step, whoever was told first."""

from __future__ import annotations

import pytest
from helpers import Ranks

from cifar_hpc.errors import Interrupted, SpecError
from cifar_hpc.training.distributed.agreement import Agreement, Request


def agreed(rank: int, world: int, lag: int, who: int, when: int, request: int, steps: int) -> list[int]:
    """Result of each step, where rank `who` sends the request from step `when` on; a STOP ends the loop."""
    agreement = Agreement(world, lag)
    results = []
    for step in range(steps):
        mine = Request(request) if rank == who and step >= when else Request.GO_ON
        results.append(int(agreement.after_step(mine)))
        if results[-1] == Request.STOP:
            break
    return results


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize(("world", "who"), [(2, 0), (2, 1), (3, 2)])
def test_all_stop_after_the_same_step(ranks: Ranks, lag: int, world: int, who: int) -> None:
    expected = [0] * (4 + lag) + [int(Request.STOP)]
    assert ranks.run(world, agreed, lag, who, 4, int(Request.STOP), 20) == [expected] * world


def test_a_save_goes_on(ranks: Ranks) -> None:
    assert ranks.run(2, agreed, 1, 1, 3, int(Request.SAVE), 6) == [[0, 0, 0, 0, 2, 2]] * 2


def largest(rank: int, world: int) -> list[int]:
    agreement = Agreement(world, 0)
    return [int(agreement.after_step(Request(wishes[rank]))) for wishes in [(0, 2, 1), (1, 0, 3), (0, 0, 0)]]


def test_all_act_on_the_largest_request(ranks: Ranks) -> None:
    assert ranks.run(3, largest) == [[2, 3, 0]] * 3


def under_way(rank: int, world: int) -> tuple[int, int, int]:
    agreement = Agreement(world, 1)
    step = agreement.after_step(Request.STOP if rank == 1 else Request.GO_ON)
    return int(step), int(agreement.now(Request.GO_ON)), int(agreement.now(Request.GO_ON))


def test_now_includes_requests_that_are_still_under_way(ranks: Ranks) -> None:
    assert ranks.run(2, under_way) == [(0, 3, 0)] * 2


@pytest.mark.parametrize("lag", [0, 1])
def test_a_single_process_acts_on_its_request_at_once(lag: int) -> None:
    agreement = Agreement(1, lag)
    assert [agreement.after_step(request) for request in Request] == list(Request)
    assert agreement.now(Request.STOP) is Request.STOP


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


def turns(rank: int, world: int, error: type[Exception] | None) -> str:
    first: list[int] = []

    def work() -> int:
        if rank == 0 and error is not None:
            raise error("no such luck")
        first.append(rank)
        return 10 * rank

    try:
        return f"{Agreement(world, 0).rank_0_first(work)} {first}"
    except Exception as raised:
        return f"{type(raised).__name__} {raised} {first}"


def test_rank_0_first_gives_each_rank_its_own_result(ranks: Ranks) -> None:
    assert ranks.run(3, turns, None) == ["0 [0]", "10 [1]", "20 [2]"]


def test_rank_0_first_does_not_reach_the_others_after_an_error(ranks: Ranks) -> None:
    assert ranks.run(2, turns, SpecError) == ["SpecError no such luck []"] * 2
    assert ranks.run(2, turns, ValueError)[1] == "RanksLostError rank 0 failed: ValueError: no such luck []"

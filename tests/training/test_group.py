"""How processes find each other, on which device they compute, what they agree on, and that nothing is left of them."""

from __future__ import annotations

import gc
import json
import os
import socket
import time
from pathlib import Path
from typing import Any

import nursery
import pytest
import torch
import torch.distributed as dist
from helpers import CPU, Ranks, tiny_spec

from cifar_hpc.errors import Interrupted, RanksDifferError, RanksLostError, RunFailedError, SpecError
from cifar_hpc.runs.logs import START_MARK, read_jsonl
from cifar_hpc.runs.paths import RunPaths
from cifar_hpc.training import exit as exit_module
from cifar_hpc.training.attempt import Attempt
from cifar_hpc.training.context import Context
from cifar_hpc.training.distributed import group
from cifar_hpc.training.distributed.group import Agreement, Request, connect, disconnect, resolve_device
from cifar_hpc.training.distributed.group import meet as meet_others
from cifar_hpc.training.distributed.watchdog import RankBoard, Report
from cifar_hpc.training.process import Launch, StopFlag

FACTS = {"host": "node1", "gpu_id": None, "deterministic": True}


def gloo_threads() -> int:
    return sum("gloo" in path.read_text() for path in Path("/proc/self/task").glob("*/comm"))


def meet(rank: int, world: int, file: str) -> list[int]:
    launch = Launch(rank, world, rank, None, None, Path(file))
    store = meet_others(launch, StopFlag())
    connect(launch, CPU, store, RankBoard(store, rank, world), StopFlag(), bool, FACTS)
    found = [torch.zeros(1) for _ in range(world)]
    dist.all_gather(found, torch.tensor([float(rank)]))
    disconnect()
    return [int(t) for t in found]


def test_ranks_meet_through_a_file_that_is_gone_afterwards(ranks: Ranks, tmp_path: Path) -> None:
    file = tmp_path / "slurm" / "rendezvous" / "7-0.json"
    file.parent.mkdir(parents=True)
    # Left by an attempt that was killed: nobody listens there any more.
    file.write_text(json.dumps({"hosts": ["127.0.0.1"], "port": 1, "token": "old"}))
    assert ranks.run(3, meet, str(file), group=False) == [[0, 1, 2]] * 3
    assert list(file.parent.iterdir()) == []


def compared(rank: int, world: int, file: str, facts: list[dict[str, Any]]) -> str:
    launch = Launch(rank, world, rank, None, None, Path(file))
    store = meet_others(launch, StopFlag())
    try:
        connect(launch, CPU, store, RankBoard(store, rank, world), StopFlag(), bool, FACTS | facts[rank])
    except RanksDifferError as error:
        assert not dist.is_initialized()
        return str(error)
    disconnect()
    return "met"


@pytest.mark.parametrize(
    ("differing", "message"),
    [
        ([{}, {"torch": "2.11"}, {}], "torch: None on rank 0 (node1) and rank 2 (node1), 2.11 on rank 1 (node1)"),
        (
            [{"gpu_id": "GPU-1"}, {"gpu_id": "GPU-2"}, {"gpu_id": "GPU-1"}],
            "GPU-1 of node1 is the GPU of several ranks: rank 0 (node1) and rank 2 (node1).",
        ),
        ([{"gpu_id": "GPU-1", "host": f"node{n}"} for n in range(3)], "met"),
        ([{"processor": "A"}, {"processor": "B"}, {}], "met"),
    ],
)
def test_no_group_of_ranks_that_do_not_agree(
    ranks: Ranks, tmp_path: Path, differing: list[dict[str, Any]], message: str
) -> None:
    file = tmp_path / "slurm" / "rendezvous" / "7-0.json"
    file.parent.mkdir(parents=True)
    said = ranks.run(3, compared, str(file), differing, group=False)
    assert len(set(said)) == 1 and message in said[0]


def told_to_stop(rank: int, world: int, file: str, who: list[int]) -> str:
    launch, stop = Launch(rank, world, rank, None, None, Path(file)), StopFlag()
    if rank in who:
        stop.raise_flag()
    try:
        store = meet_others(launch, stop)
        connect(launch, CPU, store, RankBoard(store, rank, world), stop, bool, FACTS)
    except Interrupted:
        return "left"
    disconnect()
    return "met"


@pytest.mark.parametrize("who", [[0], [2], [0, 1, 2]])
def test_ranks_that_are_told_to_stop_before_all_have_met_leave_together(
    ranks: Ranks, tmp_path: Path, who: list[int]
) -> None:
    file = tmp_path / "slurm" / "rendezvous" / "7-0.json"
    file.parent.mkdir(parents=True)
    outcomes = ranks.run(3, told_to_stop, str(file), who, group=False)
    assert len(set(outcomes)) == 1, outcomes
    if len(who) == 3:
        assert outcomes == ["left"] * 3


def fails_before_it_meets(rank: int, world: int, file: str) -> str:
    launch, stop = Launch(rank, world, rank, None, None, Path(file)), StopFlag()
    store = meet_others(launch, stop)
    board = RankBoard(store, rank, world)
    if rank == 1:
        board.publish(Report(1, "node9", "error", "no usable GPU", "no usable GPU", 0, retryable=False))
        return "failed"
    try:
        connect(launch, CPU, store, board, stop, bool, FACTS)
    except RanksLostError as error:
        board.set(f"heard/{rank}")
        if rank == 0:
            board.wait("heard/2")  # the store goes with rank 0, whose last words wait for the others'
        return str(error)
    return "met"


def test_a_rank_that_fails_on_its_way_does_not_keep_the_others_waiting(ranks: Ranks, tmp_path: Path) -> None:
    file = tmp_path / "slurm" / "rendezvous" / "7-0.json"
    file.parent.mkdir(parents=True)
    heard = "rank 1 (node9) failed: no usable GPU"
    assert ranks.run(3, fails_before_it_meets, str(file), group=False) == [heard, "failed", heard]


WAITING = "still waiting for rank 2 of 3 to come up"


def arrives_late(rank: int, world: int, file: str) -> list[str]:
    """What this rank has to say while it waits. The last one comes when the first one has waited for it alone."""
    said = list[str]()
    launch, told = Launch(rank, world, rank, None, None, Path(file)), Path(file).with_name("told")
    while rank == world - 1 and not told.exists():
        time.sleep(0.02)
    store = meet_others(launch, StopFlag())

    def progress(text: str) -> None:
        said.extend([text] * bool(text))
        if rank == 0 and said.count(WAITING) == 2:
            told.touch()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(group, "WAITING_LINE_SECONDS", 0.1)
        connect(launch, CPU, store, RankBoard(store, rank, world), StopFlag(), progress, FACTS)
    disconnect()
    return said


def test_ranks_wait_for_one_that_comes_late_and_say_so(ranks: Ranks, tmp_path: Path) -> None:
    file = tmp_path / "slurm" / "rendezvous" / "7-0.json"
    file.parent.mkdir(parents=True)
    first, _, _ = ranks.run(3, arrives_late, str(file), group=False)
    assert first.count(WAITING) >= 2


def alone(rank: int, world: int, root: str, file: bool, present: int) -> str:
    """What the rank `present` finds out; the others never come."""
    if rank != present:
        return ""
    launch = Launch(rank, world, rank, None, None, Path(root) / "slurm" / "rendezvous" / "7-0.json" if file else None)
    paths = RunPaths(Path(root), "run")
    attempt = Attempt(Context(paths, tiny_spec(), launch, StopFlag()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(group, "RENDEZVOUS_SECONDS", 1)
        patch.setattr(exit_module, "RANK_0_SECONDS", 0.1)
        patch.setattr(exit_module, "LAST_WORDS_SECONDS", 0.1)
        patch.setenv("MASTER_ADDR", "127.0.0.1")
        patch.setenv("MASTER_PORT", str(nursery.free_port()))
        assert attempt.run() == 1
    (failed,) = read_jsonl(paths.events)
    assert failed["cause"] == "lost"
    assert paths.train_log.read_text().rstrip().endswith(failed["error"].removeprefix("RanksLostError: "))
    return str(failed["error"])


@pytest.mark.parametrize("way", ["file", "MASTER_ADDR"])
def test_ranks_that_never_come_are_named_and_nobody_guesses_why(ranks: Ranks, tmp_path: Path, way: str) -> None:
    for present, words in enumerate(("of the 3 ranks, ranks 1, 2 did not come up within 1 s", "rank ")):
        root = tmp_path / str(present)
        (root / "slurm").mkdir(parents=True)
        said = ranks.run(3, alone, str(root), way == "file", present, group=False)[present]
        assert said.startswith(f"RanksLostError: {words}"), said
        assert "memory" not in said and "killed" not in said


def misses_a_task(rank: int, world: int, file: str, gone: int) -> str:
    """What a rank finds out of one that ended before it came up."""
    if rank == gone:
        return ""
    launch = Launch(rank, world, rank, "slurm", "7", Path(file))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(group, "LOOK_TRIES", 2)
        with pytest.raises(RanksLostError) as lost:
            store = meet_others(launch, StopFlag())
            connect(launch, CPU, store, RankBoard(store, rank, world), StopFlag(), bool, FACTS)
        if rank == 0:
            time.sleep(1)  # its store ends with it
    return str(lost.value)


@pytest.mark.parametrize("gone", [0, 2])
def test_a_task_that_srun_says_has_ended_is_not_waited_for(ranks: Ranks, tmp_path: Path, gone: int) -> None:
    file = tmp_path / "slurm" / "rendezvous" / "7-1.json"
    file.parent.mkdir(parents=True)
    (tmp_path / "slurm" / "7_0_log.out").write_text(
        "srun: error: node1: task 1: Exited with exit code 9\n"
        f"{START_MARK}7, restart 1, on node[1-2] ==\n"
        f"srun: error: node2: tasks {gone},7-9: Exited with exit code 127\n"
    )
    log = tmp_path / "slurm" / f"7_{gone}_log.out"
    words = f"rank {gone} (node2) ended before it came up: Exited with exit code 127. HINT: see the end of {log}"
    assert sorted(ranks.run(3, misses_a_task, str(file), gone, group=False)) == ["", words, words]


def started_by_torchrun(rank: int, world: int, port: int, start: int) -> bool:
    """Whether this start sees a failure before it has one; `port` is of a store that serves all starts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MASTER_ADDR", "127.0.0.1")
        patch.setenv("MASTER_PORT", str(port))
        patch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
        store = meet_others(Launch(rank, world, rank), StopFlag())
        board = RankBoard(store, rank, world)
        found = connect(Launch(rank, world, rank), CPU, store, board, StopFlag(), bool, FACTS | {"start": start})
    assert [facts["start"] for facts in found] == [start] * world
    failed = board.failure() is not None
    dist.barrier()
    board.publish(Report(rank, "here", "error", "of this start", "", 0, True))
    dist.barrier()
    disconnect()
    return failed


def test_what_ranks_left_in_torchruns_store_is_not_seen_after_a_restart(ranks: Ranks) -> None:
    agent = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    for start in range(2):
        assert ranks.run(3, started_by_torchrun, agent.port, start, group=False) == [False] * 3


def limits(rank: int, world: int, file: str) -> set[float]:
    """Seconds of every time limit of PyTorch in a whole start."""
    launch = Launch(rank, world, rank, None, None, Path(file))
    store = meet_others(launch, StopFlag())
    assert store is not None
    connect(launch, CPU, store, RankBoard(store, rank, world), StopFlag(), bool, FACTS)
    agreement = Agreement(world, 0)
    assert agreement.now(Request.SAVE) is Request.SAVE
    groups = list(dist.distributed_c10d._world.pg_map)
    assert len(groups) == 2
    found = {store.timeout, store.clone().timeout, *(one._get_backend(CPU).options._timeout for one in groups)}
    del agreement, groups
    disconnect()
    return {timeout.total_seconds() for timeout in found}


def test_no_time_limit_of_pytorch_ends_a_job_that_is_suspended_for_days(ranks: Ranks, tmp_path: Path) -> None:
    file = tmp_path / "slurm" / "rendezvous" / "7-0.json"
    file.parent.mkdir(parents=True)
    assert ranks.run(2, limits, str(file), group=False) == [{30 * 86_400.0}] * 2


def test_only_our_watchdog_ends_a_process_that_uses_nccl(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("TORCH_NCCL_ASYNC_ERROR_HANDLING", "TORCH_NCCL_RETHROW_CUDA_ERRORS", "TORCH_NCCL_ENABLE_MONITORING")
    monkeypatch.setattr(os, "environ", {k: v for k, v in os.environ.items() if k not in names})
    seen: list[Any] = []
    monkeypatch.setattr(
        dist, "init_process_group", lambda backend, **given: seen.append([backend, *map(os.environ.get, names)])
    )
    monkeypatch.setattr(dist, "barrier", lambda: None)
    for own in ({}, {names[2]: "1"}):  # what the user has set stays
        os.environ.update(own)
        store = dist.HashStore()
        connect(Launch(), torch.device("cuda", 0), store, RankBoard(None, 0, 1), StopFlag(), bool, FACTS)
    assert seen == [["nccl", "0", "0", "0"], ["nccl", "0", "0", "1"]]


def whole_run(rank: int, world: int, root: str, sections: dict[str, Any]) -> tuple[int, int]:
    """A whole run as one of its processes: its exit status, and how many of gloo's threads outlive it."""
    gc.collect()  # what earlier tests have left in this process
    before = gloo_threads()
    paths = RunPaths(Path(root), "whole")
    launch = Launch(rank, world, rank, None, None, Path(root) / "slurm" / "rendezvous.json")
    attempt = Attempt(Context(paths, tiny_spec(**sections), launch, StopFlag()))
    gc.disable()  # so that none happens to run, as none may happen to run in a user's process
    try:
        return attempt.run(), gloo_threads() - before
    finally:
        gc.enable()


def test_a_finished_run_leaves_no_thread_that_could_abort_the_interpreter(ranks: Ranks, tmp_path: Path) -> None:
    (tmp_path / "slurm").mkdir()
    sections = {"train": {"epochs": 1}, "data": {"train_size": 64, "test_size": 10}}
    assert ranks.run(2, whole_run, str(tmp_path), sections, group=False) == [(0, 0)] * 2
    assert read_jsonl(tmp_path / "logs" / "whole" / "events.jsonl")[-1]["event"] == "finished"


def test_one_process_needs_no_group() -> None:
    assert meet_others(Launch(), StopFlag()) is None
    assert connect(Launch(), CPU, None, RankBoard(None, 0, 1), StopFlag(), bool, FACTS) == [FACTS]
    assert not dist.is_initialized()
    disconnect()


@pytest.mark.parametrize(
    ("device", "gpus"), [("cpu", 0), ("cpu", 4), ("auto", 0)], ids=["cpu", "cpu on a GPU node", "no GPU asked for"]
)
def test_the_cpu_where_it_is_meant(device: str, gpus: int) -> None:
    spec = tiny_spec(train={"device": device}, resources={"gpus_per_node": gpus})
    assert resolve_device(spec, 0) == torch.device("cpu")


@pytest.mark.parametrize(("device", "gpus"), [("auto", 1), ("cuda", 0), ("cuda:1", 2)])
def test_never_the_cpu_where_gpus_were_asked_for(monkeypatch: pytest.MonkeyPatch, device: str, gpus: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    spec = tiny_spec(train={"device": device}, resources={"gpus_per_node": gpus})
    with pytest.raises(
        RunFailedError, match=rf"train\.device: {device} .*CUDA is not usable on {socket.gethostname()}"
    ):
        resolve_device(spec, 0)


@pytest.mark.parametrize(
    ("device", "count", "local_rank", "index"),
    [("auto", 4, 3, 3), ("cuda", 1, 3, 0), ("auto", 2, 2, 0), ("auto", 2, 3, 1), ("cuda:2", 4, 0, 2)],
)
def test_gpus(monkeypatch: pytest.MonkeyPatch, device: str, count: int, local_rank: int, index: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    spec = tiny_spec(train={"device": device}, resources={"gpus_per_node": 4})
    assert resolve_device(spec, local_rank) == torch.device("cuda", index)
    assert chosen == [index]


def test_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    spec = tiny_spec(train={"device": "cuda:2"}, resources={"gpus_per_node": 2})
    with pytest.raises(RunFailedError, match=r"GPU 2 is not there .* visible: 2"):
        resolve_device(spec, 0)


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

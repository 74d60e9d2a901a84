"""Group of ranks: they find rank 0, form the process group, choose their devices, and agree after each step."""

import contextlib
import gc
import json
import os
import re
import socket
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from datetime import timedelta
from enum import IntEnum
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from cifar_hpc.config.spec import Spec
from cifar_hpc.errors import Interrupted, RanksLostError, RunFailedError, UserError
from cifar_hpc.files import write_atomic
from cifar_hpc.runs.logs import output_of_start
from cifar_hpc.training.distributed.watchdog import RankBoard, listens
from cifar_hpc.training.environment import require_agreement
from cifar_hpc.training.process import Launch, Patience, StopFlag

T = TypeVar("T")
Progress = Callable[[str], object]  # called again and again while other ranks are missing; the text is for the log

# The import of PyTorch over a busy network file system can take one node many minutes longer than another.
RENDEZVOUS_SECONDS = 30 * 60
# srun does not end a step for a task that has failed (batch_script.SRUN_PATIENCE), but says so in rank 0's output.
_TASK_ENDED = re.compile(r"srun: error: (\S+): tasks? ([0-9,-]+): (.+)")
LOOK_TRIES = 100  # of 50 ms, between two looks for that
WAITING_LINE_SECONDS = 60  # between two lines of the log that say for whom rank 0 waits
# After a stop request before all ranks have met, they wait for the others so much longer, to leave together.
STOP_ALONE_SECONDS = 30
# Of every group, store and collective. A job may be suspended for days, and PyTorch's clocks go on meanwhile; those of
# the watchdog do not, which alone finds hangs.
TIMEOUT = timedelta(days=30)
# Unless these are 0, PyTorch's watchdog of NCCL ends the process by SIGABRT while an error is being reported.
OUR_OWN_WATCH = ("TORCH_NCCL_ASYNC_ERROR_HANDLING", "TORCH_NCCL_RETHROW_CUDA_ERRORS", "TORCH_NCCL_ENABLE_MONITORING")

_BEGIN, _STOP = "begin", "stop"


def resolve_device(spec: Spec, local_rank: int) -> torch.device:
    """Return the device of this process: of the GPUs that it sees, that of its local rank.

    Raises:
        RunFailedError: the spec asks for GPUs, and CUDA is not usable. Training never falls back to the CPU.
    """
    wanted, gpus = spec.train.device, spec.resources.gpus
    if wanted == "cpu" or (wanted == "auto" and gpus == 0):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        built = "this PyTorch is built without CUDA"
        if torch.version.cuda is not None:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES", "unset")
            built = f"PyTorch {torch.__version__} finds no usable GPU (CUDA_VISIBLE_DEVICES={visible})"
        raise RunFailedError(
            f"train.device: {wanted} with resources.gpus_per_node: {gpus} asks for GPUs, but CUDA is not usable on "
            f"{socket.gethostname()}: {built}. HINT: check nvidia-smi there, or ask for --set train.device=cpu."
        )
    count = torch.cuda.device_count()
    index = local_rank % count  # Slurm may show each task only some of the node's GPUs
    if ":" in wanted:
        index = int(wanted.partition(":")[2])
    if index >= count:
        raise RunFailedError(
            f"train.device: GPU {index} is not there on {socket.gethostname()}; visible: {count}. "
            "HINT: train.device: auto takes those that are there."
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def meet(launch: Launch, stop: StopFlag) -> dist.Store | None:
    """Find the other processes. Return the TCPStore that all of them share; None for a single process.

    Raises:
        RanksLostError: rank 0 was not found within RENDEZVOUS_SECONDS.
        Interrupted: there was a stop request meanwhile.
    """
    if launch.world_size == 1:
        return None
    if (path := launch.rendezvous) is not None:
        if launch.rank == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            return _publish_store(launch, lambda address: write_atomic(path, address.encode()), [])
        return _find_store(
            launch, lambda: _content(path), f"{path}. HINT: is the folder shared between the nodes?", stop
        )
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun, which serves a store there
    # TCPStore's constructor would wait and ignore `stop`.
    if (launch.rank != 0 or agent) and not any(listens(host, port) for _ in _until_found(stop)):
        raise RanksLostError(f"rank 0 does not answer at {host}:{port} (MASTER_ADDR, MASTER_PORT).")
    served = launch.rank == 0 and not agent
    store = dist.TCPStore(host, port, launch.world_size, served, TIMEOUT, wait_for_workers=False)
    if not agent:
        return store
    # With --max-restarts, torchrun's store still holds all that the ranks of the last start have written.
    key = "cifar_hpc"
    if launch.rank == 0:
        return _publish_store(launch, lambda address: store.set(key, address), [host])
    return _find_store(launch, lambda: store.get(key) if store.check([key]) else None, f"{host}:{port}.", stop)


def connect(
    launch: Launch,
    device: torch.device,
    store: dist.Store | None,
    board: RankBoard,
    stop: StopFlag,
    progress: Progress,
    facts: dict[str, Any],
) -> list[dict[str, Any]]:
    """Start the default process group (NCCL or gloo), unless there is a single process. Return the facts of all ranks.

    Args:
        facts: of this rank. All ranks must agree on them; otherwise their collectives might not even fit.

    Raises:
        RanksDifferError: they do not agree.
        RanksLostError: another rank failed, or did not come up within RENDEZVOUS_SECONDS.
        Interrupted: there was a stop request before all ranks had come up.
    """
    if store is None:
        return [facts]
    # DDP needs it. If it were imported later, default arguments of its functions would hold the default group, and so
    # keep the group's threads alive beyond `disconnect`.
    import torch._dynamo  # noqa: F401

    store.set(f"facts/{launch.rank}", json.dumps(facts))
    _wait_for_all(store, launch, board, stop, progress)
    ranks = [json.loads(store.get(f"facts/{rank}")) for rank in range(launch.world_size)]
    store.set(f"read/{launch.rank}", "")
    if launch.rank == 0:
        store.wait([f"read/{rank}" for rank in range(launch.world_size)])  # if they differ, the store ends with rank 0
    require_agreement(ranks)
    backend, bound = ("nccl", device) if device.type == "cuda" else ("gloo", None)
    for name in OUR_OWN_WATCH:
        os.environ.setdefault(name, "0")
    if dist.get_debug_level() == dist.DebugLevel.DETAIL:  # with which PyTorch crashes as DDP is made (2.14)
        dist.set_debug_level(dist.DebugLevel.INFO)
    dist.init_process_group(
        backend,
        store=dist.PrefixStore("group", store),
        rank=launch.rank,
        world_size=launch.world_size,
        timeout=TIMEOUT,
        device_id=bound,
    )
    dist.barrier()
    if launch.rank == 0 and launch.rendezvous is not None:
        launch.rendezvous.unlink(missing_ok=True)
    return ranks


def _wait_for_all(store: dist.Store, launch: Launch, board: RankBoard, stop: StopFlag, progress: Progress) -> None:
    # Setting up a process group waits for missing ranks without end. A rank that failed or stopped on its way here
    # must not block the others' GPUs.
    store.set(f"here/{launch.rank}", "")
    missing = [f"here/{rank}" for rank in range(launch.world_size)]
    patience, next_line = Patience(RENDEZVOUS_SECONDS), time.monotonic() + WAITING_LINE_SECONDS
    tries = 0
    while missing := [key for key in missing if not store.check([key])]:
        tries += 1
        if tries % LOOK_TRIES == 0:
            _require_alive(launch, {int(key[5:]) for key in missing})
        names = f"rank{'s' * (len(missing) > 1)} {', '.join(key[5:] for key in missing)}"
        due = time.monotonic() > next_line
        next_line += WAITING_LINE_SECONDS * due
        progress(f"still waiting for {names} of {launch.world_size} to come up" if due else "")
        # The first rank to set the key decides for all: one that left alone would be missed during the set-up.
        if (stop.requested and board.set_once(_BEGIN, _STOP) == _STOP) or board.get(_BEGIN) == _STOP:
            _leave_together(store, launch)
        if (failure := board.failure()) is not None:
            raise RanksLostError(f"rank {failure.rank} ({failure.host}) failed: {failure.summary}")
        if patience.over():
            raise RanksLostError(
                f"of the {launch.world_size} ranks, {names} did not come up within {RENDEZVOUS_SECONDS} s. "
                "HINT: their own logs are beside this one's, in logs/<run>/slurm; that of rank 0 has srun's words."
            )
        time.sleep(0.05)
    if board.set_once(_BEGIN, _STOP if stop.requested else "go") == _STOP:
        _leave_together(store, launch)


def _require_alive(launch: Launch, ranks: set[int]) -> None:
    """Check that srun has not reported the end of a task that has not come up.

    Raises:
        RanksLostError: it has.
    """
    if launch.scheduler != "slurm" or launch.rendezvous is None:
        return
    folder = launch.rendezvous.parents[1]
    for host, tasks, end in _TASK_ENDED.findall("\n".join(output_of_start(folder / f"{launch.job_id}_0_log.out"))):
        spans = [span.partition("-") for span in tasks.split(",")]
        numbers = {number for first, _, last in spans for number in range(int(first), int(last or first) + 1)}
        if gone := sorted(ranks & numbers):
            log = folder / f"{launch.job_id}_{gone[0]}_log.out"
            raise RanksLostError(f"rank {gone[0]} ({host}) ended before it came up: {end}. HINT: see the end of {log}")


def _leave_together(store: dist.Store, launch: Launch) -> NoReturn:
    store.set(f"heard/{launch.rank}", "")
    # The store ends with rank 0. Under Slurm, with its short grace time, the requeue ends the others anyway.
    deadline = time.monotonic() + (STOP_ALONE_SECONDS if launch.rank == 0 and launch.scheduler != "slurm" else 0)
    heard = [f"heard/{rank}" for rank in range(launch.world_size)]
    while time.monotonic() < deadline and not store.check(heard):  # in this order: for the others it may be gone
        time.sleep(0.05)
    raise Interrupted


def _until_found(stop: StopFlag) -> Iterator[None]:
    """Yield every 50 ms for RENDEZVOUS_SECONDS, while a rank looks for rank 0.

    Raises:
        Interrupted: STOP_ALONE_SECONDS after a stop request, since rank 0 may have had it, too, and be gone already.
    """
    patience = Patience(RENDEZVOUS_SECONDS)
    while not patience.over():
        yield
        if stop.requested:
            patience.seconds = min(patience.seconds, STOP_ALONE_SECONDS)
        time.sleep(0.05)
    if stop.requested:
        raise Interrupted


def _publish_store(launch: Launch, publish: Callable[[str], None], hosts: list[str]) -> dist.TCPStore:
    # Rank 0 takes any free port and publishes it, so a port can collide neither with another job's nor with the one
    # that an earlier attempt of this job has left in TIME_WAIT.
    store = dist.TCPStore("localhost", 0, launch.world_size, True, TIMEOUT, wait_for_workers=False)
    token = uuid.uuid4().hex
    store.set(token, "")
    publish(json.dumps({"hosts": [*hosts, *_addresses()], "port": store.port, "token": token}))
    return store


def _find_store(launch: Launch, look: Callable[[], bytes | None], where: str, stop: StopFlag) -> dist.TCPStore:
    for tries, _ in enumerate(_until_found(stop), 1):
        if tries % LOOK_TRIES == 0:
            _require_alive(launch, {0})
        if (found := look()) is not None:
            address = json.loads(found)
            for host in address["hosts"]:
                if listens(host, address["port"]):
                    store = dist.TCPStore(
                        host, address["port"], launch.world_size, False, TIMEOUT, wait_for_workers=False
                    )
                    # It may be left over from a killed attempt, and another process may use its port now.
                    if store.check([address["token"]]):
                        return store
    raise RanksLostError(
        f"rank {launch.rank} on {socket.gethostname()} did not reach rank 0 within {RENDEZVOUS_SECONDS} s "
        f"through {where}"
    )


def _content(path: Path) -> bytes | None:
    list(path.parent.parent.iterdir())  # makes an NFS client look again instead of trusting its cache
    return path.read_bytes() if path.exists() else None


def _addresses() -> list[str]:
    """Return names and addresses of this host, the most general first."""
    host = socket.gethostname()
    found = [host]
    with contextlib.suppress(OSError):  # a host may fail to resolve its own name
        found += sorted({str(info[4][0]) for info in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)})
    return [*found, "127.0.0.1"]


def disconnect() -> None:
    """End the process groups of a finished run, with their threads.

    A gloo thread that still frees a tensor while the interpreter shuts down aborts the process (SIGABRT instead of exit
    status 0). The threads end with the last reference to their group, so the caller must hold none (engine, agreement).
    """
    if dist.is_initialized():
        gc.collect()  # DDP is part of reference cycles
        dist.destroy_process_group()


class Request(IntEnum):
    """A rank's request to all ranks after a step. All act on the largest one."""

    GO_ON = 0
    CHECK = 1  # the loss for NaN
    SAVE = 2  # a checkpoint, which includes the check
    STOP = 3


class Agreement:
    """One all-reduce(MAX) of an integer per step, over gloo on the CPU whatever the gradients travel on.

    With `lag` 1 a step posts its request and reads the result of the step before, which has arrived meanwhile: no
    waiting, and one more step until a request takes effect. With `lag` 0 (steps so long that the round trip does not
    matter) it waits for its own result. In both cases all ranks read the same result after the same step.
    """

    def __init__(self, world_size: int, lag: int) -> None:
        self.world_size, self.lag = world_size, lag
        self._group: Any = dist.new_group(backend="gloo", timeout=TIMEOUT) if world_size > 1 else None
        self._pending: deque[tuple[Tensor, dist.Work]] = deque()

    def from_rank_0(self, work: Callable[[], T]) -> T:
        """Run `work` on rank 0 and return its result on every rank.

        Raises:
            UserError, Interrupted: on every rank, if `work` raises one.
            RanksLostError: on the others, if it raises anything else, for which rank 0 has the traceback.
        """
        if self._group is None:
            return work()
        box: list[Any] = [None, None]
        error = None
        if dist.get_rank() == 0:
            try:
                box[0] = work()
            except Exception as raised:
                error = box[1] = raised
        if error is not None and not isinstance(error, (UserError, Interrupted)):  # which may not be possible to send
            box[1] = RanksLostError(f"rank 0 failed: {type(error).__name__}: {error}")
        dist.broadcast_object_list(box, 0, group=self._group)
        if isinstance(box[1], UserError):
            box[1].everywhere = True
        if box[1] is not None:
            raise error or box[1]
        return box[0]  # type: ignore[no-any-return]

    def rank_0_first(self, work: Callable[[], T]) -> T:
        """Run `work` on rank 0, then on the other ranks; each gets its own result.

        Raises:
            Exception: what `work` raises; what it raises on rank 0 ends every rank, as in `from_rank_0`.
        """
        own: list[T] = []
        self.from_rank_0(lambda: own.append(work()))
        return own[0] if own else work()

    def gather(self, value: T) -> list[T]:
        """Return the values of all ranks, in their order."""
        values = [value] * self.world_size
        if self._group is not None:
            dist.all_gather_object(values, value, group=self._group)
        return values

    def after_step(self, request: Request) -> Request:
        """Return the request that all ranks act on after this step."""
        return self.now(request, self.lag)

    def now(self, request: Request, under_way: int = 0) -> Request:
        """Return the largest request of all ranks, but for the last `under_way` ones. Waits for all ranks."""
        if self._group is None:
            return request
        value = torch.tensor([int(request)])
        work = dist.all_reduce(value, dist.ReduceOp.MAX, group=self._group, async_op=True)
        assert work is not None
        self._pending.append((value, work))
        agreed = Request.GO_ON
        while len(self._pending) > under_way:
            value, work = self._pending.popleft()
            work.wait()
            agreed = max(agreed, Request(int(value)))
        return agreed

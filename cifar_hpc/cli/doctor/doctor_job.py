"""python -m cifar_hpc.cli.doctor.doctor_job FOLDER: what one task of doctor's job sees on its compute node.

`FOLDER/plan.json` says what to look at; each task writes `FOLDER/task-<rank>.json`. What cannot be written there, since
the folder is not shared, is only in the job's output. Slurm alone starts it; submitit is not needed.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import sys
import threading
import time
import traceback
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from cifar_hpc.cli.doctor.doctor_files import LOCK, PLAN, is_locked, task_file
from cifar_hpc.cli.doctor.doctor_probe import facts
from cifar_hpc.errors import SchedulerError
from cifar_hpc.files import write_atomic
from cifar_hpc.slurm import client as slurm

if TYPE_CHECKING:
    from cifar_hpc.training.process import Launch


TOGETHER_SECONDS = 120.0  # for what the tasks do together: a network that is set up wrongly waits for ever
SIGNAL_SECONDS = 30.0
NUMBERS = 4_903_082  # of an all-reduce: the full model's gradients in float32


def main(folder: str) -> int:
    """Look, and write what was seen."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # which the batch script has had ignored
    task = TaskReport(Path(folder))
    try:
        task.look_alone()
        task.write()
        task.act_together()
    except Exception as error:
        traceback.print_exc()
        task.seen["error"] = f"{type(error).__name__}: {error}"
    task.write()
    sys.stdout.flush()
    os._exit(0)  # without the teardown of process groups, which may wait for tasks that are gone


class TaskReport:
    """One task, and what it has seen so far."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rank, self.world_size = _number("SLURM_PROCID"), max(1, _number("SLURM_NTASKS"))
        self.told = threading.Event()
        self.seen: dict[str, Any] = {
            "rank": self.rank,
            "node": os.environ.get("SLURMD_NODENAME") or socket.gethostname(),
            "job_id": slurm.own_job_id(),
        }

    def write(self) -> None:
        """Replace this task's file, with fsync and rename as a checkpoint's."""
        write_atomic(task_file(self.folder, self.rank), json.dumps(self.seen).encode())

    def look_alone(self) -> None:
        """What needs no other task."""
        plan = json.loads((self.folder / PLAN).read_text())
        self.seen["token"] = plan["token"]
        try:
            self.seen["lock_seen"] = is_locked(self.folder / LOCK)
        except OSError as error:
            self.seen |= {"lock_seen": False, "lock_error": error.strerror}
        self.seen["gpus"] = _number("SLURM_GPUS_ON_NODE")
        self.seen |= facts(plan["source"], Path(plan["data"]), plan["packages"])
        self.seen["scontrol"] = shutil.which("scontrol")
        try:
            self.seen["requeue"] = slurm.job_fields(str(self.seen["job_id"])).get("Requeue")
        except (SchedulerError, IndexError) as error:
            self.seen["scontrol_error"] = str(error)

    def act_together(self) -> None:
        """An all-reduce between all tasks, and a signal to all of them. What gets stuck is left after a while."""
        limit = threading.Timer(TOGETHER_SECONDS, self._give_up)
        limit.daemon = True
        limit.start()
        signal.signal(signal.SIGUSR2, self._handle)
        self.seen["stage"] = "meeting the other tasks"
        if "error" not in self.seen["torch"]:
            store = self._meet()
            if store is not None:
                self.seen["stage"] = "all-reduce"
                self.seen["all_reduce"] = self._all_reduce(store)
                self._wait_for_all(store)
        limit.cancel()
        self.seen["stage"] = "signal"
        self.seen["signal"] = self._signal()
        del self.seen["stage"]

    def _give_up(self) -> None:
        self.seen["error"] = f"{self.seen['stage']}: not within {TOGETHER_SECONDS:g} s"
        self.write()
        os._exit(1)

    def _meet(self) -> Any:
        """Find the others the way runs do; their store, or None for one task."""
        from cifar_hpc.training.distributed.rendezvous import meet
        from cifar_hpc.training.signals import StopFlag

        return meet(self._launch(), StopFlag())

    def _launch(self) -> Launch:
        from cifar_hpc.training.process import Launch

        return Launch(
            rank=self.rank,
            world_size=self.world_size,
            local_rank=_number("SLURM_LOCALID"),
            scheduler="slurm",
            job_id=str(self.seen["job_id"]),
            rendezvous=self.folder / "meeting" / "rendezvous.json",
        )

    def _all_reduce(self, store: Any) -> dict[str, Any]:
        """NCCL where every task has a GPU, else gloo."""
        import torch
        import torch.distributed as dist

        store.set(f"usable/{self.rank}", str(self.seen["torch"]["usable"]))
        usable = [store.get(f"usable/{rank}") == b"True" for rank in range(self.world_size)]
        backend, device = "gloo", torch.device("cpu")
        if all(usable):
            local = _number("SLURM_LOCALID")
            backend, device = "nccl", torch.device("cuda", local if local < torch.cuda.device_count() else 0)
            torch.cuda.set_device(device)
        dist.init_process_group(
            backend,
            store=dist.PrefixStore("doctor", store),
            rank=self.rank,
            world_size=self.world_size,
            device_id=device if backend == "nccl" else None,
        )
        seconds = []
        for _ in range(4):  # the first one sets up connections
            numbers = torch.full((NUMBERS,), float(self.rank + 1), device=device)
            begin = time.perf_counter()
            dist.all_reduce(numbers)
            total = numbers[-1].item()
            seconds.append(time.perf_counter() - begin)
        right = self.world_size * (self.world_size + 1) / 2
        return {"backend": backend, "seconds": min(seconds), "right": total == right}

    def _wait_for_all(self, store: Any) -> None:
        store.set(f"ready/{self.rank}", "")
        store.wait([f"ready/{rank}" for rank in range(self.world_size)])

    def _signal(self) -> bool | None:
        """Whether a signal to the job's steps reaches this very process, wrappers and containers between included."""
        if self.rank == 0:
            if shutil.which("scancel") is None:
                return None
            try:
                slurm.command(["scancel", "--signal=USR2", str(self.seen["job_id"])])
            except SchedulerError as error:
                print(error)
                return None
        return self.told.wait(SIGNAL_SECONDS)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.told.set()


def _number(variable: str) -> int:
    value = os.environ.get(variable, "")
    return int(value) if value.isdigit() else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))

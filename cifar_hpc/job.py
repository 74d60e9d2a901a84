"""One start of a run on the compute side: find its state, train, and do what the outcome asks for."""

from __future__ import annotations

import os
import platform
import socket
import sys
import time
import traceback
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from cifar_hpc import __version__, slurm
from cifar_hpc.agreement import Agreement, Wish
from cifar_hpc.checkpoint import history, read
from cifar_hpc.data import Dataset, Interrupted, load_dataset
from cifar_hpc.distributed import Launch, connect, disconnect, resolve_device
from cifar_hpc.engine import Engine, configure_torch, describe_environment, resolve_amp
from cifar_hpc.errors import SchedulerError, UserError
from cifar_hpc.paths import RunPaths
from cifar_hpc.preemption import Decision, StopFlag, decide
from cifar_hpc.runlock import RunLock
from cifar_hpc.runlog import (
    TrainLog,
    append_event,
    append_line,
    count_requeues,
    count_starts,
    read_jsonl,
    restore_metrics,
)
from cifar_hpc.shards import ShardLayout
from cifar_hpc.spec import Spec
from cifar_hpc.spec_io import check_resumable, from_plain
from cifar_hpc.store import CheckpointStore, newest_good
from cifar_hpc.trainer import Surroundings, Trainer

T = TypeVar("T")

# After a requeue the last attempt of this job may still be dying on its node.
LOCK_PATIENCE_SECONDS = {"slurm": 120.0, "local": 20.0, None: 3.0}
# submitit's local controller starts the tasks again when one exits with this (submitit.local.local).
LOCAL_REQUEUE_STATUS = 144
HOLD_SECONDS = 900


class Job:
    """One start of one run, on one rank."""

    def __init__(self, paths: RunPaths, spec: Spec, launch: Launch, stop: StopFlag) -> None:
        self.paths, self.spec, self.launch, self.stop = paths, spec, launch, stop
        self.first = launch.rank == 0
        self.log = TrainLog(paths.train_log, enabled=self.first)
        self.lock = RunLock(paths.lock)
        self.restart = 0
        self.trainer: Trainer | None = None

    def run(self) -> int:
        """Train; returns the exit status of a run that ended. A run that was stopped ends the process itself."""
        try:
            finished = self._train()
        except Interrupted:
            finished = False
        except UserError as error:
            return self._failed(error, str(error), again=False)
        except Exception as error:
            return self._failed(error, traceback.format_exc(), again=True)
        if not finished:
            return self._stopped()
        disconnect()
        self.lock.release()
        return 0

    def _emit(self, event: str, **details: Any) -> None:
        if self.first:
            append_event(
                self.paths.events,
                event,
                job_id=self.launch.job_id,
                restart=self.restart,
                world_size=self.launch.world_size,
                **details,
            )

    def _from_rank_0(self, work: Callable[[], T]) -> T:
        """What `work` returns on rank 0, on every rank; a user's error there is raised on every rank."""
        box: list[Any] = [None, None]
        if self.first:
            try:
                box[0] = work()
            except UserError as error:
                box[1] = error
        if self.launch.world_size > 1:
            dist.broadcast_object_list(box, 0)
        if box[1] is not None:
            raise box[1]
        return box[0]  # type: ignore[no-any-return]

    # ---------------------------------------------------------------- the way up

    def _train(self) -> bool:
        device = resolve_device(self.spec, self.launch.local_rank)
        configure_torch(self.spec, device)
        connect(self.launch, device)
        self.restart = self._from_rank_0(self._open)
        layout = ShardLayout(self.spec.train.shards or self.launch.world_size, self.launch.world_size, self.launch.rank)
        agreement = Agreement(self.launch.world_size, lag=1 if device.type == "cuda" else 0)
        chosen = self._from_rank_0(self._choose_checkpoint)
        data = self._load_data(agreement).to(device)
        engine = Engine(self.spec, device, layout, data, resolve_amp(self.spec, device))
        environment = describe_environment(self.spec, device)
        state = read(chosen) if chosen is not None else None
        if state is not None:
            check_resumable(from_plain(state["spec"]), self.spec, self.paths.name)
        around = Surroundings(
            self.log,
            self._emit,
            self.paths.metrics,
            self._open_store() if self.first else None,
            agreement,
            self.stop,
            self.restart,
            self.launch.job_id,
            environment,
        )
        trainer = self.trainer = Trainer(engine, around)
        if state is not None:
            trainer.resume(state)
        self._announce(chosen, state, environment)
        if not trainer.train():
            return False
        self._finish(trainer)
        return True

    def _open(self) -> int:
        owner = {
            "job_id": self.launch.job_id,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "scheduler": self.launch.scheduler,
        }
        self.paths.create()
        self.lock.acquire(owner, LOCK_PATIENCE_SECONDS[self.launch.scheduler])
        return count_starts(read_jsonl(self.paths.events))

    def _choose_checkpoint(self) -> Path | None:
        found = newest_good(self.paths.checkpoints)
        if found is None:
            return None
        for path, reason in found.bad:
            aside = path.with_name(path.name + ".damaged")
            path.replace(aside)  # out of the way of retention and of the next start
            self._emit("fallback", file=path.name, moved_to=aside.name, reason=reason)
            self.log.line(
                f"WARNING checkpoint {path.name}: {reason}; kept as {aside.name}, going back to {found.path.name}"
            )
        return found.path

    def _load_data(self, agreement: Agreement) -> Dataset:
        def progress(text: str) -> bool:
            if text:
                self.log.line(text)
            return self.stop.requested

        def load() -> Dataset | None:
            try:
                return load_dataset(self.spec.data, self.paths.root, progress)
            except Interrupted:
                return None

        # Rank 0 goes first, so that a folder is decoded once and the others find the cache.
        mine: list[Dataset | None] = []
        self._from_rank_0(lambda: mine.append(load()))
        if agreement.now(Wish.STOP if self.stop.requested else Wish.GO_ON) is Wish.STOP:
            raise Interrupted
        data = mine[0] if mine else load_dataset(self.spec.data, self.paths.root)
        assert data is not None  # None only where rank 0 was told to stop, and then all were
        return data

    def _open_store(self) -> CheckpointStore:
        def on_written(name: str, entry: dict[str, Any]) -> None:
            self._emit("checkpoint", file=name, **{k: entry[k] for k in ("step", "epoch", "step_in_epoch", "bytes")})

        def on_failed(name: str, reason: str) -> None:
            self._emit("checkpoint_failed", file=name, reason=reason)
            self.log.line(
                f"WARNING checkpoint {name} could not be written: {reason}; training goes on, and the older "
                "checkpoints are kept"
            )

        return CheckpointStore(self.paths.checkpoints, self.spec.checkpoint.keep, on_written, on_failed)

    def _announce(self, chosen: Path | None, state: dict[str, Any] | None, environment: dict[str, Any]) -> None:
        if not self.first:
            return
        cut = restore_metrics(self.paths.metrics, history(state) if state else [])
        step = state["step"] if state else 0
        where = (
            f"resumed from {chosen.name}: step {step}, epoch {state['epoch'] + 1}, "
            f"step {state['step_in_epoch']} of the epoch"
            if chosen and state
            else "started from step 0"
        )
        launch = self.launch
        self.log.banner(
            [
                f"run {self.paths.name}  |  {where}",
                f"host {socket.gethostname()}  |  job {launch.job_id or '-'} ({launch.scheduler or 'no scheduler'})  |  "
                f"restart {self.restart}  |  world size {launch.world_size}  |  shards {self.spec.train.shards}",
                f"{environment['device']}  |  {environment['amp']}  |  cifar_hpc {__version__}, torch {torch.__version__}, "
                f"python {platform.python_version()}",
            ]
        )
        if cut:
            self.log.line(f"metrics.jsonl: {cut} row(s) beyond the checkpoint cut off; they are computed again")
        changed = (
            {k: [state["environment"].get(k), v] for k, v in environment.items() if state["environment"].get(k) != v}
            if state
            else {}
        )
        if changed:
            self.log.line(
                "WARNING this is not the environment of the checkpoint, so the bits may differ from here: "
                + "; ".join(f"{k}: {old} -> {new}" for k, (old, new) in changed.items())
            )
        self._emit(
            "resumed" if state else "started",
            step=step,
            epoch=state["epoch"] if state else 0,
            step_in_epoch=state["step_in_epoch"] if state else 0,
            file=chosen.name if chosen else None,
            metrics_cut=cut,
            environment=environment,
            environment_changed=changed,
            shards=self.spec.train.shards,
        )

    # ---------------------------------------------------------------- the ways out

    def _finish(self, trainer: Trainer) -> None:
        position = trainer.position
        last = position.history[-1]
        if self.first:
            self.log.line(
                f"FINISHED {position.epoch} epochs, {position.step} steps: test accuracy {last['test_accuracy']:.2f}% "
                f"(best {position.best['test_accuracy']:.2f}% at epoch {position.best['epoch']})"
            )
        self._emit(
            "finished",
            step=position.step,
            epoch=position.epoch,
            test_accuracy=last["test_accuracy"],
            best=position.best,
        )

    def _stopped(self) -> int:
        position = self.trainer.position if self.trainer is not None else None
        name = self.stop.signal.name if self.stop.signal else "another rank's signal"
        self._emit("signal", signal=name, **({"step": position.step, "epoch": position.epoch} if position else {}))
        at = f"step {position.step} is on disk" if position else "nothing had been computed yet"
        self.log.line(f"STOPPED by {name}: {at}")
        if self.launch.scheduler == "slurm":
            return self._leave_slurm()
        if self.launch.scheduler == "local" and name != "SIGTERM":
            self._emit("requeued", reason="preemption")
            self.log.line("requeued: the local executor starts the run again")
            return LOCAL_REQUEUE_STATUS
        self.log.line("not requeued; submit the same again to go on from here")
        self._emit("left", reason="stopped", explanation=f"{name} outside Slurm")
        return 128 + (self.stop.signal or 15)

    def _leave_slurm(self) -> int:
        if not self.first:
            return 0  # any other status could make srun kill rank 0 before it has requeued
        decision = self._decide()
        if decision.action == "requeue":
            # Before the call: right after it Slurm kills this process.
            self._emit("requeued", reason=decision.reason)
            self.log.line(decision.explanation)
            try:
                slurm.requeue(self.launch.job_id or "")
                return 0
            except SchedulerError as error:
                self._emit("requeue_failed", reason=str(error))
                decision = Decision("hold", decision.reason, f"{error}; waiting for Slurm to end the job")
        self.log.line(decision.explanation)
        self._emit(
            "left" if decision.action == "leave" else "holding",
            reason=decision.reason,
            explanation=decision.explanation,
        )
        if decision.action == "hold":
            time.sleep(HOLD_SECONDS)
        return 1

    def _decide(self) -> Decision:
        fields: dict[str, str] | None = None
        for attempt in range(3):
            try:
                fields = slurm.job_fields(self.launch.job_id or "")
                break
            except SchedulerError as error:
                self.log.line(f"WARNING {error}")
                time.sleep(attempt)
        used = count_requeues(read_jsonl(self.paths.events)).get("timeout", 0)
        return decide(
            self.stop.signal,
            fields,
            now=datetime.now(),
            own_restarts=int(os.environ.get("SLURM_RESTART_COUNT") or 0),
            warning_seconds=self.spec.resources.warning_seconds,
            timeouts_left=self.spec.timeouts.max - used,
            may_requeue=self.spec.resources.requeue,
        )

    def _failed(self, error: Exception, text: str, again: bool) -> int:
        """Say why; requeue if trying again may help, and only while each try gets further than the last."""
        rank = self.launch.rank
        append_line(self.paths.train_log, f"FAILED on rank {rank} ({socket.gethostname()}): {text.rstrip()}")
        print(f"error: {text.rstrip()}", file=sys.stderr, flush=True)
        if not self.first:
            time.sleep(5)  # rank 0 hears of it through its broken connection, and may want to requeue
            return 1
        if self.trainer is not None and self.trainer.around.store is not None:
            self.trainer.around.store.wait()
        step = self.trainer.position.step if self.trainer is not None else 0
        earlier = [e for e in read_jsonl(self.paths.events) if e.get("event") == "failed"]
        progress = not earlier or step > int(earlier[-1].get("step") or 0)
        self._emit("failed", step=step, error=f"{type(error).__name__}: {error}".splitlines()[0][:500])
        used = count_requeues(read_jsonl(self.paths.events)).get("failure", 0)
        if not (
            again
            and progress
            and self.launch.scheduler == "slurm"
            and self.spec.resources.requeue
            and used < self.spec.failures.max
        ):
            return error.exit_code if isinstance(error, UserError) else 1
        try:
            if slurm.job_fields(self.launch.job_id or "").get("JobState") == "RUNNING":
                self._emit("requeued", reason="failure")
                self.log.line(f"requeueing after failure {used + 1} of at most {self.spec.failures.max}")
                slurm.requeue(self.launch.job_id or "")
        except SchedulerError as refusal:
            self.log.line(f"WARNING not requeued: {refusal}")
        return 1

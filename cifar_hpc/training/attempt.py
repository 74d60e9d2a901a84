"""One start of a run on the compute side: find its state, train, and do what the outcome asks for."""

from __future__ import annotations

import os
import platform
import shlex
import socket
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from cifar_hpc import __version__
from cifar_hpc.config.io import check_resumable, from_plain
from cifar_hpc.data.datasets import Dataset, load_dataset
from cifar_hpc.errors import Interrupted, RunBusyError, RunFailedError
from cifar_hpc.runs.events import count_starts
from cifar_hpc.runs.lock import RunLock
from cifar_hpc.runs.logs import read_jsonl
from cifar_hpc.runs.metrics import restore_metrics
from cifar_hpc.tensorfile import digest
from cifar_hpc.training import exit as outcome
from cifar_hpc.training.checkpoints.format import history
from cifar_hpc.training.checkpoints.recovery import Choice, choose
from cifar_hpc.training.checkpoints.store import CheckpointStore
from cifar_hpc.training.context import Context
from cifar_hpc.training.distributed.agreement import Agreement, Wish
from cifar_hpc.training.distributed.rank_board import Board
from cifar_hpc.training.distributed.rendezvous import clear_rendezvous, connect, disconnect, meet, resolve_device
from cifar_hpc.training.distributed.shards import ShardLayout
from cifar_hpc.training.distributed.watchdog import Watchdog
from cifar_hpc.training.engine import Engine
from cifar_hpc.training.environment import configure_torch, describe_environment, describe_machine, resolve_amp
from cifar_hpc.training.failure import LastWords
from cifar_hpc.training.trainer import Position, Trainer

# After a requeue the last attempt of this job may still be dying on its node.
LOCK_PATIENCE_SECONDS = {"slurm": 300.0, "local": 20.0, None: 3.0}


class Job:
    """One start of one run, on one rank."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.lock = RunLock(context.paths.lock)
        self.last_words = LastWords(context, lambda: self.trainer.position if self.trainer else None)
        self.watchdog: Watchdog | None = None
        self.trainer: Trainer | None = None
        self.finished = False  # otherwise the process has to end at once: its peers may be gone
        self._state: dict[str, Any] | None = None

    def run(self) -> int:
        """Train; returns the exit status that this process should end with."""
        context = self.context
        stored = True
        try:
            finished = self._train()
            stored = self.trainer is None or self.trainer.stored
        except Interrupted:
            finished = False
        except Exception as error:
            return self._failed(error)
        position = self._position()
        if self.watchdog is not None:
            self.watchdog.stop()
        if not finished:
            return outcome.stopped(context, position, stored)
        outcome.finished(context, position)
        self.finished = True
        self.trainer = None  # lets go of the process groups, so that `disconnect` can end their threads
        disconnect()
        self.lock.release()
        return 0

    def _failed(self, error: Exception) -> int:
        self._position()
        status = self.last_words.of(error)
        if self.watchdog is not None:
            self.watchdog.stop()
        return status

    def _position(self) -> Position | None:
        """Where the run stands, once nothing is being written any more; None before it has been found."""
        if self.trainer is None:
            return None
        if self.trainer.store is not None:
            self.trainer.store.wait()
        return self.trainer.position

    def _meet(self) -> tuple[dist.Store | None, Board]:
        """Find the other ranks, and begin to watch them."""
        context, launch = self.context, self.context.launch
        store = meet(launch, context.stop)
        board = self.last_words.board = Board(store, launch.rank, launch.world_size)
        if launch.rank == 0:
            board.tell("token", self.last_words.token)
        elif store is not None:
            self.last_words.token = board.wait_for("token")
        self.last_words.met = True
        limit = 60 * context.spec.train.watchdog_minutes
        self.watchdog = Watchdog(board, context.heart, limit, self.last_words.from_watchdog).start()
        return store, board

    def _train(self) -> bool:
        context = self.context
        spec, launch, lap = context.spec, context.launch, context.startup.lap
        lap("import")
        store, board = self._meet()
        device = resolve_device(spec, launch.local_rank)
        configure_torch(spec, device)
        context.heart.beat("meeting the other ranks")
        connect(launch, device, store, board, context.stop)
        lap("group")
        context.heart.beat("looking for a checkpoint")
        agreement = Agreement(launch.world_size, lag=1 if device.type == "cuda" else 0)
        context.restart = agreement.from_rank_0(self._open)
        lap("lock")
        layout = ShardLayout(spec.train.shards or launch.world_size, launch.world_size, launch.rank)
        chosen = agreement.from_rank_0(self._choose_checkpoint)
        lap("checkpoint")
        data = self._load_data(agreement)
        environment = describe_environment(spec, device) | {"data": digest([data.train_images, data.train_labels])}
        lap("data")
        state = self._state or (chosen.read() if chosen is not None else None)
        if state is not None:
            self._check_fits(state, environment)
        lap("checkpoint")
        # A rank that has failed so far is noticed here, where gloo tells of it; NCCL would wait for it.
        agreement.now(Wish.GO_ON)
        context.heart.beat("setting up the model")
        engine = Engine(spec, device, layout, data.to(device), resolve_amp(spec, device))
        writer = self._open_store() if context.first else None
        trainer = self.trainer = Trainer(engine, context, agreement, writer, environment)
        if state is not None:
            trainer.resume(state)
        self._state = None
        lap("model")
        context.heart.beat("the first step", trainer.position.step)
        self._announce(chosen.path if chosen else None, state, environment)
        agreement.now(Wish.GO_ON)
        return trainer.train()

    def _check_fits(self, state: dict[str, Any], environment: dict[str, Any]) -> None:
        """The checkpoint is of this spec and of these images.

        Raises:
            UserError: names what differs.
        """
        spec = self.context.spec
        check_resumable(from_plain(state["spec"]), spec, self.context.paths.name)
        if state["environment"]["data"] != environment["data"]:
            raise RunFailedError(
                f"data.root: the training images in {self.context.paths.root / spec.data.root} are not those that run "
                f"{self.context.paths.name} was started with. HINT: give the run on other images another --name."
            )

    def _open(self) -> int:
        owner = {
            "job_id": self.context.launch.job_id,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "scheduler": self.context.launch.scheduler,
        }
        self.context.paths.create()
        self._take_lock(owner, LOCK_PATIENCE_SECONDS[self.context.launch.scheduler])
        clear_rendezvous(self.context.paths.slurm / "rendezvous")
        return count_starts(read_jsonl(self.context.paths.events))

    def _take_lock(self, owner: dict[str, Any], patience_seconds: float) -> None:
        deadline = time.monotonic() + patience_seconds
        while True:
            try:
                return self.lock.acquire(owner, 1.0)
            except RunBusyError:
                if time.monotonic() > deadline:
                    raise
            if self.context.stop.requested:
                raise Interrupted
            self.context.heart.beat("waiting for the run's lock")

    def _choose_checkpoint(self) -> Choice | None:
        chosen = choose(self.context)
        if chosen is None:
            return None
        choice, self._state = chosen  # so that rank 0 does not read it twice
        return choice

    def _load_data(self, agreement: Agreement) -> Dataset:
        def progress(text: str) -> bool:
            self.context.heart.beat(text or "loading the images")
            if text:
                self.context.log.line(text)
            return self.context.stop.requested

        def load() -> Dataset | None:
            try:
                return load_dataset(self.context.spec.data, self.context.paths.root, progress)
            except Interrupted:
                return None

        # Rank 0 goes first, so that a folder is decoded once and the others find the cache.
        mine: list[Dataset | None] = []
        agreement.from_rank_0(lambda: mine.append(load()))
        if agreement.now(Wish.STOP if self.context.stop.requested else Wish.GO_ON) is Wish.STOP:
            raise Interrupted
        data = mine[0] if mine else load_dataset(self.context.spec.data, self.context.paths.root)
        assert data is not None  # None only where rank 0 was told to stop, and then all were
        return data

    def _open_store(self) -> CheckpointStore:
        def on_written(name: str, entry: dict[str, Any]) -> None:
            self.context.emit(
                "checkpoint", file=name, **{k: entry[k] for k in ("step", "epoch", "step_in_epoch", "bytes")}
            )

        def on_failed(name: str, reason: str) -> None:
            self.context.emit("checkpoint_failed", file=name, reason=reason)
            self.context.log.line(
                f"WARNING checkpoint {name} could not be written: {reason}; training goes on, and the older "
                "checkpoints are kept"
            )

        def on_note(text: str) -> None:
            self.context.log.line(f"WARNING {text}")

        directory, keep = self.context.paths.checkpoints, self.context.spec.checkpoint.keep
        return CheckpointStore(directory, keep, on_written, on_failed, on_note)

    def _announce(self, chosen: Path | None, state: dict[str, Any] | None, environment: dict[str, Any]) -> None:
        if not self.context.first:
            return
        cut = restore_metrics(self.context.paths.metrics, history(state) if state else [])
        step = state["step"] if state else 0
        where = (
            f"resumed from {chosen.name}: step {step}, epoch {state['epoch'] + 1}, "
            f"step {state['step_in_epoch']} of the epoch"
            if chosen and state
            else "started from step 0"
        )
        launch = self.context.launch
        self.context.log.banner(
            [
                f"run {self.context.paths.name}  |  {where}",
                f"host {socket.gethostname()}  |  job {launch.job_id or '-'} ({launch.scheduler or 'no scheduler'})"
                f"  |  restart {self.context.restart}  |  world size {launch.world_size}  |  "
                f"shards {self.context.spec.train.shards}",
                f"{environment['device']}  |  {environment['amp']}  |  cifar_hpc {__version__}, "
                f"torch {torch.__version__}, python {platform.python_version()}",
            ]
        )
        if cut:
            self.context.log.line(f"metrics.jsonl: {cut} row(s) beyond the checkpoint cut off; they are computed again")
        changed = (
            {k: [state["environment"].get(k), v] for k, v in environment.items() if state["environment"].get(k) != v}
            if state
            else {}
        )
        if changed:
            self.context.log.line(
                "WARNING this is not the environment of the checkpoint, so the bits may differ from here: "
                + "; ".join(f"{k}: {old} -> {new}" for k, (old, new) in changed.items())
            )
        self.context.emit(
            "resumed" if state else "started",
            step=step,
            epoch=state["epoch"] if state else 0,
            step_in_epoch=state["step_in_epoch"] if state else 0,
            file=chosen.name if chosen else None,
            metrics_cut=cut,
            environment=environment,
            environment_changed=changed,
            shards=self.context.spec.train.shards,
            machine=describe_machine(),
            command=None if launch.scheduler else shlex.join(sys.argv),
            startup=self.context.startup.plain(),
        )
        self.context.log.line(f"ready after {self.context.startup}")
        tracking = self.context.spec.tracking
        if tracking.tensorboard or tracking.wandb:
            hint = f"python -m cifar_hpc track {self.context.paths.name} --tensorboard DIR, or --wandb offline"
            self.context.log.line(f"tracking.*: the run itself starts no tracker any more. HINT: {hint}")

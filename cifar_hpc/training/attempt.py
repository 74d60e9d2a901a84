"""One attempt at a run on the compute side: find its state, train, and end as the outcome requires."""

from __future__ import annotations

import os
import platform
import shlex
import socket
import sys
import time
from typing import Any

import torch

from cifar_hpc import __version__
from cifar_hpc.config.io import check_resumable, from_plain
from cifar_hpc.data.datasets import Dataset, load_dataset
from cifar_hpc.errors import Interrupted, RunBusyError, RunFailedError
from cifar_hpc.runs.events import Checkpoint, CheckpointFailed, Resumed, Started
from cifar_hpc.runs.history import History
from cifar_hpc.runs.lock import RunLock
from cifar_hpc.runs.metrics import restore_metrics
from cifar_hpc.tensorfile import digest
from cifar_hpc.training import exit as outcome
from cifar_hpc.training.checkpoints.format import TrainingState
from cifar_hpc.training.checkpoints.interval import CheckpointPacer
from cifar_hpc.training.checkpoints.recovery import Choice, choose
from cifar_hpc.training.checkpoints.store import CheckpointStore
from cifar_hpc.training.context import Context
from cifar_hpc.training.distributed.agreement import Agreement, Request
from cifar_hpc.training.distributed.rendezvous import clear_rendezvous, connect, disconnect, meet, resolve_device
from cifar_hpc.training.distributed.shards import ShardLayout
from cifar_hpc.training.distributed.watchdog import Watchdog
from cifar_hpc.training.engine import Engine
from cifar_hpc.training.environment import configure_torch, describe_environment, describe_machine, resolve_amp
from cifar_hpc.training.failure import FailureReporter
from cifar_hpc.training.process import process_age
from cifar_hpc.training.trainer import Position, Trainer

# After a requeue, processes of the job's last attempt may still be exiting on their node.
LOCK_PATIENCE_SECONDS = {"slurm": 300.0, "local": 20.0, None: 3.0}


class Attempt:
    """One attempt at a run, on one rank."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.lock = RunLock(context.paths.lock)
        self.failures = FailureReporter(context, lambda: self.trainer.position if self.trainer else None)
        self.watchdog: Watchdog | None = None
        self.trainer: Trainer | None = None
        self.finished = False  # otherwise the process must exit at once: its peers may be gone

    def run(self) -> int:
        """Train; return the exit status for this process."""
        context = self.context
        try:
            finished = self._prepare().train(self._pacer())
        except Interrupted:
            finished = False
        except Exception as error:
            return self._failed(error)
        position = self._position()
        if self.watchdog is not None:
            self.watchdog.stop()
        if not finished:
            return outcome.stopped(context, position, self.trainer is None or self.trainer.stored)
        outcome.finished(context, position)
        self.finished = True
        self.trainer = None  # drops the process groups, so that `disconnect` can end their threads
        disconnect()
        self.lock.release()
        return 0

    def _failed(self, error: Exception) -> int:
        self._position()
        status = self.failures.report(error)
        if self.watchdog is not None:
            self.watchdog.stop()
        return status

    def _position(self) -> Position | None:
        """Return the run's position once nothing is being written any more; None before it is known."""
        if self.trainer is None:
            return None
        if self.trainer.store is not None:
            self.trainer.store.wait()
        return self.trainer.position

    # ------------------------------------------------------------ start

    def _prepare(self) -> Trainer:
        """Meet the other ranks, find the run's state and data, and set up the trainer."""
        context, spec, launch = self.context, self.context.spec, self.context.launch
        context.startup.lap("import")
        device = self._join_ranks()
        context.startup.lap("group")
        context.heart.beat("looking for a checkpoint")
        agreement = Agreement(launch.world_size, lag=1 if device.type == "cuda" else 0)
        context.restart = agreement.from_rank_0(self._open_run)
        context.startup.lap("lock")
        layout = ShardLayout(spec.train.shards or launch.world_size, launch.world_size, launch.rank)
        chosen = agreement.from_rank_0(lambda: choose(context))
        context.startup.lap("checkpoint")
        data = agreement.rank_0_first(self._load_data)  # which decodes a folder once, and the others read the cache
        if agreement.now(Request.STOP if context.stop.requested else Request.GO_ON) is Request.STOP:
            raise Interrupted
        environment = describe_environment(spec, device) | {"data": digest([data.train_images, data.train_labels])}
        context.startup.lap("data")
        state = chosen.read() if chosen is not None else None
        if state is not None:
            self._check_fits(state, environment)
        context.startup.lap("checkpoint")
        # A rank that has failed so far is noticed here, where gloo reports it; NCCL would wait for it.
        agreement.now(Request.GO_ON)
        context.heart.beat("setting up the model")
        engine = Engine(spec, device, layout, data.to(device), resolve_amp(spec, device))
        trainer = self.trainer = Trainer(engine, context, agreement, self._checkpoint_store(), environment)
        if state is not None:
            trainer.resume(state)
        context.startup.lap("model")
        context.heart.beat("the first step", trainer.position.step)
        if context.first:
            self._announce(trainer.position, chosen, environment)
        agreement.now(Request.GO_ON)
        return trainer

    def _join_ranks(self) -> torch.device:
        """Find the other ranks, start the watchdog, and form the process group. Return this rank's device."""
        context, launch = self.context, self.context.launch
        tcp_store = meet(launch, context.stop)
        board = self.failures.meet(tcp_store)
        limit = 60 * context.spec.train.watchdog_minutes
        self.watchdog = Watchdog(board, context.heart, limit, self.failures.from_watchdog).start()
        device = resolve_device(context.spec, launch.local_rank)
        configure_torch(context.spec, device)
        context.heart.beat("meeting the other ranks")
        connect(launch, device, tcp_store, board, context.stop)
        return device

    def _open_run(self) -> int:
        """Take the run's lock; return the number of earlier attempts. Rank 0 only."""
        context, launch = self.context, self.context.launch
        context.paths.create()
        owner = {"job_id": launch.job_id, "host": socket.gethostname(), "pid": os.getpid()}
        self._take_lock(owner | {"scheduler": launch.scheduler}, LOCK_PATIENCE_SECONDS[launch.scheduler])
        clear_rendezvous(context.paths.slurm / "rendezvous")
        return len(History.read(context.paths.events).attempts)

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

    def _load_data(self) -> Dataset:
        return load_dataset(self.context.spec.data, self.context.paths.root, self._loading)

    def _loading(self, text: str) -> bool:
        """Report the progress of loading. True to stop it, on rank 0 only: the other ranks must not leave alone."""
        self.context.heart.beat(text or "loading the images")
        if text:
            self.context.log.line(text)
        return self.context.first and self.context.stop.requested

    def _check_fits(self, state: TrainingState, environment: dict[str, Any]) -> None:
        """Check that a checkpoint was made with this spec and these images.

        Raises:
            UserError: names the difference.
        """
        spec = self.context.spec
        check_resumable(from_plain(state.spec), spec, self.context.paths.name)
        if state.environment["data"] != environment["data"]:
            raise RunFailedError(
                f"data.root: the training images in {self.context.paths.root / spec.data.root} are not those that run "
                f"{self.context.paths.name} was started with. HINT: give the run on other images another --name."
            )

    # ------------------------------------------------------------ checkpoints, rank 0 only

    def _pacer(self) -> CheckpointPacer | None:
        """Return the pacer for checkpoint.every: auto. The event of this attempt must have been written."""
        context = self.context
        if not (context.first and context.spec.checkpoint.automatic):
            return None
        past = History.read(context.paths.events).losses
        return CheckpointPacer(past, process_age(), context.log.line, time.monotonic())

    def _checkpoint_store(self) -> CheckpointStore | None:
        if not self.context.first:
            return None
        return CheckpointStore(
            self.context.paths.checkpoints,
            self.context.spec.checkpoint.keep,
            self._checkpoint_written,
            self._checkpoint_failed,
            lambda text: self.context.log.line(f"WARNING {text}"),
        )

    def _checkpoint_written(self, name: str, entry: dict[str, Any]) -> None:
        figures = {key: entry[key] for key in ("step", "epoch", "step_in_epoch", "bytes")}
        self.context.emit(Checkpoint(file=name, **figures))

    def _checkpoint_failed(self, name: str, reason: str) -> None:
        self.context.emit(CheckpointFailed(file=name, reason=reason))
        self.context.log.line(
            f"WARNING checkpoint {name} could not be written: {reason}; training goes on, and the older checkpoints "
            "are kept"
        )

    # ------------------------------------------------------------ reports

    def _announce(self, position: Position, chosen: Choice | None, environment: dict[str, Any]) -> None:
        """Write the beginning of the attempt to train.log and events.jsonl. Rank 0 only."""
        context, launch, log = self.context, self.context.launch, self.context.log
        cut = restore_metrics(context.paths.metrics, position.history)
        where = "started from step 0"
        changed = {}
        if chosen is not None:
            where = (
                f"resumed from {chosen.path.name}: step {position.step}, epoch {position.epoch + 1}, "
                f"step {position.step_in_epoch} of the epoch"
            )
            before = chosen.read().environment
            changed = {k: [before.get(k), v] for k, v in environment.items() if before.get(k) != v}
        log.banner(
            [
                f"run {context.paths.name}  |  {where}",
                f"host {socket.gethostname()}  |  job {launch.job_id or '-'} ({launch.scheduler or 'no scheduler'})"
                f"  |  restart {context.restart}  |  world size {launch.world_size}  |  "
                f"shards {context.spec.train.shards}",
                f"{environment['device']}  |  {environment['amp']}  |  cifar_hpc {__version__}, "
                f"torch {torch.__version__}, python {platform.python_version()}",
            ]
        )
        if cut:
            log.line(f"metrics.jsonl: {cut} row(s) beyond the checkpoint cut off; they are computed again")
        if changed:
            log.line(
                "WARNING this is not the environment of the checkpoint, so the bits may differ from here: "
                + "; ".join(f"{k}: {old} -> {new}" for k, (old, new) in changed.items())
            )
        event = Resumed if chosen else Started
        context.emit(
            event(
                step=position.step,
                epoch=position.epoch,
                step_in_epoch=position.step_in_epoch,
                file=chosen.path.name if chosen else None,
                metrics_cut=cut,
                environment=environment,
                environment_changed=changed,
                shards=context.spec.train.shards,
                machine=describe_machine(),
                command=None if launch.scheduler else shlex.join(sys.argv),
                startup=context.startup.plain(),
            )
        )
        log.line(f"ready after {context.startup}")
        tracking = context.spec.tracking
        if tracking.tensorboard or tracking.wandb:
            hint = f"python -m cifar_hpc track {context.paths.name} --tensorboard DIR, or --wandb offline"
            log.line(f"tracking.*: the run itself starts no tracker any more. HINT: {hint}")

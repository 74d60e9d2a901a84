"""One start of a run on the compute side: find its state, train, and do what the outcome asks for."""

from __future__ import annotations

import contextlib
import os
import platform
import socket
import traceback
from pathlib import Path
from typing import Any

import torch

from cifar_hpc import __version__, outcome
from cifar_hpc.agreement import Agreement, Wish
from cifar_hpc.checkpoint import digest, history, read
from cifar_hpc.context import Context
from cifar_hpc.data import Dataset, Interrupted, load_dataset
from cifar_hpc.distributed import connect, disconnect, resolve_device
from cifar_hpc.engine import Engine, configure_torch, describe_environment, resolve_amp
from cifar_hpc.errors import RunFailedError, UserError
from cifar_hpc.runlock import RunLock
from cifar_hpc.runlog import count_starts, read_jsonl, restore_metrics
from cifar_hpc.shards import ShardLayout
from cifar_hpc.spec_io import check_resumable, from_plain
from cifar_hpc.store import CheckpointStore, newest_good
from cifar_hpc.trainer import Position, Trainer

# After a requeue the last attempt of this job may still be dying on its node.
LOCK_PATIENCE_SECONDS = {"slurm": 300.0, "local": 20.0, None: 3.0}


class Job:
    """One start of one run, on one rank."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.lock = RunLock(context.paths.lock)
        self.trainer: Trainer | None = None
        self._state: dict[str, Any] | None = None

    def run(self) -> int:
        """Train; returns the exit status that this process should end with."""
        context = self.context
        try:
            finished = self._train()
        except Interrupted:
            finished = False
        except UserError as error:
            return outcome.failed(context, error, str(error), self._position(), again=False)
        except Exception as error:
            return outcome.failed(context, error, traceback.format_exc(), self._position(), again=True)
        if not finished:
            return outcome.stopped(context, self._position(), self.trainer is None or self.trainer.stored)
        outcome.finished(context, self._position())
        self.trainer = None  # lets go of the process groups, so that `disconnect` can end their threads
        disconnect()
        self.lock.release()
        return 0

    def _position(self) -> Position | None:
        """Where the run stands, once nothing is being written any more; None before it has been found."""
        if self.trainer is None:
            return None
        if self.trainer.store is not None:
            self.trainer.store.wait()
        return self.trainer.position

    def _train(self) -> bool:
        spec, launch = self.context.spec, self.context.launch
        device = resolve_device(spec, launch.local_rank)
        configure_torch(spec, device)
        connect(launch, device)
        agreement = Agreement(launch.world_size, lag=1 if device.type == "cuda" else 0)
        self.context.restart = agreement.from_rank_0(self._open)
        layout = ShardLayout(spec.train.shards or launch.world_size, launch.world_size, launch.rank)
        chosen = agreement.from_rank_0(self._choose_checkpoint)
        data = self._load_data(agreement)
        environment = describe_environment(spec, device) | {"data": digest([data.train_images, data.train_labels])}
        state = self._state or (read(chosen) if chosen is not None else None)
        if state is not None:
            self._check_fits(state, environment)
        # A rank that has failed so far is noticed here, where gloo tells of it; NCCL would wait for it.
        agreement.now(Wish.GO_ON)
        engine = Engine(spec, device, layout, data.to(device), resolve_amp(spec, device))
        store = self._open_store() if self.context.first else None
        trainer = self.trainer = Trainer(engine, self.context, agreement, store, environment)
        if state is not None:
            trainer.resume(state)
        self._state = None
        self._announce(chosen, state, environment)
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
        self.lock.acquire(owner, LOCK_PATIENCE_SECONDS[self.context.launch.scheduler])
        return count_starts(read_jsonl(self.context.paths.events))

    def _choose_checkpoint(self) -> Path | None:
        found = newest_good(self.context.paths.checkpoints)
        if found is None:
            return None
        for path, reason in found.bad:
            aside = path.with_name(path.name + ".damaged")
            with contextlib.suppress(FileNotFoundError):
                path.replace(aside)  # out of the way of retention and of the next start
            self.context.emit("fallback", file=path.name, moved_to=aside.name, reason=reason)
            self.context.log.line(
                f"WARNING checkpoint {path.name}: {reason}; kept as {aside.name}, going back to {found.path.name}"
            )
        self._state = found.state  # so that rank 0 does not read it twice
        return found.path

    def _load_data(self, agreement: Agreement) -> Dataset:
        def progress(text: str) -> bool:
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

        return CheckpointStore(self.context.paths.checkpoints, self.context.spec.checkpoint.keep, on_written, on_failed)

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
        )

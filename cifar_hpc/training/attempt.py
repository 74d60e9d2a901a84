"""One attempt at a run on the compute side: find its state, train, and end as the outcome requires."""

import os
import platform
import shlex
import socket
import sys
import time
from dataclasses import replace
from typing import Any

import torch

from cifar_hpc import __version__
from cifar_hpc.data.datasets import load_dataset
from cifar_hpc.data.info import DatasetInfo
from cifar_hpc.errors import Interrupted, RunBusyError, RunFailedError
from cifar_hpc.runs.events import Finished, Resumed, Started
from cifar_hpc.runs.history import History
from cifar_hpc.runs.logs import restore_metrics
from cifar_hpc.tensorfile import digest
from cifar_hpc.text import counted, one_line, shown
from cifar_hpc.training.checkpoints.format import TrainingState
from cifar_hpc.training.checkpoints.interval import CheckpointPacer
from cifar_hpc.training.checkpoints.recovery import Choice, choose
from cifar_hpc.training.checkpoints.store import CheckpointStore
from cifar_hpc.training.context import Context
from cifar_hpc.training.distributed.group import Agreement, Request, connect, disconnect, meet, resolve_device
from cifar_hpc.training.distributed.shards import ShardLayout
from cifar_hpc.training.distributed.watchdog import Watchdog
from cifar_hpc.training.engine import Engine
from cifar_hpc.training.environment import (
    combined,
    configure_torch,
    describe_environment,
    describe_machine,
    describe_rank,
    require_agreement,
    resolve_amp,
)
from cifar_hpc.training.evaluation import measures_statistics
from cifar_hpc.training.exit import FailureReporter, finished, stopped
from cifar_hpc.training.init_from import init_from
from cifar_hpc.training.process import Patience
from cifar_hpc.training.trainer import Position, Trainer

# How dropout draws, and what statistics are measured of: a change changes the bits, of test figures in the second case.
MASKS, STATISTICS = "counter hash", "shards"
# After a requeue, processes of the job's last attempt may still be exiting on their node.
LOCK_PATIENCE_SECONDS = {"slurm": 300.0, "local": 20.0, None: 3.0}


class Attempt:
    """One attempt at a run, on one rank."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.failures = FailureReporter(context, self._position)
        self.watchdog: Watchdog | None = None
        self.trainer: Trainer | None = None
        self.ranks: list[dict[str, Any]] = []  # facts by rank
        self.differences: list[str] = []  # between ranks, that do not stop them
        self.finished = False  # otherwise the process must exit at once: its peers may be gone

    def run(self) -> int:
        """Train; return the exit status for this process."""
        context = self.context
        try:
            self._prepare()
            trained = self.trainer is None or self.trainer.train(self._pacer())
        except Interrupted:
            trained = False
        except Exception as error:
            if self.trainer is not None and self.trainer.store is not None:
                self.trainer.store.wait()
            return self.failures.report(error)
        finally:
            context.quiet()
            if self.watchdog is not None:
                self.watchdog.stop()
        position = self._position()
        if not trained:
            return stopped(context, position, self.trainer is None or self.trainer.stored)
        finished(context, position)
        self.finished = True
        self.trainer = None  # drops the process groups, so that `disconnect` can end their threads
        disconnect()
        context.lock.release()
        return 0

    def _position(self) -> Position | None:
        """Return the run's position; None before it is known."""
        return self.trainer.position if self.trainer is not None else None

    # ------------------------------------------------------------ start

    def _prepare(self) -> None:
        """Meet the other ranks, find the run's state and data, and set up the trainer, unless all is done."""
        context, spec, launch = self.context, self.context.spec, self.context.launch
        context.startup.lap("import")
        device = self._join_ranks()
        context.startup.lap("group")
        context.begin("looking for a checkpoint")
        agreement = Agreement(launch.world_size, lag=1 if device.type == "cuda" else 0)
        context.restart = agreement.from_rank_0(self._open_run)
        context.startup.lap("lock")
        layout = ShardLayout(spec.train.shards or launch.world_size, launch.world_size, launch.rank)
        chosen = agreement.from_rank_0(lambda: choose(context))
        context.startup.lap("checkpoint")
        if agreement.from_rank_0(lambda: self._has_finished(chosen)):
            return
        context.begin(f"loading the images ({spec.data.label})")
        data = agreement.rank_0_first(  # which decodes a folder once, and the others read the cache
            lambda: load_dataset(spec.data, context.paths.root, self._progress, context.paths.user_code)
        )
        if agreement.now(Request.STOP if context.stop.requested else Request.GO_ON) is Request.STOP:
            raise Interrupted
        self._compare(
            agreement,
            data=digest([data.train_images, data.train_labels]),
            test_data=digest([data.test_images, data.test_labels]),
        )
        context.startup.lap("data")
        state = chosen.read() if chosen is not None else None
        if state is not None:
            self._check_images(state)
            # Earlier versions recorded none, and took CIFAR-10's mean and deviation for all images.
            data = replace(data, info=state.info or DatasetInfo(data.info.classes, data.info.image_size))
        context.startup.lap("checkpoint")
        # A rank that has failed so far is noticed here, where gloo reports it; NCCL would wait for it.
        agreement.now(Request.GO_ON)
        context.begin("setting up the model")
        engine = Engine(spec, device, layout, data.to(device), resolve_amp(spec, device), context.paths.user_code)
        self._compare(agreement, gradient=engine.first_gradient())
        environment = combined(self.ranks, (*describe_environment(spec, device), "data", "test_data", "gradient"))
        if engine.exact.draws:
            environment["masks"] = MASKS
        if layout.shards > 1 and measures_statistics(spec):
            environment["statistics"] = STATISTICS
        store: CheckpointStore | None = None
        if context.first:
            store = CheckpointStore(context.paths.checkpoints, spec.checkpoint.keep, context.emit, context.log.warn)
        trainer = self.trainer = Trainer(engine, context, agreement, store, environment)
        if chosen is not None and state is not None:
            each, begin = engine.steps_per_epoch, state.epoch * engine.steps_per_epoch
            if state.step != begin + state.step_in_epoch or state.step_in_epoch > each:
                raise RunFailedError(
                    f"{chosen.path}: step_in_epoch: {state.step_in_epoch}, epoch: {state.epoch}, step: {state.step} do "
                    f"not go with epochs of {each} steps. HINT: move the file away."
                )
            trainer.resume(state)
        elif spec.model.init_from is not None:
            # After the first gradient, which each attempt computes under the same weights.
            init_from(engine, spec.model, context.log.line)
        context.startup.lap("model")
        context.heart.beat("the first step", trainer.position.step)
        if context.first:
            self._announce(trainer, chosen, environment)
        context.begin("compiling the model, which takes minutes" if spec.train.compile else "taking the first step")
        agreement.now(Request.GO_ON)

    def _join_ranks(self) -> torch.device:
        """Find the other ranks, start the watchdog, and form the process group. Return this rank's device."""
        context, launch = self.context, self.context.launch
        tcp_store = meet(launch, context.stop)
        board = self.failures.meet(tcp_store)
        limit = 60 * context.spec.train.watchdog_minutes
        self.watchdog = Watchdog(board, context.heart, limit, self.failures.from_watchdog).start()
        device = resolve_device(context.spec, launch.local_rank)
        configure_torch(context.spec, device)
        context.begin("meeting the other ranks")
        facts = describe_rank(context.spec, device)
        self.ranks = connect(launch, device, tcp_store, board, context.stop, self._progress, facts)
        return device

    def _compare(self, agreement: Agreement, **facts: str | None) -> None:
        """Compare further facts of all ranks.

        Raises:
            RanksDifferError: on every rank.
        """
        self.ranks = [known | new for known, new in zip(self.ranks, agreement.gather(facts), strict=True)]
        self.differences = require_agreement(self.ranks)

    def _open_run(self) -> int:
        """Take the run's lock; return the number of earlier attempts. Rank 0 only."""
        context, launch = self.context, self.context.launch
        context.paths.create()
        owner = {"job_id": launch.job_id, "host": socket.gethostname(), "pid": os.getpid()}
        patience = Patience(LOCK_PATIENCE_SECONDS[launch.scheduler])
        while not context.lock.held:
            try:
                context.lock.acquire(owner | {"scheduler": launch.scheduler}, 1.0)
            except RunBusyError:
                if patience.over():
                    raise
                if context.stop.requested:
                    raise Interrupted from None
                context.heart.beat("waiting for the run's lock")
        for path in (context.paths.slurm / "rendezvous").glob("*"):  # of killed attempts
            path.unlink(missing_ok=True)
        return History.read(context.paths.events).earlier_than(launch.job_id)

    def _has_finished(self, chosen: Choice | None) -> bool:
        """True if the run finished before, and was not submitted again, and all epochs are on disk. Rank 0 only."""
        last = History.read(self.context.paths.events).state.get("event")
        return last == Finished.name and chosen is not None and chosen.read().epoch >= self.context.spec.train.epochs

    def _progress(self, text: str) -> bool:
        """Report progress of the start. True to stop it, on rank 0 only: the other ranks must not leave alone."""
        self.context.heart.beat(text or self.context.heart.doing)
        if text:
            self.context.quiet()
            self.context.say(text)
        return self.context.first and self.context.stop.requested

    def _check_images(self, state: TrainingState) -> None:
        """Check that a checkpoint was made with these images.

        Raises:
            RunFailedError: it was not.
        """
        spec = self.context.spec
        run = self.context.paths
        for key, kind in (("data", "training"), ("test_data", "test")):
            if state.environment.get(key) not in (None, self.ranks[0][key]):  # older checkpoints lack the second
                target, hint = spec.data.target, "give the run on other images another --name."
                where = f"data.root: the {kind} images in {run.root / spec.data.root}"
                if target is not None:
                    where = f"data.target: the {kind} images that {shown(target)} gives"
                    hint = f"it must give the same images at every start (seed its random generator); else {hint}"
                raise RunFailedError(f"{where} are not those that run {run.name} was started with. HINT: {hint}")

    def _pacer(self) -> CheckpointPacer | None:
        """Return the pacer for checkpoint.every: auto. The event of this attempt must have been written."""
        context = self.context
        if not (context.first and context.spec.checkpoint.automatic):
            return None
        past = History.read(context.paths.events).losses
        news = context.restart == 0 or past.count > 0  # else it is as the first attempt has said
        return CheckpointPacer(past, context.log.line if news else lambda _: None, time.monotonic())

    # ------------------------------------------------------------ reports

    def _announce(self, trainer: Trainer, chosen: Choice | None, environment: dict[str, Any]) -> None:
        """Write the beginning of the attempt to train.log and events.jsonl. Rank 0 only."""
        context, launch, log, position = self.context, self.context.launch, self.context.log, trainer.position
        cut = restore_metrics(context.paths.metrics, position.history)
        where, changed, ranks = "started from step 0", {}, counted(launch.world_size, "rank")
        if chosen is not None:
            steps = trainer.engine.steps_per_epoch
            where = (
                f"resumed from {chosen.path.name}: epoch {position.epoch + 1}, step {position.step_in_epoch}/{steps}"
            )
            before = chosen.read().environment
            # A key that an older version did not record says nothing, but for these, which were others then.
            before = {"masks": "generator", "statistics": "batches"} | before
            changed = {k: [before[k], v] for k, v in environment.items() if k in before and before[k] != v}
            begun = [attempt.world_size for attempt in History.read(context.paths.events).attempts if attempt.begun]
            if begun and begun[-1] != launch.world_size:
                ranks += f" (before: {begun[-1]})"
        start = f"restart {context.restart}  |  " if context.restart else ""
        job = f"job {launch.job_id}  |  " if launch.job_id else ""
        graphs = ", CUDA graphs" if trainer.engine.graphs is not None else ""
        lines = [f"run {context.paths.name}  |  {where}", f"{start}{job}host {socket.gethostname()}  |  {ranks}"]
        if chosen is None:  # later changes are warnings
            lines[-1] += f", {counted(trainer.engine.layout.shards, 'shard')}"
            lines.append(
                f"{environment['device']}, {environment['amp']}{graphs}  |  cifar_hpc {__version__}, "
                f"torch {torch.__version__}, python {platform.python_version()}"
            )
        log.banner(lines)
        if cut:
            log.line(f"metrics.jsonl: {counted(cut, 'row')} after the checkpoint removed, to be computed again")
        if changed:
            log.warn(
                f"this is not the environment of the checkpoint, so the bits {'' if 'gradient' in changed else 'may '}"
                "differ from here: "
                + "; ".join(one_line(f"{k}: {old} -> {new}")[:300] for k, (old, new) in changed.items())
            )
        if context.spec.train.graph == "on" and not graphs:
            log.warn(
                "train.graph: on has no effect here: it takes one process with a GPU, and bf16 or fp32. The steps are "
                "taken without graphs, and the bits are the same."
            )
        if self.differences:
            log.warn(
                f"the ranks differ, though their first gradients have the same bits. {'; '.join(self.differences)}"
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
                hosts=[rank["host"] for rank in self.ranks],
                command=None if launch.scheduler else shlex.join(sys.argv),
                startup=context.startup.plain(),
            )
        )
        log.line(f"ready after {context.startup}")
        tracking = context.spec.tracking
        if tracking.tensorboard or tracking.wandb:
            hint = f"python -m cifar_hpc track {context.paths.name} --tensorboard DIR, or --wandb offline"
            log.line(f"tracking.*: the run itself starts no tracker any more. HINT: {hint}")

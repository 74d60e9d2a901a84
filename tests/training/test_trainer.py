"""The training loop in this process, with a tiny engine: steps, checkpoints, stops, bad losses, epochs, resuming."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ENVIRONMENT, Ranks, tiny_engine, tiny_spec

from cifar_hpc.cli.tail import PROGRESS
from cifar_hpc.errors import RunFailedError
from cifar_hpc.runs.events import Checkpoint, Event, append_event
from cifar_hpc.runs.history import Losses
from cifar_hpc.runs.logs import read_jsonl
from cifar_hpc.runs.paths import RunPaths
from cifar_hpc.runs.progress import read_progress
from cifar_hpc.tensorfile import digest
from cifar_hpc.training import trainer as training
from cifar_hpc.training.checkpoints import interval
from cifar_hpc.training.checkpoints.format import TrainingState, read_checkpoint
from cifar_hpc.training.checkpoints.interval import CheckpointPacer
from cifar_hpc.training.checkpoints.store import CheckpointStore, newest_good
from cifar_hpc.training.context import Context
from cifar_hpc.training.distributed.group import Agreement, Request
from cifar_hpc.training.process import Launch, StopFlag
from cifar_hpc.training.trainer import Trainer

STEPS = 3  # of an epoch of 96 images
TINY = {"data": {"train_size": 96, "test_size": 20}, "lookahead": {"bn_batches": 1}}
VOLATILE = {"epoch_seconds", "images_per_second", "restart", "time"}
FIELDS = ("epoch", "step", "step_in_epoch", "updates", "model", "buffers", "optimizer", "slow_buffers", "sums", "best")


class Run:
    """A trainer on one rank, and what it wrote. Of no job."""

    def __init__(
        self, root: Path, agreement: Agreement | None = None, rank: int = 0, world: int = 1, **sections: dict[str, Any]
    ) -> None:
        spec = tiny_spec(**{**TINY, "train": {"log_seconds": 60}, **sections})
        self.paths = RunPaths(root, "run")
        self.paths.create()
        self.written: list[int] = []
        self.context = Context(self.paths, spec, Launch(rank, world, rank), StopFlag())
        self.engine = tiny_engine(spec, rank, world)
        store = CheckpointStore(self.paths.checkpoints, 99, self._emit, pytest.fail)
        agreement = agreement or Agreement(world, lag=0)
        self.trainer = Trainer(self.engine, self.context, agreement, store if rank == 0 else None, ENVIRONMENT)

    def _emit(self, event: Event) -> None:
        assert isinstance(event, Checkpoint)
        self.written.append(event.step)

    def after_step(self, number: int, action: Callable[[], object]) -> Run:
        """Arrange for `action` right after the step with this number, counted from 1."""
        step = self.engine.step

        def wrapper(epoch: int, step_in_epoch: int, global_step: int, rows: torch.Tensor) -> None:
            step(epoch, step_in_epoch, global_step, rows)
            if global_step + 1 == number:
                action()

        self.engine.step = wrapper  # type: ignore[method-assign]
        return self

    def request_stop(self) -> None:
        self.context.stop.signal = signal.SIGTERM

    def spoil_loss(self) -> None:
        """As the engine does where the loss of this step is NaN."""
        self.engine.bad_step.fill_(self.trainer.position.step + 1)

    def train(self, pacer: CheckpointPacer | None = None) -> bool:
        try:
            return self.trainer.train(pacer)
        finally:
            if self.trainer.store is not None:
                self.trainer.store.wait()

    def resume(self) -> None:
        self.trainer.resume(self.newest())

    def newest(self) -> TrainingState:
        found = newest_good(self.paths.checkpoints)
        assert found is not None
        return found.state

    def bits(self) -> tuple[str, list[dict[str, Any]]]:
        """The newest checkpoint, but for times."""
        state = self.newest()
        rows = [{k: v for k, v in row.items() if k not in VOLATILE} for row in state.rows]
        return digest([getattr(state, key) for key in FIELDS]), rows

    def log(self) -> str:
        return self.paths.train_log.read_text()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run without interruption, with checkpoints at the epochs' ends only."""
    run = Run(tmp_path_factory.mktemp("whole"))
    assert run.train()
    return run


def test_a_kill_before_the_first_line_of_progress_leaves_a_position(tmp_path: Path) -> None:
    def killed() -> None:
        raise KeyboardInterrupt

    run = Run(tmp_path)  # lines come every minute
    run.after_step(2, killed)
    with pytest.raises(KeyboardInterrupt):
        run.train()
    found = read_progress(run.paths)
    assert (found.step, found.epoch) == (1, pytest.approx(1 / STEPS))  # the first step; no line came after it
    saved = Checkpoint(file="step_00000002.pt", step=2, epoch=0, step_in_epoch=2, bytes=1)
    append_event(run.paths.events, saved, job_id=None, restart=0, world_size=1)
    assert read_progress(run.paths).saved_epoch == pytest.approx(2 / STEPS)


def test_train_ends_with_every_epoch_on_disk(whole: Run) -> None:
    assert whole.written == [STEPS, 2 * STEPS]
    state = whole.newest()
    assert (state.step, state.epoch, state.step_in_epoch) == (2 * STEPS, 2, 0)
    assert state.slow_buffers is not None
    assert not state.sums.any(), "those of the next epoch"
    assert state.environment == ENVIRONMENT
    assert whole.trainer.stored


def test_train_stops_after_the_step_in_which_a_stop_is_requested(tmp_path: Path) -> None:
    run = Run(tmp_path)
    assert not run.after_step(2, run.request_stop).train()
    assert run.trainer.stored
    state = run.newest()
    assert (state.step, state.epoch, state.step_in_epoch, state.history) == (2, 0, 2, "")
    assert state.slow_buffers is None
    assert run.written == [2]


def test_train_tells_that_a_stop_was_not_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path)
    monkeypatch.setattr(CheckpointStore, "wait", lambda *_: "no space")
    assert not run.after_step(1, run.request_stop).train()
    assert not run.trainer.stored


@pytest.mark.parametrize("steps", [1, 2, 4, 5])
def test_resume_in_any_step_gives_the_same_bits(tmp_path: Path, whole: Run, steps: int) -> None:
    first = Run(tmp_path)
    assert not first.after_step(steps, first.request_stop).train()
    second = Run(tmp_path)
    second.resume()
    assert second.trainer.position.step == steps
    assert second.train()
    assert second.bits() == whole.bits()


def test_resume_after_a_stop_during_the_evaluation_gives_the_same_bits(tmp_path: Path, whole: Run) -> None:
    first = Run(tmp_path)
    first.engine.share_buffers = first.request_stop  # type: ignore[method-assign]  # the evaluation begins with it
    assert not first.train()
    state = first.newest()
    assert (state.step, state.epoch, state.step_in_epoch, state.history) == (STEPS, 0, STEPS, ""), "no row yet"
    second = Run(tmp_path)
    second.resume()
    evaluating, delay = second.engine.share_buffers, 0.5
    second.engine.share_buffers = lambda: (time.sleep(delay), evaluating())[1]  # type: ignore[method-assign]
    assert second.train()
    assert second.bits() == whole.bits()
    assert second.context.startup.seconds["evaluation"] >= delay, "which is no part of the first step"


# ------------------------------------------------------------ checkpoints


def test_save_every_steps(tmp_path: Path, whole: Run) -> None:
    run = Run(tmp_path, checkpoint={"every_steps": 2})
    store = run.trainer.store
    assert store is not None
    # The end of the first epoch is written before step 4 is due, so that it is not skipped.
    assert run.after_step(4, store.wait).train()
    assert sorted(set(run.written)) == [2, 3, 4, 6]
    assert run.bits() == whole.bits()


def test_save_every_epochs_and_for_the_best_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accuracies = iter([50.0, 40.0, 60.0, 30.0, 20.0])

    def evaluate(*_: object) -> training.Result:
        return training.Result(1.0, next(accuracies), {})

    monkeypatch.setattr(training, "evaluate", evaluate)
    run = Run(tmp_path, train={"epochs": 5}, checkpoint={"every_epochs": 4})
    assert run.train()
    assert run.written == [STEPS * epoch for epoch in (1, 3, 4, 5)], "best, best, fourth, last"
    assert run.trainer.position.best == {"epoch": 3, "test_accuracy": 60.0}


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Run]:
    """Makes runs of six epochs, each far shorter than any interval, the second and the fourth better than before."""
    monkeypatch.setattr(interval, "LEAST_SECONDS", 10_000.0)
    monkeypatch.setattr(interval, "MOST_SECONDS", 10_000.0)
    accuracies = (50.0, 60.0, 40.0, 70.0, 30.0, 20.0)

    def evaluate(engine: Any, epoch: int, between: Any) -> training.Result:
        return training.Result(1.0, accuracies[epoch], engine.buffers())

    monkeypatch.setattr(training, "evaluate", evaluate)
    return lambda root, **checkpoint: Run(root, train={"epochs": 6}, checkpoint=checkpoint)


def paced() -> CheckpointPacer:
    return CheckpointPacer(Losses(), lambda line: None, time.monotonic())


def best_of(run: Run) -> tuple[int, str]:
    state = read_checkpoint(run.paths.checkpoints / "best.pt")
    return state.step, digest([state.model, state.buffers, state.optimizer, state.slow_buffers])


def test_short_epochs_save_as_often_as_the_pacer_says(tmp_path: Path, short: Callable[..., Run]) -> None:
    """Written are the first epoch's end, the last one's, and before it the best one's, which has been in memory."""
    run, each = short(tmp_path / "paced"), short(tmp_path / "each")
    assert run.train(paced()) and each.train()
    assert run.written == [STEPS, 4 * STEPS, 6 * STEPS]
    assert each.written == [STEPS * epoch for epoch in range(1, 7)], "without a pacer"
    assert best_of(run) == best_of(each) and best_of(run)[0] == 4 * STEPS
    assert run.bits() == each.bits()


def test_the_end_of_epochs_that_were_asked_for_is_always_saved(tmp_path: Path, short: Callable[..., Run]) -> None:
    run = short(tmp_path, every_epochs=3)
    assert run.train(paced())
    assert run.written == [STEPS * epoch for epoch in (1, 2, 3, 4, 6)], "of epoch 2 and 4 with the next, since best"
    run = short(tmp_path / "1", every_epochs=1)
    assert run.train(paced()) and run.written == [STEPS * epoch for epoch in range(1, 7)]


def test_the_best_state_in_memory_is_written_before_the_next_checkpoint(
    tmp_path: Path, short: Callable[..., Run]
) -> None:
    run = short(tmp_path)

    def make_due() -> None:
        assert run.written == [STEPS], "of epoch 2 nothing yet"
        run.trainer._last_save = -1e9

    assert run.after_step(2 * STEPS + 1, make_due).train(paced())
    assert run.written == [STEPS, 2 * STEPS, 2 * STEPS + 1, 4 * STEPS, 6 * STEPS]


@pytest.mark.parametrize("end", ["stop", "failure"])
def test_the_best_state_in_memory_is_written_at_the_end_of_an_attempt(
    tmp_path: Path, short: Callable[..., Run], end: str
) -> None:
    run = short(tmp_path)
    run.after_step(2 * STEPS + 1, run.request_stop if end == "stop" else run.spoil_loss)
    if end == "stop":
        assert not run.train(paced()) and run.written == [STEPS, 2 * STEPS, 2 * STEPS + 1]
    else:  # the loss is not finite: no later checkpoint
        with pytest.raises(RunFailedError, match="NaN or infinite"):
            run.train(paced())
        assert run.written == [STEPS, 2 * STEPS]
    assert best_of(run)[0] == 2 * STEPS


@pytest.mark.parametrize("epoch", [2, 3, 5])
def test_a_best_state_that_a_kill_took_from_memory_is_computed_again(
    tmp_path: Path, short: Callable[..., Run], epoch: int
) -> None:
    class KilledError(Exception):
        pass

    def kill() -> None:
        raise KilledError

    whole, killed = short(tmp_path / "whole"), short(tmp_path / "killed")
    assert whole.train(paced())
    with pytest.raises(KilledError):
        killed.after_step(epoch * STEPS + 1, kill).trainer.train(paced())
    assert (thread := killed.trainer.store and killed.trainer.store._thread) is None or thread.join() is None
    assert best_of(killed)[0] == STEPS and len(read_jsonl(killed.paths.metrics)) == epoch
    again = short(tmp_path / "killed")
    again.resume()
    assert again.trainer.position.step == STEPS
    assert again.train(paced())
    assert again.bits() == whole.bits() and best_of(again) == best_of(whole)
    assert [row["epoch"] for row in read_jsonl(again.paths.metrics)] == [1, 2, 3, 4, 5, 6]


def test_a_storage_slower_than_epochs_gets_no_more_than_it_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Epochs take milliseconds, and no write of an epoch's end comes to its end while others are trained."""
    go_on, write = threading.Event(), CheckpointStore._write_file

    def slow(store: CheckpointStore, snapshot: Any) -> None:
        assert go_on.wait(60)
        write(store, snapshot)

    monkeypatch.setattr(CheckpointStore, "_write_file", slow)
    monkeypatch.setattr(interval, "LEAST_SECONDS", 0.0)  # only ten times the time of the write under way counts
    run = Run(tmp_path, train={"epochs": 6}, lookahead={"enabled": False})
    run.after_step(6 * STEPS, go_on.set)
    assert run.train(paced())
    assert run.written[0] == STEPS and run.written[-1] == 6 * STEPS and len(run.written) <= 3


def test_save_waits_for_a_slow_storage_and_warns_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path, checkpoint={"every_minutes": 1e-6})
    monkeypatch.setattr(CheckpointStore, "busy", True)
    assert run.train()
    assert run.written == [STEPS, 2 * STEPS], "those of the epochs wait in line"
    assert run.log().count("a checkpoint takes longer to write than the time to the next one") == 1


class Lagging(Agreement):
    """Each step reads the result of the step before, as on GPUs."""

    def __init__(self) -> None:
        super().__init__(1, lag=1)
        self.requests: list[Request] = []

    def after_step(self, request: Request) -> Request:
        self.requests.append(request)
        return [Request.GO_ON, *self.requests][-2]


def test_a_due_checkpoint_is_requested_once(tmp_path: Path) -> None:
    agreement = Lagging()
    run = Run(tmp_path, agreement, checkpoint={"every_minutes": 1000})

    def make_due() -> None:
        run.trainer._last_save = -1e9

    assert run.after_step(1, make_due).train()
    assert agreement.requests == [Request.SAVE] + [Request.GO_ON] * (2 * STEPS - 1)
    assert run.written == [2, STEPS, 2 * STEPS]


def test_decide_prefers_a_stop_to_a_checkpoint_to_a_check_and_changes_nothing(tmp_path: Path) -> None:
    run = Run(tmp_path, checkpoint={"every_minutes": 1})
    trainer, due = run.trainer, run.trainer._last_save + 60
    before = {**vars(trainer), "position": repr(trainer.position)}
    assert trainer._decide(due - 1) is Request.GO_ON
    assert trainer._decide(due) is Request.SAVE
    assert {**vars(trainer), "position": repr(trainer.position)} == before
    trainer._bad_loss = True
    assert [trainer._decide(due - 1), trainer._decide(due)] == [Request.CHECK, Request.SAVE]
    run.request_stop()
    assert trainer._decide(due) is Request.STOP


@pytest.mark.parametrize("what", ["the last checkpoint", "best.pt", "metrics.jsonl"])
def test_train_fails_where_a_result_is_not_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    def no_space(*_: object) -> None:
        raise OSError(28, "no space")

    run = Run(tmp_path, train={"epochs": 1})
    if what == "metrics.jsonl":
        monkeypatch.setattr(training, "write_metrics", no_space)
    elif what == "best.pt":
        monkeypatch.setattr(CheckpointStore, "best_error", "no space")
    else:
        monkeypatch.setattr(CheckpointStore, "wait", lambda *_: "no space")
    with pytest.raises(RunFailedError, match=rf"^{what} could not be written: .*no space.* HINT"):
        run.train()


# ------------------------------------------------------------ a loss that is not finite


@pytest.mark.parametrize(
    ("sections", "noticed"),
    [
        ({"train": {"log_seconds": 1e-6}}, 3),  # at the line after step 2, which asks all ranks to check after step 3
        ({"checkpoint": {"every_steps": 4}}, 4),
        ({"checkpoint": {"every_minutes": 1e-6}}, 2),
        ({}, 6),
    ],
    ids=["at a progress line", "at a checkpoint by steps", "at a checkpoint by time", "at the end of the epoch"],
)
def test_a_bad_loss_ends_the_run(tmp_path: Path, sections: dict[str, Any], noticed: int) -> None:
    run = Run(tmp_path, **{"data": {"train_size": 192, "test_size": 20}, **sections})
    store = run.trainer.store
    assert store is not None
    run.after_step(2, store.wait).after_step(2, run.spoil_loss)  # none is being written, which would put the next off
    with pytest.raises(RunFailedError, match=r"NaN or infinite at step 2, in epoch 1\. .* HINT") as caught:
        run.train()
    assert caught.value.everywhere
    assert run.trainer.position.step == noticed
    assert max(run.written, default=0) < 2, "no checkpoint of a bad state"
    assert read_jsonl(run.paths.metrics) == []


def bad_loss_on_rank_1(rank: int, world: int, root: str) -> tuple[int, str, bool]:
    seconds = 1e-6 if rank == 1 else 60  # so that rank 0 reads no figures before it is asked to
    run = Run(Path(root), rank=rank, world=world, train={"log_seconds": seconds}, data={"train_size": 192})
    if rank == 1:
        run.after_step(2, run.spoil_loss)
    try:
        run.train()
    except RunFailedError as error:
        return run.trainer.position.step, str(error).partition(",")[0], error.everywhere
    return run.trainer.position.step, "", False


def test_a_bad_loss_on_one_rank_ends_all_after_the_same_step(ranks: Ranks, tmp_path: Path) -> None:
    expected = (3, "the training loss was NaN or infinite at step 2", True)
    assert ranks.run(2, bad_loss_on_rank_1, str(tmp_path)) == [expected] * 2


def test_a_bad_loss_ends_a_run_that_is_stopped(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.after_step(2, run.spoil_loss).after_step(2, run.request_stop)
    with pytest.raises(RunFailedError, match="NaN or infinite at step 2"):
        run.train()
    assert run.written == []


def test_weights_that_are_not_finite_end_the_run_at_the_end_of_the_epoch(tmp_path: Path) -> None:
    run = Run(tmp_path)
    weight = next(run.engine.model.parameters())
    run.after_step(STEPS, lambda: weight.data.fill_(float("nan")))
    with pytest.raises(RunFailedError, match="the weights became NaN or infinite by update 3"):
        run.train()


# ------------------------------------------------------------ reports


def test_epoch_rows(whole: Run) -> None:
    rows = read_jsonl(whole.paths.metrics)
    assert rows == whole.trainer.position.history
    assert [(row["epoch"], row["step"], row["images"]) for row in rows] == [(1, STEPS, 96), (2, 2 * STEPS, 192)]
    assert all((row["world_size"], row["shards"], row["job_id"], row["restart"]) == (1, 4, None, 0) for row in rows)
    events = [event for event in read_jsonl(whole.paths.events) if event["event"] == "evaluated"]
    assert [(e["epoch"], e["step"], e["test_accuracy"]) for e in events] == [
        (row["epoch"], row["step"], row["test_accuracy"]) for row in rows
    ]
    best = max(rows, key=lambda row: float(row["test_accuracy"]))
    assert whole.trainer.position.best == {"epoch": best["epoch"], "test_accuracy": best["test_accuracy"]}
    assert whole.log().count(" DONE  train loss ") == 2


def test_the_training_figures_of_a_row_are_means_over_the_epoch(tmp_path: Path) -> None:
    run, sums = Run(tmp_path, train={"epochs": 1}), []
    run.after_step(STEPS, lambda: sums.append(run.engine.epoch_sums().sum(0).tolist()))
    run.train()
    (loss, correct), (row,) = sums[0], run.trainer.position.history
    assert (row["train_loss"], row["train_accuracy"]) == pytest.approx((loss / 96, 100 * correct / 96))


def test_progress_lines_come_every_log_seconds(tmp_path: Path) -> None:
    run = Run(tmp_path, train={"epochs": 1, "log_seconds": 1e-6})
    run.train()
    lines = [line for line in run.log().splitlines() if " run ETA " in line]
    assert [line.partition(" step ")[2].partition(" ")[0] for line in lines] == ["2/3", "3/3"], "the first one warms up"
    assert " evaluating: 20/20 test images" in run.log()
    assert max(map(len, lines)) <= 80 and all(PROGRESS.match(line) for line in lines)

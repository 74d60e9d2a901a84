"""One step against plain PyTorch, what a bad loss does, GradScaler's skipped steps, and resuming in the middle."""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import CPU, PLUS, snapshot, take_steps, tiny_engine, tiny_spec

from cifar_hpc.data.datasets import Dataset
from cifar_hpc.errors import RunFailedError
from cifar_hpc.models.exact import ExactLayers
from cifar_hpc.tensorfile import digest
from cifar_hpc.training.distributed.shards import ShardLayout
from cifar_hpc.training.engine import Engine
from cifar_hpc.training.environment import resolve_amp

NO_AUGMENT = dict.fromkeys(
    ("crop_padding", "flip", "rotation", "brightness", "contrast", "saturation", "hue", "erasing"), 0
)
PLAIN: dict[str, dict[str, Any]] = {"augment": NO_AUGMENT, "model": {"dropout": 0}}
MEAN, STD = torch.tensor([0.4914, 0.4822, 0.4465]), torch.tensor([0.2470, 0.2435, 0.2616])


def state(engine: Engine) -> str:
    return digest({**engine.state(), "sums": engine.sums})


@pytest.mark.parametrize("shards", [1, 4])
def test_a_step_is_what_plain_pytorch_computes(shards: int) -> None:
    spec = tiny_spec(**PLAIN, train={"shards": shards}, optimizer={"weight_decay": 0.01})
    engine = tiny_engine(spec)
    model = copy.deepcopy(engine.model)
    exact = ExactLayers(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
    losses, correct = [], []
    for step in range(2):
        rows = torch.arange(32) + 32 * step
        images = (engine.data.train_images[rows].float() / 255 - MEAN[:, None, None]) / STD[:, None, None]
        labels = engine.data.train_labels[rows]
        optimizer.zero_grad()
        for part in range(shards):  # BatchNorm sees a shard at a time
            here = slice(part * 32 // shards, (part + 1) * 32 // shards)
            exact.set_update_statistics(part == 0)
            logits = model(images[here])
            exact.count_batches()
            loss = F.cross_entropy(logits, labels[here], label_smoothing=0.1, reduction="sum")
            (loss / 32).backward()
            losses.append(loss.item())
            correct.append(int((logits.argmax(1) == labels[here]).sum()))
        optimizer.step()
        take_steps(engine, step, step + 1)
    assert engine.sums[:, 0].sum().item() == pytest.approx(sum(losses), rel=1e-6)
    assert int(engine.sums[:, 1].sum()) == sum(correct)
    for (name, ours), (_, theirs) in zip(engine.model.state_dict().items(), model.state_dict().items(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, msg=name)


def test_lookahead_and_schedule_are_wired_in() -> None:
    spec = tiny_spec(lookahead={"k": 2, "alpha": 0.25}, schedule={"per": "step"}, optimizer={"lr": 0.2})
    engine = tiny_engine(spec)
    start = digest(dict(engine.model.named_parameters()))
    take_steps(engine, 0, 1)
    assert engine.optimizer.param_groups[0]["lr"] == 0.2
    assert digest(dict(engine.model.named_parameters())) != start
    take_steps(engine, 1, 2)
    assert engine.optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * (1 + math.cos(math.pi / 18)))
    assert [torch.equal(s, p) for s, p in zip(engine.optimizer.slow, engine.model.parameters(), strict=True)]  # type: ignore[union-attr]
    assert engine.updates == engine.optimizer.counter == 2  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("images", "batch", "shards", "steps", "used"),
    [(264, 32, 4, 9, 264), (259, 32, 4, 8, 256), (260, 32, 4, 9, 260), (20, 32, 4, 1, 20), (64, 32, 1, 2, 64)],
)
def test_the_last_incomplete_batch_is_used_where_every_shard_gets_an_image(
    images: int, batch: int, shards: int, steps: int, used: int
) -> None:
    spec = tiny_spec(data={"train_size": images}, train={"batch_size": batch, "shards": shards})
    engine = tiny_engine(spec)
    assert (engine.steps_per_epoch, engine.images_per_epoch) == (steps, used)


def test_the_loss_of_an_incomplete_batch_is_a_mean_over_its_own_images() -> None:
    engine = tiny_engine(tiny_spec(**PLAIN, train={"shards": 1}))
    model = copy.deepcopy(engine.model)
    engine.step(0, 0, 0, torch.arange(7))
    images = (engine.data.train_images[:7].float() / 255 - MEAN[:, None, None]) / STD[:, None, None]
    F.cross_entropy(model(images), engine.data.train_labels[:7], label_smoothing=0.1).backward()
    for ours, theirs in zip(engine.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)


def test_too_few_images_for_the_shards() -> None:
    with pytest.raises(RunFailedError, match="3 training images do not give each of the 4 shards one"):
        tiny_engine(tiny_spec(data={"train_size": 3}))


@pytest.mark.parametrize("amp", ["fp32", "bf16"])
def test_a_nan_loss_names_its_step(amp: str) -> None:
    engine = tiny_engine(tiny_spec(optimizer={"lr": 1e30}, train={"amp": amp}))
    engine.check_finite()
    take_steps(engine, 0, 5)
    with pytest.raises(RunFailedError, match=r"NaN or infinite at step (\d+).* epoch 1\b") as caught:
        engine.check_finite()
    first = int(engine.bad_step)
    assert f"step {first}" in str(caught.value)
    assert 2 <= first <= 5
    before = tiny_engine(tiny_spec(optimizer={"lr": 1e30}, train={"amp": amp}))
    take_steps(before, 0, first - 1)
    assert before.bad_loss() is None, "up to the named step all was well"


def test_an_overflow_under_fp16_counts_nothing_and_spoils_nothing() -> None:
    engine = tiny_engine(tiny_spec(train={"amp": "fp16"}, schedule={"per": "step"}))
    take_steps(engine, 0, 1)
    weights, slow = digest(dict(engine.model.named_parameters())), digest(engine.optimizer.state_dict()["slow"])
    updates = engine.updates
    engine.scaler.update(2.0**100)  # the next gradients overflow
    take_steps(engine, 1, 2)
    assert digest(dict(engine.model.named_parameters())) == weights
    assert digest(engine.optimizer.state_dict()["slow"]) == slow
    assert engine.updates == engine.optimizer.state_dict()["counter"] == updates
    assert engine.scaler.get_scale() == 2.0**99
    engine.check_finite()
    assert torch.isfinite(engine.epoch_sums()).all()


def test_nan_weights_under_fp16_do_not_go_on_for_ever() -> None:
    engine = tiny_engine(tiny_spec(train={"amp": "fp16"}))
    take_steps(engine, 0, 1)
    with torch.no_grad():
        next(engine.model.parameters()).fill_(math.nan)
    engine.scaler.update(2.0**-22)
    take_steps(engine, 1, 3)
    assert engine.bad_loss() is None, "so far they might be overflows"
    take_steps(engine, 3, 4)
    with pytest.raises(RunFailedError, match=r"overflow at every loss scale .*optimizer\.lr"):
        engine.check_finite()


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"train": {"amp": "bf16"}},
        {"train": {"amp": "fp16"}},
        {"lookahead": {"enabled": False}, "optimizer": {"nesterov": True}, "schedule": {"per": "step"}},
    ],
    ids=["fp32", "bf16", "fp16", "plain nesterov"],
)
def test_loading_in_the_middle_gives_the_same_bits(sections: dict[str, Any]) -> None:
    spec = tiny_spec(**sections)
    whole = tiny_engine(spec)
    take_steps(whole, 0, 3)
    saved = snapshot(whole)
    take_steps(whole, 3, 7)
    other = tiny_engine(spec)
    take_steps(other, 0, 1)  # what it held before does not matter
    torch.manual_seed(1234)
    other.load(saved)
    take_steps(other, 3, 7)
    assert state(other) == state(whole)


def test_two_engines_of_one_spec_are_one_and_seeds_differ() -> None:
    runs = []
    for seed in (0, 0, 1):
        engine = tiny_engine(tiny_spec(train={"seed": seed}))
        take_steps(engine, 0, 2)
        runs.append(state(engine))
    assert runs[0] == runs[1] != runs[2]


def test_the_place_in_the_batch_does_not_change_an_augmented_image() -> None:
    engine = tiny_engine(tiny_spec())
    rows = torch.tensor([5, 9, 200, 17])
    whole = engine.augmented(rows, 77)
    assert torch.equal(engine.augmented(rows[2:3], 77)[0], whole[2])
    assert not torch.equal(engine.augmented(rows, 78), whole)


@pytest.mark.parametrize("amp", ["bf16", "fp16", "fp32"])
def test_amp_is_taken_as_asked(amp: str) -> None:
    assert resolve_amp(tiny_spec(train={"amp": amp}), CPU) == amp


@pytest.mark.parametrize(
    ("amx", "avx512", "expected"), [(True, True, "bf16"), (False, True, "bf16"), (False, False, "fp32")]
)
def test_auto_is_bf16_where_the_cpu_has_instructions_for_it(
    monkeypatch: pytest.MonkeyPatch, amx: bool, avx512: bool, expected: str
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    assert resolve_amp(tiny_spec(train={"amp": "auto"}), CPU) == expected


def test_the_running_loss_of_the_log() -> None:
    engine = tiny_engine(tiny_spec())
    take_steps(engine, 0, 2)
    loss, accuracy = engine.loss_so_far(64)
    total, correct = engine.epoch_sums().sum(0).tolist()
    assert (loss, accuracy) == pytest.approx((total / 64, 100 * correct / 64))


def test_a_data_set_in_python_works_without_files() -> None:
    data = Dataset(torch.zeros(8, 3, 32, 32, dtype=torch.uint8), torch.arange(8), *([torch.zeros(0)] * 2))
    spec = tiny_spec(train={"shards": 1, "batch_size": 8})
    engine = Engine(spec, CPU, ShardLayout(1, 1, 0), data, "fp32")
    engine.step(0, 0, 0, torch.arange(8))
    assert math.isfinite(float(engine.sums[0, 0]))


@pytest.mark.parametrize(
    "without",
    [
        {"optimizer": PLUS["optimizer"] | {"nesterov": False}},
        {"optimizer": PLUS["optimizer"] | {"decay_all": True}},
        {"optimizer": PLUS["optimizer"] | {"bias_factor": 1}},
        {"schedule": PLUS["schedule"] | {"warmup_epochs": 0}},
        {"schedule": PLUS["schedule"] | {"name": "cosine"}},
        {"augment": PLUS["augment"] | {"trivial": False}},
        {"mixing": PLUS["mixing"] | {"mixup": 0}},
        {"mixing": PLUS["mixing"] | {"cutmix": 0}},
        {"resizing": {}},
    ],
    ids=["nesterov", "decay_all", "bias_factor", "warmup", "linear", "trivial", "mixup", "cutmix", "resizing"],
)
def test_each_part_of_our_recipes_counts(without: dict[str, Any]) -> None:
    """A key that training did not read would change nothing."""

    def trained(sections: dict[str, Any]) -> str:
        engine = tiny_engine(tiny_spec(**sections))
        take_steps(engine, 0, 7)  # warm-up takes five
        return digest(dict(engine.model.named_parameters()))

    assert trained(PLUS) == trained(PLUS) != trained(PLUS | without)


@pytest.mark.parametrize("shards", [1, 4])
def test_a_shards_images_are_aligned_wherever_they_stand(shards: int) -> None:
    """A library may choose its kernel by the alignment, which depends on the step at which a run was resumed."""
    engine = tiny_engine(tiny_spec(train={"shards": shards, "batch_size": 30}, data={"image_size": 30}))
    images = engine.data.train_images[:, :, :30, :30].contiguous()
    engine.data = dataclasses.replace(engine.data, train_images=images)
    places: list[int] = []
    engine.model.register_forward_pre_hook(lambda module, inputs: places.append(inputs[0].data_ptr() % 64))
    take_steps(engine, 0, 3)
    assert places == [0] * 3 * shards

"""Evaluation on the slow weights: right figures, nothing of the training state moved, the same for all ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import Ranks, take_steps, tiny_engine, tiny_spec

from cifar_hpc.data.augment.pipeline import normalize
from cifar_hpc.tensorfile import digest
from cifar_hpc.training import evaluation
from cifar_hpc.training.engine import Engine
from cifar_hpc.training.evaluation import Result, evaluate
from cifar_hpc.training.optim import Lookahead


def go_on(text: str) -> bool:
    return False


def trained(sections: dict[str, Any], rank: int = 0, world: int = 1) -> Engine:
    engine = tiny_engine(tiny_spec(**sections), rank, world)
    take_steps(engine, 0, 3)
    return engine


def state(engine: Engine) -> str:
    momenta = [n.momentum for n in engine.exact.norms]
    return digest({**engine.state(), "sums": engine.sums, "momenta": momenta})


def done(result: Result | None) -> Result:
    assert result is not None
    return result


@pytest.mark.parametrize("sections", [{}, {"lookahead": {"bn_batches": 0}}, {"lookahead": {"enabled": False}}])
def test_the_figures_are_those_of_a_plain_loop_and_nothing_moves(sections: dict[str, Any]) -> None:
    engine = trained(sections)
    before = state(engine)
    result = done(evaluate(engine, 0, go_on))
    assert state(engine) == before

    model, optimizer = engine.model, engine.optimizer
    if isinstance(optimizer, Lookahead):
        for parameter, slow in zip(model.parameters(), optimizer.slow, strict=True):
            parameter.data.copy_(slow)
    for name, buffer in model.named_buffers():
        buffer.copy_(result.buffers[name])
    model.eval()
    with torch.no_grad():
        logits = torch.cat([model(normalize(part, engine.data.info)) for part in engine.data.test_images.split(64)])
    labels = engine.data.test_labels
    assert result.loss == pytest.approx(F.cross_entropy(logits, labels, label_smoothing=0.1).item(), rel=1e-5)
    assert result.accuracy == pytest.approx(100 * (logits.argmax(1) == labels).float().mean().item())


def test_the_next_step_is_the_same_with_and_without_an_evaluation() -> None:
    one, two = trained({}), trained({})
    evaluate(one, 0, go_on)
    for engine in (one, two):
        take_steps(engine, 3, 4)
    assert state(one) == state(two)


def statistics(buffers: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {k: v for k, v in buffers.items() if "running" in k}


def test_statistics_are_measured_anew_under_the_slow_weights() -> None:
    engine = trained({})
    running = {k: v.clone() for k, v in engine.buffers().items()}
    measured = done(evaluate(engine, 0, go_on)).buffers
    assert all(not torch.equal(measured[k], running[k]) for k in statistics(running))
    kept = done(evaluate(trained({"lookahead": {"bn_batches": 0}}), 0, go_on)).buffers
    assert digest(statistics(kept)) == digest(statistics(running))
    plain = trained({"lookahead": {"enabled": False}})
    assert digest(done(evaluate(plain, 0, go_on)).buffers) == digest(plain.buffers())


@pytest.mark.parametrize(("shards", "sizes"), [(1, [32, 32, 32]), (4, [8] * 12), (5, [6, 6, 7, 6, 7] * 3)])
def test_measured_statistics_are_the_mean_over_shards(shards: int, sizes: list[int]) -> None:
    """The first BatchNorm's input is a convolution of the images, so its statistics can be computed by hand.

    No pass has more images than a shard, which is all that is known to fit into a GPU's memory.
    """
    engine = trained({"train": {"shards": shards}})
    seen: list[torch.Tensor] = []
    original = engine.augmented

    def augmented(indices: torch.Tensor, key: int) -> torch.Tensor:
        seen.append(original(indices, key))
        return seen[-1]

    engine.augmented = augmented  # type: ignore[method-assign]
    result = done(evaluate(engine, 0, go_on))
    assert [len(images) for images in seen] == sizes
    assert isinstance(engine.optimizer, Lookahead)
    outputs = [F.conv2d(images, engine.optimizer.slow[0], padding=1) for images in seen]
    mean = torch.stack([o.mean((0, 2, 3)) for o in outputs]).mean(0)
    variance = torch.stack([o.var((0, 2, 3)) for o in outputs]).mean(0)
    torch.testing.assert_close(result.buffers["stem.1.running_mean"], mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(result.buffers["stem.1.running_var"], variance, rtol=1e-4, atol=1e-5)


def test_the_last_incomplete_batch_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = trained({})  # 100 test images
    figures = []
    for size in (100, 64, 33, 1000):
        monkeypatch.setattr(evaluation, "_PIXELS", size * 32 * 32)
        result = done(evaluate(engine, 0, go_on))
        figures.append((round(result.loss, 4), result.accuracy))
    assert len(set(figures)) == 1
    engine.data.test_labels[99] = (engine.data.test_labels[99] + 1) % 10
    assert (round(done(evaluate(engine, 0, go_on)).loss, 4)) != figures[0][0]


@pytest.mark.parametrize("when", [1, 2, 4])
def test_it_can_be_left_between_batches_and_restores_all(when: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "_PIXELS", 40 * 32 * 32)
    engine = trained({})
    before, said = state(engine), []

    def stop(text: str) -> bool:
        said.append(text)
        return len(said) == when

    assert evaluate(engine, 0, stop) is None
    assert len(said) == when
    assert state(engine) == before


def test_an_error_in_the_middle_restores_all() -> None:
    engine = trained({})
    before, calls = state(engine), []

    def fail(text: str) -> bool:
        calls.append(text)
        raise KeyError

    with pytest.raises(KeyError):
        evaluate(engine, 0, fail)
    assert calls
    assert state(engine) == before


def evaluated(rank: int, world: int, sections: dict[str, Any]) -> tuple[float, float, str]:
    evaluation._PIXELS = 30 * 32 * 32  # four batches, the last of 10 images
    result = done(evaluate(trained(sections, rank, world), 0, go_on))
    return result.loss, result.accuracy, digest(result.buffers)


@pytest.mark.parametrize(
    "sections", [{}, {"lookahead": {"bn_batches": 0}}, {"lookahead": {"enabled": False}}], ids=["slow", "kept", "plain"]
)
def test_the_figures_have_the_same_bits_for_every_number_of_ranks(ranks: Ranks, sections: dict[str, Any]) -> None:
    alone = ranks.run(1, evaluated, sections, group=False)
    for world in (2, 3, 4):
        assert ranks.run(world, evaluated, sections) == alone * world


@pytest.mark.parametrize(("size", "count"), [(16, 500), (32, 500), (48, 222), (224, 10), (1024, 1)])
def test_a_batch_of_large_images_is_smaller(size: int, count: int) -> None:
    assert evaluation.evaluation_batch(size) == count

"""The average of the weights against its definition; in the engine, the evaluation and a checkpoint."""

from __future__ import annotations

import pytest
import torch
from helpers import snapshot, take_steps, tiny_engine, tiny_spec
from torch import Tensor

from cifar_hpc.tensorfile import digest
from cifar_hpc.training.engine import Engine
from cifar_hpc.training.evaluation import evaluate
from cifar_hpc.training.optim import WeightAverage


def weights(value: float) -> list[Tensor]:
    return [torch.full((2, 3), value), torch.full((4,), -value)]


def set_to(parameters: list[Tensor], value: float) -> None:
    for parameter, new in zip(parameters, weights(value), strict=True):
        parameter.copy_(new)


def test_it_begins_as_a_copy() -> None:
    parameters = weights(1.0)
    average = WeightAverage(parameters, 0.9)
    set_to(parameters, 5.0)
    assert all(torch.equal(a, b) for a, b in zip(average.average, weights(1.0), strict=True))


def test_its_definition() -> None:
    """By hand in Python's floats: after update n a share of min(decay, (1 + n) / (10 + n)) is kept."""
    parameters = weights(1.0)
    average, expected = WeightAverage(parameters, 0.5), 1.0
    for number, value in enumerate([3.0, -2.0, 7.0, 0.5, 4.0, 1.0, 2.0, 9.0, 8.0, 5.0], start=1):
        set_to(parameters, value)
        average.set_weight(number)
        average.update()
        kept = min(0.5, (1 + number) / (10 + number))
        expected = kept * expected + (1 - kept) * value
        assert average.average[0][1, 2].item() == pytest.approx(expected, rel=1e-6)
        assert average.average[1][0].item() == pytest.approx(-expected, rel=1e-6)
    assert kept == 0.5  # both sides of the minimum were met


def test_within_the_context_the_parameters_hold_it() -> None:
    parameters = weights(1.0)
    average = WeightAverage(parameters, 0.9)
    set_to(parameters, 2.0)
    with pytest.raises(KeyError), average.averaged_weights():
        assert torch.equal(parameters[0], weights(1.0)[0])
        raise KeyError
    assert torch.equal(parameters[0], weights(2.0)[0])


def test_shapes_that_do_not_fit_are_refused() -> None:
    average = WeightAverage(weights(1.0), 0.9)
    with pytest.raises(ValueError, match="shapes"):
        average.load(weights(2.0)[:1])
    assert torch.equal(average.average[0], weights(1.0)[0])


@pytest.mark.parametrize("decay", [0.0, 1.0, -1.0])
def test_an_impossible_decay(decay: float) -> None:
    with pytest.raises(ValueError, match="decay"):
        WeightAverage(weights(1.0), decay)


def engine_with_average(amp: str = "fp32") -> Engine:
    return tiny_engine(tiny_spec(ema={"decay": 0.9}, train={"amp": amp}))


def run(engine: Engine, steps: range) -> None:
    take_steps(engine, steps.start, steps.stop)


def test_a_checkpoint_holds_it_and_a_resumed_run_has_the_same_bits() -> None:
    whole, first, second = engine_with_average(), engine_with_average(), engine_with_average()
    run(whole, range(6))
    run(first, range(3))
    second.load(snapshot(first))
    run(second, range(3, 6))
    assert snapshot(second).digests() == snapshot(whole).digests()
    assert None not in snapshot(whole).digests().values()
    assert digest(whole.state()["average"]) != digest(list(whole.model.parameters()))


def test_an_update_that_is_skipped_under_fp16_does_not_count() -> None:
    engine = engine_with_average("fp16")
    run(engine, range(1))
    before = digest(engine.state()["average"])
    engine.scaler.update(2.0**100)  # the next gradients overflow
    run(engine, range(1, 2))
    assert digest(engine.state()["average"]) == before
    run(engine, range(2, 3))
    engine.scaler.update(1.0)
    run(engine, range(3, 4))
    assert digest(engine.state()["average"]) != before


def test_the_average_is_evaluated_with_statistics_of_its_own() -> None:
    engine = engine_with_average()
    run(engine, range(6))
    fast = digest(list(engine.model.parameters()))
    result = evaluate(engine, 0, lambda text: False)
    assert result is not None
    assert digest(list(engine.model.parameters())) == fast
    plain = tiny_engine(tiny_spec(lookahead={"enabled": False}))
    with torch.no_grad():
        for mine, averaged in zip(plain.model.parameters(), engine.state()["average"], strict=True):
            mine.copy_(averaged)
        for name, buffer in plain.model.named_buffers():
            buffer.copy_(result.buffers[name])
    again = evaluate(plain, 0, lambda text: False)
    assert again is not None
    assert (again.loss, again.accuracy) == (result.loss, result.accuracy)
    assert digest(result.buffers) != digest(engine.buffers())

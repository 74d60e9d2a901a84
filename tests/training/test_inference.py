"""A model over many images: every image once, in the trainer's batches."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from helpers import INFO

from cifar_hpc.training import trained_model as inference
from cifar_hpc.training.trained_model import TrainedModel, batches


class Identity:
    info = INFO

    def logits(self, images: torch.Tensor) -> torch.Tensor:
        return images


def run(count: int) -> list[tuple[int, list[int]]]:
    numbers = torch.arange(count)
    made = batches(cast(TrainedModel, Identity()), lambda first, last: numbers[first:last], count, "predicting")
    return [(first, logits.tolist()) for first, logits in made]


def test_every_image_comes_once(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    count = 1001
    made = run(count)
    assert [first for first, _ in made] == [0, 500, 1000]
    assert [number for _, part in made for number in part] == list(range(count))
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(inference, "SAY_SECONDS", 0.0)
    run(count)
    out, error = capsys.readouterr()
    assert out == "" and error.splitlines()[-1] == "predicting: 1,001 of 1,001 images"

"""The card of an exported model: its curve, and text of unknown origin in it."""

from __future__ import annotations

import json
from typing import Any

from cifar_hpc.cli.export import model_card, sparkline

CARD = {
    "run": "run",
    "checkpoint": "step_00000018.pt",
    "step": "18",
    "epoch": "2",
    "epochs": "2",
    "weights": "slow",
    "test_accuracy": "95.125",
    "test_loss": "0.25",
    "label_smoothing": "0.1",
    "data": "CIFAR-10's test images",
    "parameters": "4903082",
    "classes": json.dumps(["cat", "a|b`c\n# d"] + ["x"] * 8),
    "image_size": "32",
    "network": "improved_resnet:ImprovedResNet",
    "code": "0011",
    "mean": "[0.5]",
    "std": "[0.2]",
    "spec": json.dumps({"model": {"blocks": [3, 3, 3]}}),
    "cifar_hpc": "0.1.0",
    "torch": "2.12",
    "python": "3.11",
    "trained_on": "H100",
    "checkpoint_digest": "00ff",
    "weights_sha256": "ff00",
}


def row(epoch: int, **other: Any) -> dict[str, Any]:
    figures = {"train_loss": 1.0, "train_accuracy": 50.0, "test_loss": 1.5, "test_accuracy": 10.0 + epoch}
    return {"epoch": epoch, **figures, **other}


def test_the_curve_has_at_most_ten_rows_with_the_first_and_the_last() -> None:
    text = model_card("m.safetensors", "abc", CARD, [row(epoch) for epoch in range(1, 401)])
    table = [line for line in text.splitlines() if line.endswith("%** |") or line.count("|") == 6][2:]
    assert [line.split()[1] for line in table] == ["1", "45", "90", "134", "178", "223", "267", "311", "356", "400"]
    assert "Test accuracy from epoch 1 to 400: `▁" in text and "| test accuracy | 95.12% |" in text
    assert "4,903,082 parameters" in text and "blocks: [3, 3, 3]" in text


def test_rows_that_are_none_are_left_out() -> None:
    rows = [row(1), {"epoch": 2}, row(3, test_loss="x"), row(4)]
    assert "from epoch 1 to 4" in model_card("m.safetensors", "abc", CARD, rows)
    assert "## Curve" not in model_card("m.safetensors", "abc", CARD, [{}])


def test_names_cannot_break_the_table() -> None:
    text = model_card("m.safetensors", "abc", CARD, [])
    assert "| classes 0 to 9 | cat, a\\|b\\`c \\# d, x," in text
    assert "\n# d" not in text


def test_what_was_not_measured_is_not_claimed() -> None:
    card = {key: value for key, value in CARD.items() if not key.startswith("test_")}
    text = model_card("m.safetensors", "abc", card, [])
    assert "| test accuracy | not measured |" in text and "not measured: the run measures other weights" in text


def test_figures_of_held_out_images_are_not_called_test_figures() -> None:
    card = CARD | {"spec": json.dumps({"data": {"holdout": 100}}), "data": "100 of them, held out; not the test images"}
    text = model_card("m.safetensors", "abc", card, [row(1)])
    assert "| held-out accuracy | 95.12% |" in text and "| held-out loss | 0.2500" in text
    assert "Held-out accuracy from epoch 1" in text and "| held-out loss | held-out accuracy |" in text
    assert "test accuracy" not in text.lower() and "test loss" not in text


def test_bars_go_from_the_least_to_the_largest() -> None:
    assert sparkline([1, 2, 8]) == "▁▂█"
    assert sparkline([5, 5]) == "▁▁"
    assert len(sparkline(list(range(1000)))) == 60


def test_a_users_network_is_named_with_what_it_needs() -> None:
    own = {**CARD, "network": "mine:Net|", "image_size": "48", "classes": '["a", "b"]'}
    text = model_card("m.safetensors", "abc", own, [])
    assert "The network mine:Net\\|, for images of 48x48 pixels" in text and "[B, 2]" in text
    assert "`model.py` and the folder `model_code/0011`" in text and "torch.zeros(1, 3, 48, 48" in text
    text = model_card("m.safetensors", "abc", {**own, "network": "torchvision.models:resnet18", "code": ""}, [])
    assert "`model.py` and torchvision;" in text

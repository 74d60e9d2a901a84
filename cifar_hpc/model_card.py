"""The card that lies beside an exported model: what it is, how good, where it comes from, how to load it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from cifar_hpc.printable import printable
from cifar_hpc.yaml_text import Dumper

WRITTEN_BY = "Written by `python -m cifar_hpc export`"
_BARS = "▁▂▃▄▅▆▇█"
_CURVE_ROWS = 10
_LOAD = """\
import json, torch
from cifar_hpc.model import ImprovedResNet
from cifar_hpc.spec import ModelSpec
from safetensors import safe_open

file = safe_open({file}, "pt")
card = file.metadata()
model = ImprovedResNet(ModelSpec(**json.loads(card["model"]))).to(memory_format=torch.channels_last).eval()
model.load_state_dict({{name: file.get_tensor(name) for name in file.keys()}})
mean, std = (torch.tensor(json.loads(card[key])).view(3, 1, 1) for key in ("mean", "std"))

images = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)  # yours: RGB, 0 to 255
with torch.no_grad():
    logits = model((images / 255 - mean) / std)
print(json.loads(card["classes"])[logits[0].argmax()])
"""


def model_card(file: str, sha256: str, card: Mapping[str, str], rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown.

    Args:
        file: the exported file's name, and its sha256.
        card: its metadata.
        rows: of metrics.jsonl, up to the exported model.
    """
    title = card.get("run") or file
    accuracy = f"{float(card['test_accuracy']):.2f}%" if "test_accuracy" in card else "not measured"
    kind = _evaluation(card)
    classes = ", ".join(_plain(name) for name in json.loads(card["classes"]))
    parts = [
        f"# {_plain(title)}",
        f"{WRITTEN_BY} (cifar_hpc {card['cifar_hpc']}); exporting again replaces it.\n",
        f"ImprovedResNet, a bottleneck ResNet for images of 32x32 pixels: {int(card['parameters']):,} parameters, "
        f"{card['weights']} weights after epoch {card['epoch']} of {card['epochs']} (step {card['step']}).\n",
        "| | |\n|---|---|",
        f"| {kind} accuracy | {accuracy} |",
        f"| {kind} loss | {_loss(card)} |",
        f"| measured on | {_plain(card['data'])} |",
        f"| classes 0 to 9 | {classes} |",
        f"| input | [B, 3, 32, 32], RGB in 0 to 1, less {card['mean']}, over {card['std']} |",
        "| output | logits [B, 10] |\n",
        "## Load it",
        "Needs torch, safetensors, pyyaml and the folder `cifar_hpc`, of which nothing is loaded that trains.\n",
        f"```python\n{_LOAD.format(file=json.dumps(file))}```\n",
        *_curve(rows, kind),
        "## Spec",
        f"```yaml\n{_spec(card['spec'])}```\n",
        "## Where it comes from",
        "| | |\n|---|---|",
        f"| checkpoint | {_plain(card['checkpoint'])} |",
        *(f"| {key.replace('_', ' ')} | `{card[key]}` |" for key in ("checkpoint_digest", "weights_sha256")),
        f"| sha256 of {_plain(file)} | `{sha256}` |",
        f"| trained on | {_plain(card['trained_on'])} |",
        f"| versions | cifar_hpc {card['cifar_hpc']}, torch {_plain(card['torch'])}, python {card['python']} |",
    ]
    return "\n".join(parts) + "\n"


def _evaluation(card: Mapping[str, str]) -> str:
    """What the run's figures are called: those of images held out of the training images are no test figures."""
    data = json.loads(card["spec"]).get("data", {})
    return "test" if data.get("holdout") is None else "held-out"


def _loss(card: Mapping[str, str]) -> str:
    if "test_loss" not in card:
        return "not measured: the run measures other weights, or has not come to an epoch's end"
    return f"{float(card['test_loss']):.4f} (label smoothing {card['label_smoothing']})"


def _plain(text: str) -> str:
    """Text of unknown origin as words of one line that markdown takes as they are."""
    words = " ".join(printable(text).split())
    return "".join(f"\\{character}" if character in "\\`*_[]<>|#" else character for character in words)


def _spec(text: str) -> str:
    values: str = yaml.dump(json.loads(text), Dumper=Dumper, sort_keys=False, default_flow_style=None, width=100)
    return values.replace("```", "'''")


def _curve(rows: Sequence[Mapping[str, Any]], kind: str) -> list[str]:
    """The accuracy of the run's evaluations over the epochs: a line of bars, and a table of up to ten epochs."""
    keys = ("train_loss", "train_accuracy", "test_loss", "test_accuracy")
    good = [row for row in rows if all(isinstance(row.get(key), (int, float)) for key in ("epoch", *keys))]
    if not good:
        return []
    number = min(_CURVE_ROWS, len(good))
    chosen = sorted({round(index * (len(good) - 1) / max(1, number - 1)) for index in range(number)})
    lines = [
        "## Curve",
        f"{kind.capitalize()} accuracy from epoch {good[0]['epoch']} to {good[-1]['epoch']}: "
        f"`{sparkline([row['test_accuracy'] for row in good])}`\n",
        f"| epoch | train loss | train accuracy | {kind} loss | {kind} accuracy |",
        "|---:|---:|---:|---:|---:|",
    ]
    for row in (good[index] for index in chosen):
        lines.append(
            f"| {row['epoch']} | {row['train_loss']:.4f} | {row['train_accuracy']:.2f}% | {row['test_loss']:.4f} "
            f"| {row['test_accuracy']:.2f}% |"
        )
    return [*lines, ""]


def sparkline(values: Sequence[float], width: int = 60) -> str:
    """Up to `width` bars, each the mean of its part of `values`, from the least to the largest of them."""
    width = min(width, len(values))
    parts = [values[len(values) * n // width : len(values) * (n + 1) // width] for n in range(width)]
    means = [sum(part) / len(part) for part in parts]
    low, span = min(means), max(means) - min(means)
    return "".join(_BARS[round((len(_BARS) - 1) * (mean - low) / span) if span else 0] for mean in means)

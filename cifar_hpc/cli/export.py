"""python -m cifar_hpc export: a run's model as safetensors, with a card that says how to load it."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import yaml
from torch import Tensor

from cifar_hpc import __version__
from cifar_hpc.cli.terminal import output_file
from cifar_hpc.config.io import NOT_IN_NAME
from cifar_hpc.config.spec import DataSpec
from cifar_hpc.config.yaml_loader import Dumper
from cifar_hpc.data.augment.color import CIFAR10_MEAN, CIFAR10_STD
from cifar_hpc.data.datasets import class_names
from cifar_hpc.errors import SpecError
from cifar_hpc.files import read_regular, write_atomic
from cifar_hpc.runs.paths import project_root
from cifar_hpc.text import printable
from cifar_hpc.training.trained_model import TrainedModel, load_trained, noted

WRITTEN_BY = "Written by `python -m cifar_hpc export`"
_BARS = "▁▂▃▄▅▆▇█"
_CURVE_ROWS = 10
_LOAD = """\
import json, torch
from cifar_hpc.models.improved_resnet import ImprovedResNet
from cifar_hpc.config.spec import ModelSpec
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


SUFFIX = ".safetensors"


def export(run: str, out: str, weights: str) -> int:
    """Write a run's model to `out` and its card beside it, as .md. The same checkpoint gives the same bytes.

    Raises:
        UserError: names the run or the file that is not what it should be.
    """
    root, path = project_root(), output_file(out, SUFFIX)
    card_path = output_file(str(path.with_suffix(".md")))
    _check_card(card_path)
    trained = load_trained(root, run, weights)
    tensors = {name: tensor.cpu().contiguous() for name, tensor in trained.model.state_dict().items()}
    card = metadata(trained, tensors, class_names(trained.spec.data, root))
    content = to_safetensors(tensors, card)
    sha256 = hashlib.sha256(content).hexdigest()
    rows = [row for row in trained.state.rows if isinstance(row, dict)]
    text = model_card(path.name, sha256, card, rows).encode()
    card_path.unlink(missing_ok=True)  # whatever happens between the two: no card is better than another model's
    write_atomic(path, content)
    write_atomic(card_path, text)

    facts = trained.facts(root)
    del facts["computed"]
    measured = "test_accuracy" in card
    facts["accuracy"] = f"{float(card['test_accuracy']):.2f}% on {card['data']}" if measured else "not measured"
    facts["parameters"] = f"{int(card['parameters']):,}"
    facts["sha256"] = sha256
    lines = [f"{key:11} {value}" for key, value in facts.items()]
    written = [f"wrote {path} ({len(content):,} bytes)", f"wrote {card_path}, which says how to load it"]
    print(printable("\n".join([*lines, *noted(trained.notes), *written])))
    return 0


def metadata(trained: TrainedModel, tensors: Mapping[str, Tensor], classes: tuple[str, ...]) -> dict[str, str]:
    """What the file says of itself. All values are text; lists and the spec are JSON.

    test_accuracy and test_loss are there only where the run has measured exactly these weights.
    """
    state, spec, environment = trained.state, trained.spec, trained.state.environment
    plain = state.spec
    measured = {}
    for key in ("test_accuracy", "test_loss"):
        if trained.logged is not None and isinstance(trained.logged.get(key), (int, float)):
            measured[key] = repr(trained.logged[key])
    return {
        "format": "pt",
        **({"run": trained.run} if trained.run else {}),
        "checkpoint": trained.path.name,
        "step": str(state.step),
        "epoch": str(state.epoch),
        "epochs": str(spec.train.epochs),
        "weights": trained.weights,
        **measured,
        "label_smoothing": f"{spec.train.label_smoothing:g}",
        "data": _measured_on(spec.data),
        "parameters": str(sum(p.numel() for p in trained.model.parameters())),
        "classes": json.dumps(classes),
        "mean": json.dumps(CIFAR10_MEAN),
        "std": json.dumps(CIFAR10_STD),
        "model": json.dumps(plain["model"]),
        "spec": json.dumps(_what_decides(plain)),
        "cifar_hpc": __version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "trained_on": f"{environment['device']}, {environment['amp']}, torch {environment['torch']}",
        "checkpoint_digest": state.digest,
        "weights_sha256": str(state.digests()[f"{trained.weights}_weights"]),
    }


def _measured_on(data: DataSpec) -> str:
    """The images of the run's own evaluation, in words."""
    test = data.holdout is None
    kind, size = ("test", data.test_size) if test else ("training", data.train_size)
    folder = f"{Path(data.root).name}/{'test' if test else 'train'}"
    images = {"cifar10": f"CIFAR-10's {kind} images", "folder": folder}.get(data.source, f"the synthetic {kind} images")
    words = images if size is None else f"{size:,} of {images}"
    return words if test else f"{data.holdout:,} of {words}, held out; not the test images"


def _what_decides(spec: Mapping[str, Any]) -> dict[str, Any]:
    """The spec without what does not change the model, such as accounts and folders: that is nobody else's concern."""
    sections: dict[str, Any] = json.loads(json.dumps(spec))
    for key in NOT_IN_NAME:
        section, _, name = key.partition(".")
        if name:
            sections.get(section, {}).pop(name, None)
        else:
            sections.pop(section, None)
    return sections


def to_safetensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """The bytes of a safetensors file, the same for the same content: the library puts metadata in any order.

    The layout: eight bytes for the header's length, the header as JSON, padded with spaces to a multiple of eight, and
    the tensors (https://github.com/huggingface/safetensors#format).
    """
    content = safetensors.torch.save(dict(tensors), dict(metadata))
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8:end]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + content[end:]


def _check_card(path: Path) -> None:
    """A file of that name that is no card, such as README.md, is not to be lost."""
    if path.exists() and WRITTEN_BY.encode() not in read_regular(path)[:1000]:
        raise SpecError(f"--out: {path}, where the card would go, is there already and is no card. HINT: another name.")

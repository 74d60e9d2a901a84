"""python -m cifar_hpc export: a run's model as safetensors, with a card that says how to load it.

Writes the weights as safetensors, which hold tensors and text and no code,
with spec, accuracy and versions in the metadata. Beside it: a .py file that
loads them with torch alone, anywhere and without this project, and a model
card.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from cifar_hpc import __version__
from cifar_hpc.cli.parser import add_model_arguments
from cifar_hpc.cli.terminal import output_file
from cifar_hpc.config import user_code
from cifar_hpc.config.io import NOT_IN_NAME, covered
from cifar_hpc.config.spec import BUILT_IN, DataSpec
from cifar_hpc.config.yaml_loader import Dumper
from cifar_hpc.data.sources import source_of
from cifar_hpc.errors import SpecError
from cifar_hpc.files import read_regular, write_atomic
from cifar_hpc.runs.paths import PACKAGE, project_root
from cifar_hpc.text import in_markdown

if TYPE_CHECKING:
    from torch import Tensor

    from cifar_hpc.training.trained_model import TrainedModel

EXAMPLES = ("improved_resnet-1a2b3c4d --out model.safetensors",)

WRITTEN_BY = "Written by `python -m cifar_hpc export`"
STANDALONE_MARK = "without the project that trained them"
_BARS = "▁▂▃▄▅▆▇█"
_CURVE_ROWS = 10
STANDALONE = PACKAGE / "models" / "standalone.py"
_LOAD = """\
import torch
from model import load

model = load({file})  # an nn.Module in evaluation mode; model.card has the metadata

images = torch.zeros(1, 3, {size}, {size}, dtype=torch.uint8)  # yours: RGB, 0 to 255
with torch.no_grad():
    logits = model(images)
print(model.classes[logits[0].argmax()])
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--out", metavar="FILE.safetensors", required=True, help="the file; the card lies beside it")


def main(arguments: argparse.Namespace) -> int:
    """Write a run's model, and its card beside it, as .md. The same checkpoint gives the same bytes.

    Raises:
        UserError: names the run or the file that is wrong.
    """
    from cifar_hpc.models.network import imported
    from cifar_hpc.training.trained_model import load_trained, summary

    root, path = project_root(), output_file(arguments.out, ".safetensors")
    card_path = output_file(str(path.with_suffix(".md")))
    code_path = output_file(str(path.with_name("model.py")))
    for other, mark, what in ((card_path, WRITTEN_BY, "card"), (code_path, STANDALONE_MARK, "code")):
        if other.exists() and mark.encode() not in read_regular(other)[:1000]:  # such as a README.md
            problem = f"{other}, where the {what} would go, is there already and is no {what}"
            raise SpecError(f"--out: {problem}. HINT: another name.")
    trained = load_trained(root, arguments.run, arguments.weights)
    parts = dict([*trained.model.named_parameters(), *trained.model.named_buffers()])  # those that modules share once
    kept = trained.model.state_dict()
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in parts.items() if name in kept}
    network, files = imported(trained.spec.model, trained.info, trained.code)
    card = metadata(trained) | network
    content = to_safetensors(tensors, card)
    sha256 = hashlib.sha256(content).hexdigest()
    text = model_card(path.name, sha256, card, trained.state.rows).encode()
    card_path.unlink(missing_ok=True)  # whatever happens between the two: no card is better than another model's
    write_atomic(path, content)
    write_atomic(code_path, STANDALONE.read_bytes())
    user_code.write(files, path.parent / "model_code")
    write_atomic(card_path, text)

    accuracy = f"{float(card['test_accuracy']):.2f}% on {card['data']}" if "test_accuracy" in card else "not measured"
    parameters = f"{int(card['parameters']):,}"
    facts = trained.facts(root) | {"accuracy": accuracy, "parameters": parameters, "sha256": sha256}
    del facts["computed"]
    written = [
        f"wrote {path} ({len(content):,} bytes)",
        f"wrote {code_path}, which loads them with torch alone",
        *([f"wrote {code_path.parent / 'model_code' / network['code']}, the network's code"] if files else []),
        f"wrote {card_path}, which says how",
    ]
    print(summary(facts, [], trained.notes, written))
    return 0


def model_card(file: str, sha256: str, card: Mapping[str, str], rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown.

    Args:
        file: the exported file's name, and its sha256.
        card: its metadata.
        rows: of metrics.jsonl, up to the exported model.
    """
    name, spec = in_markdown(file), json.loads(card["spec"])
    # Figures of images held out of the training images are no test figures.
    kind = "test" if spec.get("data", {}).get("holdout") is None else "held-out"
    accuracy = "not measured"
    loss = "not measured: the run measures other weights, or has not come to an epoch's end"
    if "test_accuracy" in card:
        accuracy = f"{float(card['test_accuracy']):.2f}%"
        loss = f"{float(card['test_loss']):.4f} (label smoothing {card['label_smoothing']})"
    spec_yaml = yaml.dump(spec, Dumper=Dumper, sort_keys=False, default_flow_style=None, width=100)
    size, classes, network = card["image_size"], len(json.loads(card["classes"])), card["network"]
    words = "ImprovedResNet, a bottleneck ResNet" if network == BUILT_IN else f"The network {in_markdown(network)}"
    code = f" and the folder `model_code/{card['code']}`" if card["code"] else " and torchvision"
    needs = f"{name}, `model.py`{code}"
    parts = [
        f"# {in_markdown(card['run']) if 'run' in card else name}",
        f"{WRITTEN_BY} (cifar_hpc {card['cifar_hpc']}); exporting again replaces it.\n",
        f"{words}, for images of {size}x{size} pixels: {int(card['parameters']):,} parameters, "
        f"{card['weights']} weights after epoch {card['epoch']} of {card['epochs']} (step {card['step']}).\n",
        "| | |\n|---|---|",
        f"| {kind} accuracy | {accuracy} |",
        f"| {kind} loss | {loss} |",
        *([f"| measured on | {in_markdown(card['data'])} |"] if "test_accuracy" in card else []),
        f"| classes 0 to {classes - 1} | {', '.join(in_markdown(label) for label in json.loads(card['classes']))} |",
        f"| input | [B, 3, {size}, {size}], RGB in 0 to 1, less {card['mean']}, over {card['std']} |",
        f"| output | logits [B, {classes}] |\n",
        "## Load it",
        f"Needs torch, {needs}; `python model.py image.png` says the class of an image.\n",
        f"```python\n{_LOAD.format(file=json.dumps(file), size=size)}```\n",
        *_curve(rows, kind),
        "## Spec",
        "```yaml\n" + spec_yaml.replace("```", "'''") + "```\n",
        "## Where it comes from",
        "| | |\n|---|---|",
        f"| checkpoint | {in_markdown(card['checkpoint'])} |",
        f"| checkpoint digest | `{card['checkpoint_digest']}` |",
        f"| weights sha256 | `{card['weights_sha256']}` |",
        f"| sha256 of {name} | `{sha256}` |",
        f"| trained on | {in_markdown(card['trained_on'])} |",
        f"| versions | cifar_hpc {card['cifar_hpc']}, torch {in_markdown(card['torch'])}, python {card['python']} |",
    ]
    return "\n".join(parts) + "\n"


def _curve(rows: Sequence[Mapping[str, Any]], kind: str) -> list[str]:
    """The accuracy of the run's evaluations over the epochs: a line of bars, and a table of up to ten epochs."""
    keys = ("epoch", "train_loss", "train_accuracy", "test_loss", "test_accuracy")
    good = [row for row in rows if all(isinstance(row.get(key), (int, float)) for key in keys)]
    if not good:
        return []
    chosen = sorted({round(number * (len(good) - 1) / (_CURVE_ROWS - 1)) for number in range(_CURVE_ROWS)})
    form = "| {epoch} | {train_loss:.4f} | {train_accuracy:.2f}% | {test_loss:.4f} | {test_accuracy:.2f}% |"
    return [
        "## Curve",
        f"{kind.capitalize()} accuracy from epoch {good[0]['epoch']} to {good[-1]['epoch']}: "
        f"`{sparkline([row['test_accuracy'] for row in good])}`\n",
        f"| epoch | train loss | train accuracy | {kind} loss | {kind} accuracy |",
        "|---:|---:|---:|---:|---:|",
        *(form.format_map(good[index]) for index in chosen),
        "",
    ]


def sparkline(values: Sequence[float], width: int = 60) -> str:
    """Up to `width` bars, each the mean of its part of `values`, from the least to the largest of them."""
    width = min(width, len(values))
    parts = [values[len(values) * n // width : len(values) * (n + 1) // width] for n in range(width)]
    means = [sum(part) / len(part) for part in parts]
    low, span = min(means), max(means) - min(means)
    return "".join(_BARS[round((len(_BARS) - 1) * (mean - low) / span) if span else 0] for mean in means)


def metadata(trained: TrainedModel) -> dict[str, str]:
    """The file's metadata. All values are text; lists and the spec are JSON.

    test_accuracy and test_loss are there only where the run has measured exactly these weights.
    """
    import torch

    state, spec, info, environment = trained.state, trained.spec, trained.info, trained.state.environment
    logged = trained.logged or {}
    # Without what does not change the model, such as accounts and folders, which stay private.
    public = {
        section: {key: value for key, value in values.items() if not covered(f"{section}.{key}", NOT_IN_NAME)}
        for section, values in state.spec.items()
        if section not in NOT_IN_NAME
    }
    return {
        "format": "pt",
        **({"run": trained.run} if trained.run else {}),
        "checkpoint": trained.path.name,
        "step": str(state.step),
        "epoch": str(state.epoch),
        "epochs": str(spec.train.epochs),
        "weights": trained.weights,
        **{key: repr(logged[key]) for key in ("test_accuracy", "test_loss") if key in logged},
        "label_smoothing": f"{spec.train.label_smoothing:g}",
        "data": _measured_on(spec.data),
        "parameters": str(sum(p.numel() for p in trained.model.parameters())),
        "classes": json.dumps(info.classes),
        "image_size": str(info.image_size),
        "mean": json.dumps(info.mean),
        "std": json.dumps(info.std),
        "model": json.dumps(public["model"]),
        "spec": json.dumps(public),
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
    images = source_of(data).words(data, Path(), kind)
    words = images if size is None else f"{size:,} of {images}"
    return words if test else f"{data.holdout:,} of {words}, held out; not the test images"


def to_safetensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """The bytes of a safetensors file, the same for the same content: the library puts metadata in any order.

    The layout: eight bytes for the header's length, the header as JSON, padded with spaces to a multiple of eight, and
    the tensors (https://github.com/huggingface/safetensors#format).
    """
    import safetensors.torch

    content = safetensors.torch.save(dict(tensors), dict(metadata))
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8:end]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + content[end:]

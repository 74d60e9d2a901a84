"""python -m cifar_hpc export: a run's model as safetensors, with a card beside it."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from cifar_hpc import __version__, checkpoint
from cifar_hpc.augment import CIFAR10_MEAN, CIFAR10_STD
from cifar_hpc.class_names import class_names
from cifar_hpc.errors import SpecError
from cifar_hpc.jsonfile import read_regular, write_atomic
from cifar_hpc.model_card import WRITTEN_BY, model_card
from cifar_hpc.output_path import output_file
from cifar_hpc.paths import project_root
from cifar_hpc.printable import printable
from cifar_hpc.spec import DataSpec
from cifar_hpc.spec_io import NOT_IN_NAME
from cifar_hpc.trained_model import TrainedModel, load_trained, noted

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
    rows = [row for row in checkpoint.history(trained.state) if isinstance(row, dict)]
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
    state, spec, environment = trained.state, trained.spec, trained.state["environment"]
    plain = state["spec"]
    measured = {}
    for key in ("test_accuracy", "test_loss"):
        if trained.logged is not None and isinstance(trained.logged.get(key), (int, float)):
            measured[key] = repr(trained.logged[key])
    return {
        "format": "pt",
        **({"run": trained.run} if trained.run else {}),
        "checkpoint": trained.path.name,
        "step": str(state["step"]),
        "epoch": str(state["epoch"]),
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
        "checkpoint_digest": state["digest"],
        "weights_sha256": str(checkpoint.sums(state)[f"{trained.weights}_weights"]),
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

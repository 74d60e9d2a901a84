"""python -m cifar_hpc export: what is written is the model, and the card's own lines load it in a fresh process."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import build_model
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import cifar_hpc
from cifar_hpc.__main__ import main
from cifar_hpc.cli import export as export_command
from cifar_hpc.cli.export import metadata
from cifar_hpc.config.spec import DataSpec, ModelSpec
from cifar_hpc.data.datasets import own_images
from cifar_hpc.data.synthetic import CLASSES
from cifar_hpc.errors import SpecError
from cifar_hpc.models import standalone
from cifar_hpc.training.checkpoints.format import read_checkpoint
from cifar_hpc.training.trained_model import load_trained


@pytest.fixture
def root(tiny_run: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CIFAR_HPC_ROOT", str(tiny_run))
    return tiny_run


def exported(folder: Path, *arguments: str, name: str = "model") -> tuple[Path, str, dict[str, str]]:
    """(the file, the card's text, the file's metadata)."""
    path = folder / f"{name}.safetensors"
    assert main(["export", "tiny", "--out", str(path), *arguments]) == 0
    with safe_open(path, "pt") as file:
        return path, path.with_suffix(".md").read_text(), file.metadata()


def code_block(card: str) -> str:
    found = re.search(r"\n```python\n(.*?\n)```\n", card, re.DOTALL)
    assert found is not None
    return found[1]


def test_the_cards_lines_give_the_same_logits_in_a_fresh_process(root: Path, tmp_path: Path) -> None:
    _, card, _ = exported(tmp_path)
    trained = load_trained(root, "tiny", "slow")
    images = own_images(trained.spec.data, root).images
    np.save(tmp_path / "images.npy", images.numpy())
    lines = code_block(card)
    assert lines.startswith("import torch\nfrom model import load\n\nmodel = load(")
    mine = "images = torch.from_numpy(__import__('numpy').load('images.npy'))"
    code, count = re.subn(r"images = torch\.zeros.*", mine, lines)
    assert count == 1
    code = (
        "import sys\nsys.path.insert(0, '.')\n"
        + code
        + (
            "from numpy import save\nsave('logits.npy', logits.numpy())\n"
            "print([m for m in sys.modules if m.startswith(('cifar_hpc', 'safetensors'))])"
        )
    )
    done = alone(tmp_path, "-c", code)
    logits = torch.from_numpy(np.load(tmp_path / "logits.npy"))
    assert torch.equal(logits, trained.logits(images))
    assert done == [CLASSES[logits[0].argmax()], "[]"]


def alone(folder: Path, *words: str) -> list[str]:
    """Lines that Python prints where nothing of this project can be imported."""
    done = subprocess.run(
        [sys.executable, "-I", "-W", "error", *words],
        cwd=folder,
        env={"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_the_code_beside_the_weights_classifies_image_files(root: Path, tmp_path: Path) -> None:
    exported(tmp_path)
    shown = alone(tmp_path, "model.py")
    assert "run           tiny" in shown and shown[-1].startswith("classes")
    images = own_images(load_trained(root, "tiny", "slow").spec.data, root).images
    Image.fromarray(images[0].permute(1, 2, 0).numpy()).save(tmp_path / "one.png")
    Image.new("L", (100, 60)).save(tmp_path / "two.png")
    first, second = alone(tmp_path, "model.py", "one.png", "two.png")
    with torch.no_grad():
        best = cifar_hpc.load(tmp_path / "model.safetensors")(images[:1])[0].argmax()
    assert first.startswith(f"one.png: {CLASSES[best]} (") and second.startswith("two.png: ")


def test_the_code_beside_the_weights_takes_photographs_as_training_does(root: Path, tmp_path: Path) -> None:
    exported(tmp_path)
    square = own_images(load_trained(root, "tiny", "slow").spec.data, root).images[0].permute(1, 2, 0).numpy()
    wide = np.zeros((32, 72, 3), np.uint8)
    wide[:, 20:52] = square
    Image.fromarray(square).save(tmp_path / "one.png")
    Image.fromarray(wide).save(tmp_path / "wide.png")
    turned = Image.fromarray(np.rot90(square))
    exif = turned.getexif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    turned.save(tmp_path / "turned.png", exif=exif)
    shown = alone(tmp_path, "model.py", "one.png", "wide.png", "turned.png")
    assert len({line.partition(": ")[2] for line in shown}) == 1, shown
    Image.fromarray(square[..., 0]).save(tmp_path / "grey.png")
    Image.fromarray(square[..., 0].astype(np.uint16) * 257).save(tmp_path / "deep.png")  # 16 bits
    shown = alone(tmp_path, "model.py", "grey.png", "deep.png")
    assert len({line.partition(": ")[2] for line in shown}) == 1, shown


def test_models_in_one_folder_have_each_its_own_code(tmp_path: Path) -> None:
    card = {"network": "shared:Net", "arguments": "{}", "path": ".", "classes": '["a"]', "mean": "[0, 0, 0]"}
    for name in ("one", "two"):
        code = tmp_path / "model_code" / name
        code.mkdir(parents=True)
        (code / "shared.py").write_text(f"from torch import nn\n\n\nclass Net(nn.Module):\n    name = '{name}'\n")
        header = json.dumps({"__metadata__": card | {"code": name, "std": "[1, 1, 1]"}}).encode()
        (tmp_path / f"{name}.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    for name in ("one", "two", "one"):
        assert standalone.load(tmp_path / f"{name}.safetensors").network.name == name


def test_the_code_beside_the_weights_is_the_same_network(root: Path, tmp_path: Path) -> None:
    path, *_ = exported(tmp_path)
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        assert torch.equal(standalone.load(path)(images), cifar_hpc.load(str(path))(images))


# The lines of the card of a model that cifar_hpc 0.1.0 exported before its modules were in rooms.
OLD_CARD = """\
import json, torch
from cifar_hpc.model import ImprovedResNet
from cifar_hpc.spec import ModelSpec
from safetensors import safe_open

file = safe_open({file}, "pt")
card = file.metadata()
model = ImprovedResNet(ModelSpec(**json.loads(card["model"]))).to(memory_format=torch.channels_last).eval()
model.load_state_dict({{name: file.get_tensor(name) for name in file.keys()}})
mean, std = (torch.tensor(json.loads(card[key])).view(3, 1, 1) for key in ("mean", "std"))
"""


def test_the_lines_of_an_older_card_still_work(root: Path, tmp_path: Path) -> None:
    path, _, _ = exported(tmp_path)
    found: dict[str, Any] = {}
    exec(OLD_CARD.format(file=json.dumps(str(path))), found)
    images = own_images(load_trained(root, "tiny", "slow").spec.data, root).images
    model = cifar_hpc.load(str(path))
    with torch.no_grad():
        assert torch.equal(model(images), found["model"]((images / 255 - found["mean"]) / found["std"]))
    assert model.classes == list(CLASSES) and model.card["run"] == "tiny"


def test_the_keys_are_the_models_own(root: Path, tmp_path: Path) -> None:
    path, _, metadata = exported(tmp_path)
    model = build_model(ModelSpec(**json.loads(metadata["model"])), 0)
    tensors = load_file(path)
    assert model.load_state_dict(tensors, strict=True)
    state = read_checkpoint(root / "checkpoints" / "tiny" / "step_00000018.pt")
    for (name, _), slow in zip(model.named_parameters(), state.optimizer["slow"], strict=True):
        assert torch.equal(tensors[name], slow)
    for name, buffer in state.slow_buffers.items():
        assert torch.equal(tensors[name], buffer)


def test_the_metadata_says_what_it_is(root: Path, tmp_path: Path, capsys: Any) -> None:
    _, card, metadata = exported(tmp_path)
    row = json.loads((root / "logs" / "tiny" / "metrics.jsonl").read_text().splitlines()[-1])
    state = read_checkpoint(root / "checkpoints" / "tiny" / "step_00000018.pt")
    assert {key: metadata[key] for key in ("run", "checkpoint", "step", "epoch", "epochs", "weights")} == {
        "run": "tiny", "checkpoint": "step_00000018.pt", "step": "18", "epoch": "2", "epochs": "2", "weights": "slow",
    }  # fmt: skip
    assert float(metadata["test_accuracy"]) == row["test_accuracy"]
    assert float(metadata["test_loss"]) == row["test_loss"]
    assert json.loads(metadata["classes"]) == list(CLASSES)
    assert metadata["weights_sha256"] == state.digests()["slow_weights"]
    assert metadata["checkpoint_digest"] == state.digest
    spec = json.loads(metadata["spec"])
    assert (
        spec["model"] == {k: v for k, v in state.spec["model"].items() if k != "init_from"}
        and spec["optimizer"] == state.spec["optimizer"]
    )
    assert "resources" not in spec and "root" not in spec["data"]
    assert f"| test accuracy | {row['test_accuracy']:.2f}% |" in card and metadata["weights_sha256"] in card
    out = capsys.readouterr().out
    assert f"accuracy    {row['test_accuracy']:.2f}%" in out and "parameters  " in out


def test_fast_weights_claim_no_accuracy_that_was_not_measured(root: Path, tmp_path: Path, capsys: Any) -> None:
    _, card, metadata = exported(tmp_path, "--weights", "fast")
    assert "test_accuracy" not in metadata and "not measured" in card
    assert "accuracy    not measured" in capsys.readouterr().out


def test_the_same_checkpoint_gives_the_same_bytes(root: Path, tmp_path: Path) -> None:
    first, card, _ = exported(tmp_path)
    content = first.read_bytes()
    again, same, _ = exported(tmp_path)  # over what is there
    assert again.read_bytes() == content and same == card
    assert hashlib.sha256(content).hexdigest() in card
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "model.md",
        "model.py",
        "model.safetensors",
        "model_code",
    ]


def card_of(**changes: str | None) -> Callable[[dict[str, torch.Tensor], dict[str, str]], object]:
    """Change the metadata; None takes a key away."""

    def edit(_: dict[str, torch.Tensor], card: dict[str, str]) -> None:
        card |= {key: text for key, text in changes.items() if text is not None}
        for key in [key for key, text in changes.items() if text is None]:
            del card[key]

    return edit


MODEL = {"width_multiplier": 0.0625, "blocks": [1, 1, 1]}


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (card_of(model=None), "KeyError: 'model'"),
        (card_of(model="{"), "JSONDecodeError"),
        (card_of(model="[" * 100_000), "RecursionError"),
        (card_of(model="7"), "model: 7 is not allowed"),
        (card_of(model='{"later": 7}'), "model.later: unknown key"),
        (card_of(model=json.dumps({**MODEL, "width_multiplier": 100})), "size mismatch"),
        (card_of(model=json.dumps({**MODEL, "blocks": [1000, 1000, 1000]})), "too few for 3000 blocks"),
        (card_of(model=json.dumps({**MODEL, "widths": [1, 1, 1]})), "makes a layer of width 1"),
        (card_of(classes="7"), "TypeError"),
        (card_of(mean="[1]"), "RuntimeError"),
        (card_of(std='["\\u001b[2J"]'), "TypeError|ValueError"),
        (lambda tensors, _: tensors.pop("head.bias"), "Missing key"),
        (lambda tensors, _: tensors.update({"more\x1b[2J": torch.zeros(1)}), "Unexpected key"),
        (lambda tensors, _: tensors.update({"head.bias": torch.zeros(1)}), "size mismatch"),
        (lambda tensors, _: tensors.update({"head.bias": torch.zeros(10).half()}), "head.bias is torch.float16"),
    ],
)
def test_a_foreign_safetensors_file_is_a_named_error(root: Path, tmp_path: Path, edit: Any, words: str) -> None:
    path, _, card = exported(tmp_path)
    assert cifar_hpc.load(str(path)).card["run"] == "tiny"
    tensors = load_file(path)
    edit(tensors, card)
    save_file(tensors, path, card)
    with pytest.raises(SpecError, match=words) as raised:
        cifar_hpc.load(str(path))
    assert str(raised.value).startswith(f"{path}: is not what ") and "\x1b" not in str(raised.value)


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"\xff" * 8,
        b"\x02\0\0\0\0\0\0\0{}",
        b"\x08\0\0\0\0\0\0\0[[[[[[[[",
        (150).to_bytes(8, "little")
        + b'{"head.bias":{"dtype":"F32","shape":[1000000000],"data_offsets":[0,4000000000]}}'.ljust(150),
        (150).to_bytes(8, "little")
        + b'{"head.bias":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,4]}}'.ljust(150)
        + b"\0" * 4,
    ],
)
def test_a_header_that_lies_is_a_named_error(tmp_path: Path, header: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(header)
    with pytest.raises(SpecError, match=rf"^{path}: is not what `python -m cifar_hpc export` writes"):
        cifar_hpc.load(str(path))
    with pytest.raises(FileNotFoundError):
        cifar_hpc.load(str(tmp_path / "none.safetensors"))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({}, "CIFAR-10's test images"),
        ({"test_size": 2000, "train_size": 5000}, "2,000 of CIFAR-10's test images"),
        ({"holdout": 1000}, "1,000 of CIFAR-10's training images, held out; not the test images"),
        (
            {"holdout": 1000, "train_size": 5000},
            "1,000 of 5,000 of CIFAR-10's training images, held out; not the test images",
        ),
        ({"source": "folder", "root": "/x/mine"}, "mine/test"),
        ({"source": "folder", "root": "/x/mine", "holdout": 9}, "9 of mine/train, held out; not the test images"),
        ({"source": "synthetic", "test_size": 5}, "5 of the synthetic test images"),
    ],
)
def test_it_says_which_images_its_figures_are_of(root: Path, data: dict[str, Any], words: str) -> None:
    trained = load_trained(root, "tiny", "slow")
    trained = dataclasses.replace(trained, spec=dataclasses.replace(trained.spec, data=DataSpec(**data)))
    assert metadata(trained)["data"] == words


def test_an_export_that_is_cut_short_leaves_no_card_of_another_model(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    path, *_ = exported(tmp_path)
    before = path.read_bytes()
    real = export_command.write_atomic

    def full(target: Path, content: bytes) -> None:
        if target.suffix == ".md":
            raise OSError(28, "No space left on device", str(target))
        real(target, content)

    monkeypatch.setattr(export_command, "write_atomic", full)
    assert main(["export", "tiny", "--out", str(path), "--weights", "fast"]) == 2
    assert "No space left" in capsys.readouterr().err
    assert path.read_bytes() != before and not path.with_suffix(".md").exists()


@pytest.mark.parametrize("name", ['a "b" ```c', "modèle_1"])
def test_any_file_name_can_be_loaded(root: Path, tmp_path: Path, name: str) -> None:
    path, card, _ = exported(tmp_path, name=name)
    opened = re.search(r" load\((.*)\)  #", code_block(card))
    assert opened is not None and eval(opened[1]) == path.name


def test_a_users_mistakes_are_named_and_nothing_is_lost(root: Path, tmp_path: Path, capsys: Any) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("# mine\n")
    (tmp_path / "model.py").write_text("# mine\n")
    for run, out, words in [
        ("tiny", "README.safetensors", "README.md, where the card would go, is there already and is no card"),
        ("tiny", "x.safetensors", "model.py, where the code would go, is there already and is no code"),
        ("tiny", "model.pt", "ends with .safetensors"),
        ("tiny", "README.md/model.safetensors", "README.md cannot be made: File exists"),
    ]:
        assert main(["export", run, "--out", str(tmp_path / out)]) == 2
        assert words in capsys.readouterr().err
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == dict.fromkeys(
        ("README.md", "model.py"), "# mine\n"
    )
    (tmp_path / "model.py").unlink()
    assert main(["export", "none", "--out", str(tmp_path / "model.safetensors")]) == 2
    assert "no such run" in capsys.readouterr().err

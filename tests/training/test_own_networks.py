"""The promise for networks, optimizers and beginnings that are the user's own, with real processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from processes import Runs

from cifar_hpc.__main__ import main

NETWORKS = '''
import torch
from torch import nn
from torchvision.models import resnet18
from layers import Drop


def with_dropout(width, num_classes):
    """ResNet-18 with narrow layers, dropout before its head, and one frozen layer."""
    network = resnet18(num_classes=num_classes)
    network.conv1 = nn.Conv2d(3, 64, 3, stride=2, padding=1, bias=False)
    for layer in (network.layer3, network.layer4):
        layer[1] = nn.Identity()
    network.fc = nn.Sequential(Drop(0.3), nn.Linear(512, num_classes))
    network.conv1.requires_grad_(False)
    return network


class SmallTransformer(nn.Module):
    """Convolutional stem, LayerNorm, attention, stochastic depth; its rates are made as many repositories do."""

    def __init__(self, width=16, depth=2, classes=10, image_size=32):
        super().__init__()
        from torchvision.ops import StochasticDepth

        self.stem = nn.Sequential(nn.Conv2d(3, width, 4, stride=4), nn.GELU())
        self.place = nn.Parameter(torch.randn(1, (image_size // 4) ** 2, width) * 0.02)
        rates = [rate.item() for rate in torch.linspace(0, 0.5, depth)]
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(depth))
        self.attention = nn.ModuleList(nn.MultiheadAttention(width, 2, batch_first=True) for _ in range(depth))
        self.drops = nn.ModuleList(StochasticDepth(rate, "row") for rate in rates)
        self.drop, self.head = nn.Dropout(0.1), nn.Linear(width, classes)

    def forward(self, x):
        x = self.drop(self.stem(x).flatten(2).transpose(1, 2) + self.place)
        for norm, attention, drop in zip(self.norms, self.attention, self.drops):
            y = norm(x)
            x = x + drop(attention(y, y, y, need_weights=False)[0])
        return self.head(x.mean(1))


class DrawsByItself(SmallTransformer):
    def forward(self, x):
        return super().forward(nn.functional.dropout(x, 0.1, self.training))


class FailsLater(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.head, self.calls = nn.Linear(3, classes), 0

    def forward(self, x):
        self.calls += self.training
        if self.calls > 20:
            raise ValueError("what now?")
        return self.head(x.mean((2, 3)))


class Odd(nn.Module):
    """Weights and buffers of several types, one with gaps in memory, a mask of -inf, and it changes its input."""

    def __init__(self, classes):
        super().__init__()
        kept = torch.arange(12) % 3 > 0
        self.register_buffer("kept", kept)
        self.register_buffer("order", torch.arange(12, dtype=torch.int32).flip(0))
        self.register_buffer("mask", torch.zeros(12).masked_fill(~kept, -torch.inf))
        self.stem, self.head = nn.Conv2d(3, 12, 4, stride=4), nn.Linear(12, classes)
        self.gaps = nn.Parameter((torch.randn(12, 16) / 4)[:, :12])
        self.scale = nn.Parameter(torch.ones(12, dtype=torch.bfloat16))

    def forward(self, x):
        x = self.stem(x.mul_(0.5)).mean((2, 3))[:, self.order.long()]
        x = torch.where(self.kept, x, 0.0) @ self.gaps * self.scale.float()
        return self.head(x + (x + self.mask).softmax(1))


class Complex(Odd):
    def __init__(self, classes):
        super().__init__(classes)
        self.register_buffer("turn", torch.ones(2, dtype=torch.complex64))


class Reentrant(Odd):
    def forward(self, x):
        return torch.utils.checkpoint.checkpoint(super().forward, x.requires_grad_(), use_reentrant=True)
'''
LAYERS = "from torch import nn\n\n\nclass Drop(nn.Dropout):\n    pass\n"
SGD = ("optimizer.lr=0.02",)
ADAMW = ("optimizer.name=adamw", "optimizer.lr=0.002", "optimizer.decay_all=false", "optimizer.weight_decay=0.05")
CASES = {
    "resnet": ("model.target=mine.py:with_dropout", "model.args={width: 8}", *SGD, "train.amp=fp32"),
    "transformer": ("model.target=mine.py:SmallTransformer", *ADAMW, "train.amp=bf16", "lookahead.enabled=false"),
    "odd": ("model.target=mine.py:Odd", *SGD, "train.amp=fp32"),
    "both": ("model.target=mine.py:SmallTransformer", "model.args.width=8", *ADAMW, "train.amp=fp32", "ema.decay=0.9"),
}
BUILT_IN = ("model.blocks=[3, 3, 3]", "model.dropout=0.2", "model.width_multiplier=1.0")  # as the defaults are


@pytest.fixture(scope="module", autouse=True)
def files(runs: Runs) -> None:
    (runs.root / "mine.py").write_text(NETWORKS)
    (runs.root / "layers.py").write_text(LAYERS)


@pytest.mark.parametrize("case", CASES)
def test_killed_stopped_and_moved_it_ends_in_the_same_bits(runs: Runs, look: Any, case: str) -> None:
    words = (*BUILT_IN, *CASES[case])
    runs.finish(f"{case}-alone", 1, *words)
    runs.kill(case, 2, *words, interrupt="SIGKILL@step:6")
    runs.stop(case, 3, *words, interrupt="SIGTERM@step:11")
    runs.finish(case, 1, *words)
    assert look(runs, case) == look(runs, f"{case}-alone")
    assert "may differ" not in runs.log(case)


def test_evaluate_predict_export_and_plot_take_it(
    runs: Runs, look: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CIFAR_HPC_ROOT", str(runs.root))
    for name in ("resnet", "transformer", "odd"):
        assert main(["evaluate", name]) == 0
        assert "the same as logged after epoch 2" in capsys.readouterr().out
        assert main(["export", name, "--out", str(tmp_path / f"{name}.safetensors")]) == 0
        assert main(["plot", name, "--only", "architecture", "--out", str(tmp_path)]) == 0
        assert list(tmp_path.glob("architecture*.png"))


def test_a_network_that_draws_by_itself_never_begins(runs: Runs) -> None:
    assert runs.start("draws", 2, *BUILT_IN, "model.target=mine.py:DrawsByItself") == [1, 1]
    log = " ".join(runs.log("draws").split())
    assert "model.target: DrawsByItself draws random numbers by itself. HINT: Masks must come from" in log
    assert "Traceback" not in log and runs.events("draws", "checkpoint", "requeued") == []
    assert runs.log("draws").count("draws random numbers") == 1


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "Complex",
            "'mine.py:Complex': turn is torch.complex64, which no checkpoint holds; allowed: float32, float64,",
        ),
        ("Reentrant", "get no gradient: the logits do not depend on them. HINT: remove them from the network,"),
    ],
)
def test_a_network_that_could_not_go_on_never_begins(runs: Runs, name: str, words: str) -> None:
    assert runs.start(name, 1, *BUILT_IN, f"model.target=mine.py:{name}") == [1]
    log = " ".join(runs.log(name).split())
    assert words in log and "Traceback" not in log and runs.events(name, "checkpoint", "requeued") == []


def test_an_error_in_the_users_file_is_shown_with_its_line(runs: Runs) -> None:
    assert 1 in runs.start("fails", 1, *BUILT_IN, "model.target=mine.py:FailsLater")
    (failed,) = runs.events("fails", "failed")
    assert failed["error"].startswith('mine.py, line 55: raise ValueError("what now?"): ValueError: what now?')
    log = runs.log("fails")  # the user's frames alone
    assert "in forward" in log and "trainer.py" not in log and "engine.py" not in log


def test_code_that_has_changed_is_another_run_and_never_reaches_this_one(runs: Runs, look: Any) -> None:
    words = (*BUILT_IN, "model.target=mine.py:with_dropout", "model.args={width: 8}")
    runs.copy("resnet", "edited")
    (runs.root / "layers.py").write_text(LAYERS + "\n# another line\n")
    try:
        assert runs.start("edited", 1, *words, "optimizer.lr=0.02") == [2]
        assert "(a file of the target was edited)" in runs.output(
            "edited"
        ) and "give the new run another --name" in runs.output("edited")
        copy = next((runs.root / "logs" / "edited" / "code" / "user").glob("*/layers.py"))
        copy.write_text(LAYERS + "# modified\n")
    finally:
        (runs.root / "layers.py").write_text(LAYERS)
    assert main(["evaluate", "edited"]) == 2


def test_a_run_begins_with_the_weights_of_another(runs: Runs, look: Any, capsys: Any, tmp_path: Path) -> None:
    look(runs, "both")  # sets the root
    export = tmp_path / "both.safetensors"
    assert main(["export", str(runs.root / "checkpoints" / "both" / "best.pt"), "--out", str(export)]) == 0
    words = ("model.target=mine.py:SmallTransformer", "model.args.width=8", *BUILT_IN)
    for name, source in {"from-run": "both", "from-export": str(export)}.items():
        runs.kill(name, 2, *words, f"model.init_from={source}", interrupt="SIGKILL@step:2")
        runs.finish(name, 1, *words, f"model.init_from={source}")
        assert runs.log(name).count("initialised from") == 2 and ": 17 of 17 tensors" in runs.log(name)
    assert look(runs, "from-run") == look(runs, "from-export")
    runs.finish("from-nothing", 1, *words)
    assert look(runs, "from-nothing") != look(runs, "from-run")
    runs.finish("wider", 1, "model.target=mine.py:SmallTransformer", "model.args.depth=1", *BUILT_IN,
                "model.init_from=both", "train.epochs=2")  # fmt: skip
    log = " ".join(runs.log("wider").split())
    assert "stem.0.weight: [8, 3, 4, 4] there, [16, 3, 4, 4] here" in log


def test_a_source_of_weights_that_is_missing_or_of_another_network_is_refused(runs: Runs) -> None:
    assert runs.start("orphan", 1, "model.init_from=nothing") == [2]
    assert "best.pt cannot be read: No such file" in runs.output("orphan")
    assert runs.start("stranger", 1, "model.init_from=resnet") == [1]
    assert "has name and shape of one of the network's" in " ".join(runs.output("stranger").split())

"""Whole files that no run has written: refused by file and field, within time and memory that their size allows."""

from __future__ import annotations

import copy
import json
import os
import struct
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import BLANK, PROJECT, blank_state, snapshot, take_steps, tiny_engine, tiny_spec

from cifar_hpc import tensorfile
from cifar_hpc.__main__ import main
from cifar_hpc.cli import inspect
from cifar_hpc.config.io import from_plain
from cifar_hpc.errors import RunFailedError
from cifar_hpc.runs.frozen_spec import freeze
from cifar_hpc.runs.logs import metrics_text, read_jsonl
from cifar_hpc.runs.paths import RunPaths
from cifar_hpc.tensorfile import BadFileError, seal
from cifar_hpc.training.checkpoints.format import read_checkpoint
from cifar_hpc.training.checkpoints.recovery import choose
from cifar_hpc.training.context import Context
from cifar_hpc.training.process import Launch, StopFlag

Edit = Callable[[dict[str, Any]], object]

# ------------------------------------------------------------------ fields that do not go together


@pytest.fixture(scope="module")
def content() -> dict[str, Any]:
    """What a run with everything in it saves at the end of its second epoch, of two steps each."""
    spec = tiny_spec(train={"amp": "fp16"}, ema={"decay": 0.9})
    engine = tiny_engine(spec)
    take_steps(engine, 0, 4)
    state = snapshot(engine)
    state.epoch, state.step_in_epoch, state.slow_buffers = 2, 0, copy.deepcopy(state.buffers)
    state.history = metrics_text([{"epoch": 1, "step": 2}, {"epoch": 2, "step": 4}])
    return state.to_dict()


def write(folder: Path, content: dict[str, Any], edit: Edit = lambda content: None, step: int = 4) -> Path:
    """A whole file, sealed after `edit`."""
    content, path = copy.deepcopy(content), folder / f"step_{step:08d}.pt"
    edit(content)
    torch.save(seal(content), path)
    return path


def put(*keys: Any, value: Any) -> Edit:
    def edit(content: Any) -> None:
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = value

    return edit


def momentum(content: dict[str, Any]) -> Any:
    return content["optimizer"]["inner"]["state"]


ONE = torch.zeros(1)
GROUP = ("optimizer", "inner", "param_groups", 0)
DATASET = {"classes": list("abcdefghij"), "image_size": 32, "mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.2]}
FIELDS: list[tuple[Edit, str]] = [
    # Shapes that copy_ would spread over all weights.
    (put("model", "head.weight", value=ONE), r"model\.head\.weight: torch\.float32 \[1\] .*; .* \[10,"),
    (put("model", "head.bias", value=torch.zeros(())), r"model\.head\.bias: "),
    (put("model", "stem.0.weight", value=torch.zeros(4, 3, 1, 1)), r"model\.stem\.0\.weight: "),
    (put("buffers", "stem.1.running_var", value=ONE), r"buffers\.stem\.1\.running_var: "),
    (put("slow_buffers", "stem.1.running_mean", value=ONE), r"slow_buffers\.stem\.1\.running_mean: "),
    (put("optimizer", "slow", 0, value=ONE), r"optimizer\.slow\.0: "),
    (lambda content: momentum(content)[3].update(momentum_buffer=ONE), r"inner\.state\.3\.momentum_buffer: "),
    (put("average", 2, value=ONE), r"average\.2: "),
    (put("sums", value=torch.zeros(1, 2, dtype=torch.float64)), r"sums: torch\.float64 \[1, 2\] .* \[4, 2\]"),
    # Other types.
    (put("sums", value=torch.zeros(4, 2)), r"sums: torch\.float32"),
    (put("model", "head.bias", value=torch.zeros(10, dtype=torch.float64)), r"model\.head\.bias: torch\.float64"),
    (put("model", "head.bias", value=[0.0] * 10), r"model\.head\.bias: a list of 10"),
    (put("buffers", "stem.1.num_batches_tracked", value=torch.zeros(())), "num_batches_tracked: torch.float32"),
    (put("model", value=[]), "model: "),
    (put("model", value=None), "model: "),
    (put("optimizer", value=None), "optimizer: None"),
    (put("optimizer", "inner", value=[]), r"optimizer\.inner: "),
    (put("average", value=None), "average: None"),
    (put("slow_buffers", value={}), "slow_buffers: 'stem.1.running_mean' is missing"),
    (put("scaler", value=[1]), "scaler: "),
    (put("scaler", "scale", value=float("nan")), r"scaler\.scale: nan"),
    (put("scaler", "growth_interval", value=1), r"scaler\.growth_interval: 1 .*; allowed: 2000"),
    (put("environment", value=[]), "environment: "),
    (put("environment", "more", value=ONE), r"history or environment: .*TypeError"),
    (put("environment", "more", value="x" * 200_000), "environment: "),
    (put("environment", "amp", value=["fp32"]), r"environment\.amp: \['fp32'\] "),
    (put("history", value=b"".decode()), "history|epoch"),
    (put("history", value=7), "history: 7"),
    (put("history", value="[" * 100_000), "history or environment"),
    (put("history", value='{"epoch": 1, "step": 2.0}\n{"epoch": 2, "step": 4}\n'), "history: "),
    (put("history", value='{"epoch": 1, "step": "2"}\n{"epoch": 2, "step": 4}\n'), "history: "),
    (put("best", value=[0, 1]), "best: "),
    (put("best", "epoch", value=3), "best: "),
    (put("best", "test_accuracy", value="99"), r"best\.test_accuracy: '99'"),
    (put("epoch_seconds", value=float("inf")), "epoch_seconds: inf"),
    # Numbers.
    *((put(key, value=value), f"^{key}: ")
      for key in ("epoch", "step_in_epoch", "step", "updates") for value in (-1, 2**60, 5, True, 1.0, None)),
    # Names.
    (lambda content: content["model"].pop("head.bias"), "model: 'head.bias' is missing"),
    (put("model", "more", value=ONE), "model: 'more' is foreign"),
    (lambda content: content.update(model=dict(reversed(content["model"].items()))), "model: .* order"),
    (put("model", 7, value=ONE), "model: 7 is foreign"),
    (lambda content: momentum(content).clear(), r"optimizer\.inner\.state: 0 is missing"),
    (lambda content: content["optimizer"].pop("counter"), "optimizer: 'counter' is missing"),
    (lambda content: content["environment"].pop("amp"), "environment: "),
    # What the spec fixes.
    (put("optimizer", "counter", value=3), r"optimizer\.counter: 3 .*; allowed: 4"),
    (put("optimizer", "k", value=7), r"optimizer\.k: 7 .*; allowed: 5"),
    (put(*GROUP, "momentum", value=0.0), r"param_groups\.0\.momentum"),
    (put(*GROUP, "lr", value="fast"), r"param_groups\.0\.lr: 'fast'"),
    (put(*GROUP, "momentum", value=ONE), r"param_groups\.0\.momentum"),
    (put(*GROUP, "maximize", value=True), r"param_groups\.0\.maximize: True .*; allowed: False"),
    (lambda content: content["optimizer"]["inner"]["param_groups"][0].pop("params"), "'params' is missing"),
    (put(*GROUP, "params", 0, value=1), r"param_groups\.0\.params\.0"),
    (put("spec", "model", "blocks", value=[1000, 1000, 1000]), "model: is not that of the spec"),
    (put("spec", "model", "blocks", value=[2, 1, 1]), r"model: 'layers\..*' is missing"),
    (put("spec", "model", "width_multiplier", value=100.0), r"model\.stem\.0\.weight: "),
    (put("spec", "train", "shards", value=2), "sums: "),
    (put("spec", "ema", "decay", value=None), "average: a list of 41"),
    (put("spec", "model", "dropout", value=ONE), r"its spec: model\.dropout: tensor"),
    (put("spec", "model", value=7), "its spec: model: 7"),
    (put("spec", value=7), "its spec: "),
    (put("spec", 7, value=7), "its spec: 7: unknown key"),
    (put("spec", "optimizer", "name", value="adamw"), r"optimizer\.inner\.state\.0: 'step' is missing"),
    # What it says of its images.
    (put("dataset", value=7), "dataset: is not a mapping"),
    (put("dataset", value={**DATASET, "more": 1}), "dataset: is not a mapping"),
    (put("dataset", value={**DATASET, "mean": [0.5]}), "dataset: is not a mapping"),
    (put("dataset", value={**DATASET, "classes": "abcdefghij"}), "dataset: is not a mapping"),
    (put("dataset", value={**DATASET, "classes": [*"abcdefghi", ONE]}), r"dataset\.classes\.9: "),
    (put("dataset", value={**DATASET, "classes": ["a", "b"]}), r"model\.head\.weight: "),
    (put("dataset", value={**DATASET, "std": [0.5, 0.5, 0.0]}), "dataset: image_size or std is not above 0"),
    (put("dataset", value={**DATASET, "std": [0.5, 0.5, float("nan")]}), r"dataset\.std\.2: nan"),
    (put("dataset", value={**DATASET, "image_size": True}), r"dataset\.image_size: True"),
    (put("dataset", value={**DATASET, "image_size": 0}), "dataset: image_size or std is not above 0"),
]  # fmt: skip


@pytest.mark.parametrize(("edit", "words"), FIELDS)
def test_a_whole_file_that_no_run_wrote_is_refused_by_field(
    tmp_path: Path, content: dict[str, Any], edit: Edit, words: str
) -> None:
    assert read_checkpoint(write(tmp_path, content)).step == 4, "without the edit it is good"
    path = write(tmp_path, content, edit)
    with pytest.raises((BadFileError, RunFailedError), match=words) as raised:
        read_checkpoint(path)
    assert len(str(raised.value)) < 2000
    assert isinstance(raised.value, BadFileError) == ("unknown key" not in words)


def test_the_keys_of_another_version_of_torch_are_no_fault(tmp_path: Path, content: dict[str, Any]) -> None:
    def edit(content: dict[str, Any]) -> None:
        group = content["optimizer"]["inner"]["param_groups"][0]
        del group["fused"], group["differentiable"]
        group["later"] = None

    assert read_checkpoint(write(tmp_path, content, edit)).step == 4


ODD = (None, True, -1, 2**70, 0.5, float("nan"), "\x1b[2J\ud800", "x" * 5000, [], {}, {"a": [1]}, torch.zeros(2))


def leaves(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    if isinstance(tree, (dict, list)):
        for key in list(tree) if isinstance(tree, dict) else range(len(tree)):
            yield from leaves(tree[key], (*path, key))


def test_any_value_anywhere_is_refused_or_can_be_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Never another error, such as a TypeError; what is accepted has no effect beyond what is shown."""
    whole = blank_state(4, 2).to_dict()
    places = [path for path in leaves(whole) if path and path[0] != "digest"]
    assert len(places) > 150
    accepted = set()
    for number, path in enumerate(places):
        for odd in ODD[number % 3 :: 3] if path[0] == "spec" or len(path) > 2 else ODD:
            changed = copy.deepcopy(whole)
            put(*path, value=odd)(changed)
            monkeypatch.setattr(tensorfile, "load", lambda _, changed=changed: seal(changed))
            try:
                state = read_checkpoint(Path("step_00000004.pt"))
            except (BadFileError, RunFailedError):
                continue
            accepted.add(path[0])
            assert json.dumps(inspect.describe(Path("x"), state, [])).isascii()
            assert {name: w.shape for name, w in state.model.items()} == {n: w.shape for n, w in whole["model"].items()}
    assert accepted <= {
        "spec",
        "environment",
        "best",
        "epoch_seconds",
        "slow_buffers",
        "scaler",
        "optimizer",
        "updates",
    }


# ------------------------------------------------------------------ files that claim more than they hold


def repack(path: Path, edit: Callable[[dict[str, bytes]], object]) -> None:
    """Write the archive anew, with right sums, after `edit` of its records."""
    with zipfile.ZipFile(path) as archive:
        records = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    edit(records)
    with zipfile.ZipFile(path, "w") as archive:
        for name, record in records.items():
            archive.writestr(name, record)


def shared(levels: int) -> list[Any]:
    """A list whose two items are one list, whose two items are ...: 2 ** levels ways through it."""
    value: list[Any] = [1]
    for _ in range(levels):
        value = [value, value]
    return value


def pickled(name: str, content: bytes) -> Callable[[Path], None]:
    """In place of the pickle."""
    return lambda path: repack(path, lambda records: records.update({f"{path.stem}/data.pkl": content}))


def saved(value: Any) -> Callable[[Path], None]:
    return lambda path: torch.save({"format": 1, "more": value}, path)


def lying_count(path: Path) -> None:
    """A storage of 2 ** 31 - 1 numbers, by the pickle alone: torch.load would read beyond its memory."""
    torch.save({"format": 1, "more": torch.zeros(1000)}, path)
    old, new = b"M\xe8\x03", b"J\xff\xff\xff\x7f"

    def lie(records: dict[str, bytes]) -> None:
        name = f"{path.stem}/data.pkl"
        assert old in records[name]
        records[name] = records[name].replace(old, new)

    repack(path, lie)


def short_record(path: Path) -> None:
    torch.save({"format": 1, "more": torch.zeros(1000)}, path)
    repack(path, lambda records: records.update({f"{path.stem}/data/0": b"\0" * 8}))


def overlapping(path: Path) -> None:
    """The central directory names one record of a megabyte a thousand times."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", b"\0" * 2**20)
        archive.filelist *= 1000


def packed(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("x/data.pkl", "w") as record:
        for _ in range(300):
            record.write(b"\0" * 2**20)


def lying_size(path: Path) -> None:
    """The directory says 2 ** 31 bytes, in the file and packed, of a record of 8."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", b"\0" * 8)
        archive.filelist[0].file_size = archive.filelist[0].compress_size = 2**31


def quantized(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it will go from torch some day
        saved(torch.quantize_per_tensor(torch.zeros(2), 0.1, 0, torch.quint8))(path)


BASE = torch.zeros(64)
KEY = b"K\x01K\x01\x86q\x00" + b"".join(
    b"h" + bytes([n]) + b"h" + bytes([n]) + b"\x86q" + bytes([n + 1]) for n in range(60)
)
TEXT = b"X" + struct.pack("<I", 100_000) + b"x" * 100_000
BOMBS: dict[str, Callable[[Path], None]] = {
    "shared lists": saved(shared(60)),
    "shared mappings": saved({"a": (one := {"x": 1}), "b": one}),
    "a list in itself": saved((lambda own: own.append(own) or own)([])),  # type: ignore[func-returns-value]
    "expanded tensor": saved(torch.zeros(1).expand(2**30)),
    "expanded in part": saved(torch.zeros(1000, 1).expand(1000, 2**20)),
    "many views of one storage": saved([BASE[:32], BASE[32:]]),
    "one tensor twice": saved([BASE, BASE]),
    "complex": saved(torch.zeros(2, dtype=torch.complex64)),
    "half": saved(torch.zeros(2, dtype=torch.float16)),
    "sparse": saved(torch.zeros(2).to_sparse()),
    "quantized": quantized,
    "meta": saved(torch.zeros(2**40, device="meta")),
    "parameter": saved(torch.nn.Parameter(torch.zeros(2))),
    "a set": saved({1, 2}),
    "bytes": saved(b"x"),
    "a key of None": saved({None: 1}),
    "a key that is a tuple": saved({(1, 2): 1}),
    "lying count": lying_count,
    "short record": short_record,
    "overlapping records": overlapping,
    "packed": packed,
    "lying size": lying_size,
    "no record": lambda path: zipfile.ZipFile(path, "w").close(),
}  # fmt: skip
PICKLES = {
    "deep": b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b".",
    "deep as a value": b"\x80\x02}X\x06\0\0\0format" + b"]" * 200_000 + b"a" * 199_999 + b"s.",
    "a key with 2 ** 60 ways to its hash": b"\x80\x02}" + KEY + b"K\x01s.",
    "text repeated": b"\x80\x02]" + TEXT + b"q\x00a(" + b"h\x00" * 100_000 + b"e.",
    "an index of the memo": b"\x80\x02]r\xff\xff\xff\x7f.",
    "a count of text": b"\x80\x02X\xff\xff\xff\x7fx.",
    "a long number": b"\x80\x02\x8b\xff\xff\xff\x7f\x01.",
    "a call of text": b"\x80\x02X\x01\0\0\0x)R.",
    "attributes": b"\x80\x02ccollections\nOrderedDict\n}X\x01\0\0\0aK\x01sb.",
    "a tensor set item by item": b"\x80\x02(ctorch._utils\n_rebuild_tensor_v2\nK\x00K\x00s.",
    "nothing": b"",
    "no end": b"\x80\x02]",
    "a mark too few": b"\x80\x02t.",
}  # fmt: skip


def make(folder: Path) -> list[Path]:
    """All of these files."""
    paths = []
    for name, build in BOMBS.items():
        paths.append(folder / f"{name}.pt")
        build(paths[-1])
    for name, content in PICKLES.items():
        paths.append(folder / f"{name}.pt")
        torch.save({"format": 1}, paths[-1])
        pickled(name, content)(paths[-1])
    return paths


MEASURE = """
import resource, sys
from pathlib import Path
from cifar_hpc.tensorfile import BadFileError
from cifar_hpc.training.checkpoints.format import read_checkpoint
for path in map(Path, sys.argv[1:]):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        read_checkpoint(path)
        words = "accepted"
    except BadFileError as error:
        words = str(error)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, path.name, words, sep="|", flush=True)
"""


@pytest.mark.process
def test_what_claims_more_than_it_holds_costs_neither_time_nor_memory(tmp_path: Path) -> None:
    paths = make(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *map(str, paths)], capture_output=True, text=True, timeout=300, check=False,
        env=os.environ | {"PYTHONPATH": str(PROJECT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    lines = [line.split("|", 2) for line in done.stdout.splitlines()]
    assert [name for _, name, _ in lines] == [path.name for path in paths]
    for (kilobytes, name, words), path in zip(lines, paths, strict=True):
        assert words != "accepted" and len(words) < 400, name
        assert int(kilobytes) * 1024 < 100 * path.stat().st_size + 50e6, f"{name}: {kilobytes} kB"


def test_views_and_other_layouts_are_read_as_torch_reads_them(tmp_path: Path) -> None:
    tree = {
        "a": torch.arange(24.0).view(2, 3, 4).transpose(0, 2),
        "b": torch.randn(4, 6, 3, 3).to(memory_format=torch.channels_last),
        "c": torch.arange(100)[7:60:3],
        "d": [torch.zeros(0, 3), torch.tensor(5, dtype=torch.uint8), torch.ones((), dtype=torch.float64)],
        "e": {1: "text é\n", "x": [None, True, False, -1, 2**62, -(2**100), 1e-300, [], {}]},
    }
    torch.save(tree, tmp_path / "x.pt")
    mine, theirs = tensorfile.load(tmp_path / "x.pt"), torch.load(tmp_path / "x.pt", weights_only=True)
    for key in "abc":
        assert torch.equal(mine[key], theirs[key]) and mine[key].stride() == theirs[key].stride()
    assert all(torch.equal(x, y) and x.dtype == y.dtype for x, y in zip(mine["d"], theirs["d"], strict=True))
    assert mine["e"] == theirs["e"] == tree["e"]
    assert mine["b"].data_ptr() % 64 == 0, "aligned as torch's own, so that kernels give the same bits"


# ------------------------------------------------------------------ a start that finds such files


def test_a_start_passes_over_crafted_files_to_an_older_good_one(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path, "run")
    paths.create()
    context = Context(paths, BLANK, Launch(), StopFlag())
    folder = paths.checkpoints
    torch.save(blank_state(5).to_dict(), folder / "step_00000005.pt")
    write(folder, blank_state(6).to_dict(), put("model", "head.weight", value=ONE), 6)
    saved(shared(60))(folder / "step_00000007.pt")
    write(folder, blank_state(8).to_dict(), put("spec", "train", "seed", value=7), 8)
    write(folder, blank_state(9).to_dict(), put("spec", "train", "seed", value="\x1b]0;owned\x07"), 9)
    write(folder, blank_state(10).to_dict(), put("model", "\x1b[2J\n2026-01-01 00:00:00 FINISHED", value=ONE), 10)
    chosen = choose(context)
    assert chosen is not None and chosen.path.name == "step_00000005.pt"
    reasons = {event["file"]: event["reason"] for event in read_jsonl(paths.events) if event["event"] == "fallback"}
    assert list(reasons) == [f"step_{step:08d}.pt" for step in (10, 9, 8, 7, 6)]
    assert "model.head.weight: torch.float32 [1]" in reasons["step_00000006.pt"]
    assert "one list, mapping or tensor in several places" in reasons["step_00000007.pt"]
    assert "is of another run: " in reasons["step_00000008.pt"] and "train.seed: 7 -> 0" in reasons["step_00000008.pt"]
    log = paths.train_log.read_text()
    assert log.count("kept as step_") == log.count("\n") == 5 and "\x1b" not in log and "\x07" not in log


def test_a_file_of_a_later_version_is_not_passed_over(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path, "run")
    paths.create()
    torch.save(blank_state(5).to_dict(), paths.checkpoints / "step_00000005.pt")
    write(paths.checkpoints, blank_state(6).to_dict(), put("spec", "train", "later", value=7), 6)
    with pytest.raises(
        RunFailedError, match=r"step_00000006\.pt: its spec: train\.later: unknown key.*newer cifar_hpc"
    ):
        choose(Context(paths, BLANK, Launch(), StopFlag()))
    assert (paths.checkpoints / "step_00000006.pt").exists()


@pytest.mark.parametrize("section", ["model", "data"])
@pytest.mark.parametrize("place", ["elsewhere", "a run of its name", "a run with another target"])
def test_code_that_a_file_names_is_not_run(
    tmp_path: Path, content: dict[str, Any], section: str, place: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Only what the run's own spec names is run, and a checkpoint is not part of that."""
    monkeypatch.setenv("CIFAR_HPC_ROOT", str(tmp_path))
    trace = tmp_path / "trace"

    def edit(content: dict[str, Any]) -> None:
        content["spec"][section] = {"target": "os:system", "args": {"command": f"touch {trace}"}}
        content["dataset"] = DATASET

    paths = RunPaths(tmp_path, "run")
    paths.create()
    spec = {**content["spec"], section: {"target": "torchvision.models:resnet18"} if section == "model" else {}}
    if place == "a run with another target":
        freeze(paths, from_plain(spec))
    path = write(tmp_path if place == "elsewhere" else paths.checkpoints, content, edit)
    for command in ("evaluate", "export", "predict", "inspect"):
        more = {"export": ["--out", str(tmp_path / "x.safetensors")], "predict": [str(path), "--out", "-"]}.get(
            command, []
        )
        needs = command == "evaluate" or (section == "model" and command != "inspect")
        assert main([command, str(path), *more]) in ((2,) if needs else (0, 1, 2)), command
        assert "Traceback" not in capsys.readouterr().err
    assert not trace.exists()

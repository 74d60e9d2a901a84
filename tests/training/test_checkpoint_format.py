"""Checkpoints: readable without pickle, verified to the last bit, and sums of what they mean."""

from __future__ import annotations

import copy
import dataclasses
import io
import os
import pickle
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import snapshot, take_steps, tiny_engine, tiny_spec
from hypothesis import given, settings, strategies
from torch import Tensor

from cifar_hpc import tensorfile
from cifar_hpc.config.io import to_plain
from cifar_hpc.data.datasets import CIFAR10
from cifar_hpc.errors import RunFailedError
from cifar_hpc.tensorfile import BadFileError, digest, seal
from cifar_hpc.training.checkpoints import format as checkpoint_format
from cifar_hpc.training.checkpoints.format import FORMAT, REQUIRED, TrainingState, read_checkpoint, to_host

# In the order of the file, which has been the same since format 1.
KEYS = (
    "format", "spec", "epoch", "step_in_epoch", "step", "epoch_seconds", "best", "model", "buffers", "optimizer",
    "scaler", "updates", "average", "slow_buffers", "sums", "history", "environment",
    "dataset",
)  # fmt: skip


@pytest.fixture(scope="module")
def training_state() -> TrainingState:
    """What a run with everything in it saves: Lookahead, momentum, GradScaler, averaged weights, history."""
    spec = tiny_spec(train={"amp": "fp16"}, ema={"decay": 0.9})
    engine = tiny_engine(spec)
    take_steps(engine, 0, 4)
    return dataclasses.replace(
        snapshot(engine),
        spec=to_plain(spec),
        step=6,
        epoch=2,
        step_in_epoch=2,
        slow_buffers=to_host(engine.buffers()),
        epoch_seconds=1.5,
        history='{"epoch": 1, "step": 2}\n{"epoch": 2, "step": 4}\n',
        best={"epoch": 2, "test_accuracy": 11.5},
        environment={"device": "cpu", "cuda": None, "amp": "fp16", "torch": "2", "data": "0", "more": [True]},
        dataset={"classes": list(CIFAR10), "image_size": 32, "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.3]},
    )


@pytest.fixture(scope="module")
def state(training_state: TrainingState) -> dict[str, Any]:
    """The content of its file, before it is sealed."""
    return {key: value for key, value in training_state.to_dict().items() if key != "digest"}


@pytest.fixture
def path(tmp_path: Path, state: dict[str, Any]) -> Path:
    path = tmp_path / "step_00000006.pt"
    torch.save(seal(copy.deepcopy(state)), path)
    return path


def tensors(tree: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    if isinstance(tree, Tensor):
        yield name, tree
    elif isinstance(tree, (dict, list)):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from tensors(value, f"{name}/{key}")


def test_round_trip_is_whole_and_needs_no_pickle(path: Path, state: dict[str, Any]) -> None:
    loaded = torch.load(path, weights_only=True)
    assert list(loaded) == [*KEYS, "digest"]
    assert digest({k: v for k, v in loaded.items() if k != "digest"}) == digest(state)
    found = read_checkpoint(path)
    assert found.digest == loaded["digest"]
    assert digest(vars(found)) == digest({k: v for k, v in loaded.items() if k != "format"})
    assert found.rows == [{"epoch": 1, "step": 2}, {"epoch": 2, "step": 4}]
    assert found.scaler["scale"] > 0


def test_without_an_average_the_file_has_no_such_key(tmp_path: Path, training_state: TrainingState) -> None:
    spec = {**training_state.spec, "ema": {"decay": None}}
    plain = dataclasses.replace(training_state, average=None, spec=spec)
    torch.save(plain.to_dict(), tmp_path / "plain.pt")
    assert (
        set(torch.load(tmp_path / "plain.pt", weights_only=True))
        == {*KEYS, "digest"} - {"average"}
        == {*REQUIRED, "dataset"}
    )
    found = read_checkpoint(tmp_path / "plain.pt")
    assert found.average is None
    assert found.to_dict() == found.to_dict() | {"digest": found.digest}


def test_keys_of_a_later_version_of_the_code_are_ignored(tmp_path: Path, state: dict[str, Any]) -> None:
    torch.save(seal({**state, "more": 1}), tmp_path / "more.pt")
    assert read_checkpoint(tmp_path / "more.pt").step == 6


def test_one_flipped_bit_in_any_tensor_is_found(tmp_path: Path, path: Path) -> None:
    names = [name for name, _ in tensors(torch.load(path, weights_only=True))]
    assert len(names) > 100
    good = digest(torch.load(path, weights_only=True))
    for number, name in enumerate(names):
        loaded = torch.load(path, weights_only=True)
        tensor = dict(tensors(loaded))[name]
        raw = tensor.flatten().view(torch.uint8) if tensor.is_contiguous() else tensor.permute(0, 2, 3, 1).flatten()
        raw = raw.view(torch.uint8)
        raw[number % len(raw)] ^= 1 << number % 8  # a view of the tensor's memory, or a copy of it
        if not tensor.is_contiguous():
            shape = [tensor.shape[i] for i in (0, 2, 3, 1)]
            tensor.copy_(raw.view(tensor.dtype).view(shape).permute(0, 3, 1, 2))
        assert digest(loaded) != good, name
    torch.save(loaded, tmp_path / "flipped.pt")
    with pytest.raises(BadFileError, match="does not match its digest"):
        read_checkpoint(tmp_path / "flipped.pt")


@pytest.mark.parametrize("key", [k for k in REQUIRED if k not in ("digest", "format")])
def test_every_part_is_covered_by_the_digest(tmp_path: Path, path: Path, key: str) -> None:
    loaded = torch.load(path, weights_only=True)
    loaded[key] = "another"
    torch.save(loaded, tmp_path / "changed.pt")
    with pytest.raises(BadFileError, match="damaged"):
        read_checkpoint(tmp_path / "changed.pt")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: b"", "^empty$"),
        (lambda content: content[:3], "no file of torch.save"),
        (lambda content: content[:100], "cut short"),
        (lambda content: content[:-1], "cut short"),
        (lambda content: content[: len(content) // 2], "cut short"),
        (lambda content: b"\0" * len(content), "no file of torch.save"),
        (lambda content: b"\x89PNG" + content[4:], "no file of torch.save"),
        (lambda content: b"some text", "no file of torch.save, or damaged: it begins with b'some'"),
    ],
    ids=["empty", "three bytes", "head only", "last byte lost", "half", "zeros", "other magic", "text"],
)
def test_damaged_files(path: Path, damage: Callable[[bytes], bytes], message: str) -> None:
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(BadFileError, match=message):
        read_checkpoint(path)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    """A checkpoint of a few kilobytes, most of which are structure."""
    keys = [k for k in REQUIRED if k != "digest"]
    tree = dict.fromkeys(keys, 0) | {
        "format": FORMAT,
        "model": {"a": torch.arange(64.0), "b": torch.ones(3)},
    }
    path = tmp_path_factory.mktemp("flips") / "step_00000000.pt"
    torch.save(seal(tree), path)
    return path, path.read_bytes()


@settings(max_examples=1000, derandomize=True, deadline=None, database=None)
@given(data=strategies.data())
def test_one_flipped_bit_anywhere_in_the_file(small: tuple[Path, bytes], data: strategies.DataObject) -> None:
    """It is found, or it is where it does not matter (padding, a time stamp): what is read is what was saved."""
    path, whole = small
    bit = data.draw(strategies.integers(0, 8 * len(whole) - 1))
    flipped = bytearray(whole)
    flipped[bit // 8] ^= 1 << bit % 8
    path.write_bytes(flipped)
    try:
        state = read_checkpoint(path)
    except BadFileError:
        return
    path.write_bytes(whole)
    assert digest(state) == digest(read_checkpoint(path))


def test_a_flipped_bit_in_any_byte_that_counts_is_found(small: tuple[Path, bytes]) -> None:
    """All of the pickle, all tensors: every single byte."""
    path, whole = small
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        records = [(r.filename, archive.read(r)) for r in archive.infolist() if "/data" in r.filename]
    found = 0
    for name, content in records:
        place = whole.index(content)
        for byte in range(place, place + len(content)):
            flipped = bytearray(whole)
            flipped[byte] ^= 1 << byte % 8
            path.write_bytes(flipped)
            with pytest.raises(BadFileError, match=f"the sum of its record .*{name.partition('/')[2]} is wrong"):
                read_checkpoint(path)
            found += 1
    assert found > 800


def test_nothing_is_interpreted_before_the_sums_are_right(
    small: tuple[Path, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch.load itself does not look at them: a damaged pickle could ask for any amount of memory."""
    content = bytearray(small[1])
    content[content.index(b"step_in_epoch")] ^= 1
    torch.load(io.BytesIO(content), weights_only=True)
    path = tmp_path / "flipped.pt"
    path.write_bytes(content)
    monkeypatch.setattr(tensorfile, "_Reader", lambda *_: pytest.fail("interpreted"))
    with pytest.raises(BadFileError, match="the sum of its record"):
        read_checkpoint(path)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(BadFileError, match="there is no such file"):
        read_checkpoint(tmp_path / "none.pt")


def test_what_is_no_file(tmp_path: Path) -> None:
    path = tmp_path / "step_00000006.pt"
    os.mkfifo(path)
    with pytest.raises(BadFileError, match="is no regular file but a FIFO"):  # and not: waits for a writer
        read_checkpoint(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(BadFileError, match="is no regular file but a directory"):
        read_checkpoint(path)
    path.rmdir()
    path.symlink_to(path)
    with pytest.raises(BadFileError, match="Too many levels of symbolic links"):
        read_checkpoint(path)
    path.unlink()
    path.symlink_to("nowhere")
    with pytest.raises(BadFileError, match="a link to nothing"):
        read_checkpoint(path)


def test_a_link_to_a_checkpoint_is_one(path: Path, tmp_path: Path) -> None:
    (tmp_path / "link.pt").symlink_to(path)
    assert read_checkpoint(tmp_path / "link.pt").step == 6


@pytest.mark.parametrize("content", [{"model": {}}, [1, 2], torch.zeros(3)])
def test_foreign_files(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "foreign.pt")
    with pytest.raises(BadFileError, match="not a checkpoint of cifar_hpc"):
        read_checkpoint(tmp_path / "foreign.pt")


class Evil:
    """What torch.load would run if it were allowed to unpickle anything."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("evil",)


@pytest.mark.parametrize("kind", ["in a file of torch.save", "in an old one", "bare", "beside what a checkpoint holds"])
def test_code_in_a_file_is_not_run_and_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: dict[str, Any], kind: str
) -> None:
    monkeypatch.chdir(tmp_path)
    if kind == "bare":
        Path("evil.pt").write_bytes(pickle.dumps(Evil()))
    elif kind == "beside what a checkpoint holds":
        torch.save({**seal(copy.deepcopy(state)), "more": Evil()}, "evil.pt")
    else:
        torch.save({"format": Evil()}, "evil.pt", _use_new_zipfile_serialization=kind == "in a file of torch.save")
    old = kind in ("bare", "in an old one")
    words = (
        "a bare pickle.* nothing in it was executed"
        if old
        else r"holds code \(pickle globals: posix\.mkdir\), which was not executed"
    )
    with pytest.raises(BadFileError, match=words):
        read_checkpoint(Path("evil.pt"))
    assert not Path("evil").exists()
    pickle.loads(pickle.dumps(Evil()))
    assert Path("evil").exists(), "the payload is a real one"


def test_compressed_files_are_refused_unread(path: Path, tmp_path: Path) -> None:
    """A bomb of a few kilobytes unpacks to gigabytes; torch.save never compresses."""
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(tmp_path / "z.pt", "w", zipfile.ZIP_DEFLATED) as packed:
        for record in archive.infolist():
            packed.writestr(record.filename, archive.read(record))
    with pytest.raises(BadFileError, match="compressed"):
        read_checkpoint(tmp_path / "z.pt")


def test_what_has_no_bytes_to_sum_up_is_refused(tmp_path: Path, state: dict[str, Any]) -> None:
    odd = {**seal(copy.deepcopy(state)), "model": torch.ones(3).to_sparse()}
    torch.save(odd, tmp_path / "odd.pt")
    with pytest.raises(BadFileError, match=r"holds what no .* does \(torch\._utils\._rebuild_sparse_tensor\)"):
        read_checkpoint(tmp_path / "odd.pt")


@pytest.mark.parametrize(("version", "writer"), [(99, "a newer"), (0, "an older")])
def test_another_format_version(tmp_path: Path, state: dict[str, Any], version: int, writer: str) -> None:
    torch.save(seal({**state, "format": version}), tmp_path / "new.pt")
    # Not a BadFileError: such a file is whole, and nobody should go back to an older one because of it.
    with pytest.raises(
        RunFailedError, match=f"format version {version}, written by {writer} cifar_hpc; this one reads version 1. HINT"
    ):
        read_checkpoint(tmp_path / "new.pt")


def test_a_file_of_somebody_else_is_no_damaged_one(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(RunFailedError, match=r"cannot be read: Permission denied\. HINT"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (OSError(116, "Stale file handle"), OSError),
        (RuntimeError("[enforce fail] . DefaultCPUAllocator: can't allocate memory: you tried ..."), MemoryError),
    ],
)
def test_what_says_nothing_about_the_file_does_not_condemn_it(
    path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, kind: type[Exception]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(torch, "empty", fail)
    with pytest.raises(kind):
        read_checkpoint(path)


def test_a_missing_part_is_named(tmp_path: Path, state: dict[str, Any]) -> None:
    torch.save(seal({k: v for k, v in state.items() if k not in ("sums", "best")}), tmp_path / "short.pt")
    with pytest.raises(BadFileError, match="incomplete: best, sums missing"):
        read_checkpoint(tmp_path / "short.pt")


def test_digests_do_not_depend_on_the_layout_in_memory() -> None:
    x = torch.randn(4, 6, 3, 3)
    wide = torch.empty(4, 12, 3, 3)
    wide[:, ::2] = x
    same = [x, x.to(memory_format=torch.channels_last), x.transpose(0, 1).contiguous().transpose(0, 1), wide[:, ::2]]
    assert len({digest(t) for t in same}) == 1
    assert digest(x) != digest(x.transpose(2, 3))
    assert digest(x) != digest(x.flatten())
    assert digest(torch.zeros(2)) != digest(torch.zeros(2, dtype=torch.float64)) != digest(-torch.zeros(2))


def test_digests_do_not_depend_on_the_order_of_keys_but_on_all_else() -> None:
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    trees = [{"a": 1}, {"a": 1.0}, {"a": "1"}, {"a": None}, {"a": [1]}, {"a": [1, 1]}, {"b": 1}, [1], {}, [], [[]]]
    assert len({digest(t) for t in trees}) == len(trees)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int64, torch.bool, torch.uint8])
def test_every_type_of_number_has_a_digest(dtype: torch.dtype) -> None:
    assert digest(torch.ones(3).to(dtype)) != digest(torch.tensor([1, 1, 0]).to(dtype))
    assert digest(torch.ones((), dtype=dtype)) != digest(torch.ones(1, dtype=dtype))
    assert digest(torch.ones(0, dtype=dtype)) != digest(torch.ones(0, 1, dtype=dtype))


def test_digests_name_the_five_parts(training_state: TrainingState) -> None:
    before = training_state.digests()
    assert set(before) == {"fast_weights", "slow_weights", "averaged_weights", "momentum", "bn_buffers"}
    assert len(set(before.values())) == 5
    changes: dict[str, Callable[[Any], Tensor]] = {
        "fast_weights": lambda s: s.model["head.bias"],
        "slow_weights": lambda s: s.optimizer["slow"][3],
        "averaged_weights": lambda s: s.average[5],
        "momentum": lambda s: s.optimizer["inner"]["state"][2]["momentum_buffer"],
        "bn_buffers": lambda s: s.buffers["stem.1.running_var"],
    }
    for part, choose in changes.items():
        other = copy.deepcopy(training_state)
        choose(other).view(-1)[0] += 1
        assert {k for k, v in other.digests().items() if v != before[k]} == {part}


def test_digests_of_a_plain_optimizer() -> None:
    engine = tiny_engine(tiny_spec(lookahead={"enabled": False}))
    engine.step(0, 0, 0, torch.arange(32))
    found = snapshot(engine).digests()
    assert found["slow_weights"] is None
    assert found["momentum"] != snapshot(tiny_engine(tiny_spec(lookahead={"enabled": False}))).digests()["momentum"]


class OnGpu(Tensor):
    """A tensor that says that it is on a GPU."""

    device = torch.device("cuda", 0)  # type: ignore[assignment]


def test_a_copy_needs_no_page_locked_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such memory is limited (ulimit -l), and may be used up."""
    monkeypatch.setattr(checkpoint_format, "_page_locked", True)
    empty_like, asked = torch.empty_like, list[bool]()

    def refuse(value: Tensor, *, device: str, pin_memory: bool) -> Tensor:
        asked.append(pin_memory)
        if pin_memory:
            raise RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported")
        return empty_like(value.as_subclass(Tensor), device=device)

    monkeypatch.setattr(torch, "empty_like", refuse)
    tree, warnings = {"a": torch.arange(3.0).as_subclass(OnGpu), "b": [torch.ones(2)]}, list[str]()
    for _ in range(2):
        copied = to_host(tree, warnings.append)
        assert copied["a"].tolist() == [0, 1, 2] and copied["b"][0].tolist() == [1, 1]
    assert asked == [True, False, False], "it was asked for once"
    (warning,) = warnings
    assert "CUDA error: out of memory. HINT: ulimit -l" in warning and "asynchronously" not in warning


def test_a_copy_on_the_host_shares_nothing() -> None:
    tree = {"a": [torch.zeros(2)], "b": ({"c": torch.ones(1)}, "text", 3)}
    copied = to_host(tree)
    tree["a"][0].add_(1)  # type: ignore[index, union-attr]
    assert copied == {"a": [copied["a"][0]], "b": [{"c": torch.ones(1)}, "text", 3]}
    assert copied["a"][0].tolist() == [0, 0]

"""Checkpoints: readable without pickle, verified to the last bit, and sums of what they mean."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_engine, tiny_spec
from torch import Tensor

from cifar_hpc import checkpoint
from cifar_hpc.checkpoint import BadCheckpointError, digest, read, seal, sums, to_host
from cifar_hpc.errors import RunFailedError
from cifar_hpc.spec_io import to_plain


@pytest.fixture(scope="module")
def state() -> dict[str, Any]:
    """What a run with everything in it saves: Lookahead, momentum, GradScaler, history."""
    spec = tiny_spec(train={"amp": "fp16"})
    engine = tiny_engine(spec)
    for step in range(4):
        engine.step(0, step, step, torch.arange(32) + 32 * step)
    return to_host(  # type: ignore[no-any-return]
        {
            "format": checkpoint.FORMAT,
            "spec": to_plain(spec),
            "step": 4,
            "epoch": 0,
            "step_in_epoch": 4,
            **engine.state(),
            "slow_buffers": engine.buffers(),
            "sums": engine.sums,
            "epoch_seconds": 1.5,
            "history": '{"epoch": 1}\n{"epoch": 2}\n',
            "best": {"epoch": 2, "test_accuracy": 11.5},
            "environment": {"device": "cpu", "cuda": None, "deterministic": True},
        }
    )


@pytest.fixture
def path(tmp_path: Path, state: dict[str, Any]) -> Path:
    path = tmp_path / "step_00000004.pt"
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
    assert set(loaded) == set(checkpoint.REQUIRED)
    assert digest({k: v for k, v in loaded.items() if k != "digest"}) == digest(state)
    assert read(path)["digest"] == loaded["digest"]
    assert checkpoint.history(loaded) == [{"epoch": 1}, {"epoch": 2}]
    assert loaded["scaler"]["scale"] > 0


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
    with pytest.raises(BadCheckpointError, match="does not match its digest"):
        read(tmp_path / "flipped.pt")


@pytest.mark.parametrize("key", [k for k in checkpoint.REQUIRED if k not in ("digest", "format")])
def test_every_part_is_covered_by_the_digest(tmp_path: Path, path: Path, key: str) -> None:
    loaded = torch.load(path, weights_only=True)
    loaded[key] = "another"
    torch.save(loaded, tmp_path / "changed.pt")
    with pytest.raises(BadCheckpointError, match="damaged"):
        read(tmp_path / "changed.pt")


def flip(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: b"", "not readable"),
        (lambda content: content[:100], "not readable"),
        (lambda content: content[:-1], "not readable"),
        (lambda content: content[: len(content) // 2], "not readable"),
        (lambda content: b"\0" * len(content), "not readable"),
        (lambda content: b"\x89PNG" + content[4:], "not readable"),
        (lambda content: flip(content, len(content) // 2), "not readable|damaged"),
    ],
    ids=["empty", "head only", "last byte lost", "half", "zeros", "other magic", "a flipped bit"],
)
def test_damaged_files(path: Path, damage: Callable[[bytes], bytes], message: str) -> None:
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(BadCheckpointError, match=message):
        read(path)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(BadCheckpointError, match="FileNotFoundError"):
        read(tmp_path / "none.pt")


@pytest.mark.parametrize("content", [{"model": {}}, [1, 2], torch.zeros(3)])
def test_foreign_files(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "foreign.pt")
    with pytest.raises(BadCheckpointError, match="not a checkpoint of cifar_hpc"):
        read(tmp_path / "foreign.pt")


class Evil:
    """What torch.load would run if it were allowed to unpickle anything."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("evil"),)


def test_code_in_a_file_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"format": Evil()}, "evil.pt")
    with pytest.raises(BadCheckpointError, match="not readable"):
        read(Path("evil.pt"))
    assert not Path("evil").exists()


def test_another_format_version(tmp_path: Path, state: dict[str, Any]) -> None:
    torch.save(seal({**state, "format": 99}), tmp_path / "new.pt")
    # Not a BadCheckpointError: such a file is whole, and nobody should go back to an older one because of it.
    with pytest.raises(RunFailedError, match="format version 99, but this code reads version 1"):
        read(tmp_path / "new.pt")


def test_a_missing_part_is_named(tmp_path: Path, state: dict[str, Any]) -> None:
    torch.save(seal({k: v for k, v in state.items() if k not in ("sums", "best")}), tmp_path / "short.pt")
    with pytest.raises(BadCheckpointError, match="incomplete: sums, best missing"):
        read(tmp_path / "short.pt")


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


def test_sums_name_the_four_parts(state: dict[str, Any]) -> None:
    before = sums(state)
    assert set(before) == {"fast_weights", "slow_weights", "momentum", "bn_buffers"}
    assert len(set(before.values())) == 4
    changes: dict[str, Callable[[dict[str, Any]], Tensor]] = {
        "fast_weights": lambda s: s["model"]["head.bias"],
        "slow_weights": lambda s: s["optimizer"]["slow"][3],
        "momentum": lambda s: s["optimizer"]["inner"]["state"][2]["momentum_buffer"],
        "bn_buffers": lambda s: s["buffers"]["stem.1.running_var"],
    }
    for part, choose in changes.items():
        other = copy.deepcopy(state)
        choose(other).view(-1)[0] += 1
        assert {k for k, v in sums(other).items() if v != before[k]} == {part}


def test_sums_of_a_plain_optimizer() -> None:
    engine = tiny_engine(tiny_spec(lookahead={"enabled": False}))
    engine.step(0, 0, 0, torch.arange(32))
    found = sums(engine.state())
    assert found["slow_weights"] is None
    assert found["momentum"] != sums(tiny_engine(tiny_spec(lookahead={"enabled": False})).state())["momentum"]


def test_a_copy_on_the_host_shares_nothing() -> None:
    tree = {"a": [torch.zeros(2)], "b": ({"c": torch.ones(1)}, "text", 3)}
    copied = to_host(tree)
    tree["a"][0].add_(1)  # type: ignore[index, union-attr]
    assert copied == {"a": [copied["a"][0]], "b": [{"c": torch.ones(1)}, "text", 3]}
    assert copied["a"][0].tolist() == [0, 0]

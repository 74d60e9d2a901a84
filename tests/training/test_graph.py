"""Steps that a CUDA graph may hold, tried without CUDA: nothing but tensors changes, and a traced step can be replayed.

The optimizer is the fused one of CUDA, as a CPU has it."""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import PLUS, snapshot, take_steps, tiny_engine, tiny_spec
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cifar_hpc import tensorfile
from cifar_hpc.config.io import merge, to_plain
from cifar_hpc.config.schedule import training_size
from cifar_hpc.config.spec import Spec
from cifar_hpc.errors import RunFailedError
from cifar_hpc.training import engine as engines
from cifar_hpc.training.checkpoints.format import read_checkpoint
from cifar_hpc.training.engine import Engine
from cifar_hpc.training.graph import WARM_UP
from cifar_hpc.training.inputs import StepInputs
from cifar_hpc.training.optim import Lookahead

WITHOUT_RESIZING = {key: value for key, value in PLUS.items() if key != "resizing"}
SPECS: dict[str, dict[str, Any]] = {
    "the report's": {"lookahead": {"k": 3}, "train": {"shards": 1}},
    "the report's in bf16": {"lookahead": {"k": 3}, "train": {"shards": 1, "amp": "bf16"}},
    "the report's in 4 shards": {"lookahead": {"k": 3}, "train": {"shards": 4}},
    "plus, of 16 pixels": PLUS | {"train": {"shards": 2}},
    "plus": WITHOUT_RESIZING | {"train": {"shards": 1}},
    "mixing without an average": {"mixing": PLUS["mixing"], "lookahead": {"k": 3}, "train": {"shards": 1}},
    "AdamW and an average": {
        "optimizer": {"name": "adamw", "lr": 0.001, "decay_all": False, "weight_decay": 0.01},
        "ema": {"decay": 0.9},
        "lookahead": {"k": 3},
        "train": {"shards": 1},
    },
}


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "capturable", lambda device, amp: True)


class Steps:
    """Steps of an engine, in which `compute` may be replaced."""

    def __init__(self, spec: Spec) -> None:
        self.engine = tiny_engine(spec)
        self.order, self.done = torch.arange(len(self.engine.data.train_images)), 0

    def __call__(self, compute: Callable[[StepInputs, int], None] | None = None) -> None:
        own = self.engine.compute
        if compute is not None:
            self.engine.compute = compute  # type: ignore[method-assign]
        try:
            self.engine.step(0, self.done, self.done, self.order)
        finally:
            self.engine.compute = own  # type: ignore[method-assign]
        self.done += 1

    @property
    def syncs_next(self) -> bool:
        optimizer = self.engine.optimizer
        return isinstance(optimizer, Lookahead) and optimizer.syncs_next


class Numbers(TorchDispatchMode):
    """Notes each operation, and all of its arguments but tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace != "profiler":
            leaves = [leaf if not isinstance(leaf, Tensor) else leaf.shape for leaf in tree_leaves((args, kwargs))]
            self.seen.append(f"{func} {leaves}")
        return func(*args, **(kwargs or {}))


def numbers(steps: Steps) -> list[str]:
    noted = Numbers()

    def compute(inputs: StepInputs, side: int) -> None:
        with noted:
            Engine.compute(steps.engine, inputs, side)

    steps(compute)
    return noted.seen


@pytest.mark.parametrize("name", SPECS)
def test_only_tensors_change_from_step_to_step(name: str) -> None:
    steps = Steps(tiny_spec(**SPECS[name]))
    steps()  # the optimizer makes its momentum
    seen: dict[bool, list[str]] = {}
    for _ in range(6):
        kind = steps.syncs_next
        now = numbers(steps)
        assert now == seen.setdefault(kind, now)
    if isinstance(steps.engine.optimizer, Lookahead):
        assert len(seen) == 2
        assert seen[True] != seen[False]
    assert any("sgd" in each or "adamw" in each for each in seen[False])


def tensors(engine: Engine, inputs: StepInputs) -> list[Tensor]:
    """All that a step reads or changes."""
    state = (engine.state(), engine.sums, engine.bad_step, [group["lr"] for group in engine.optimizer.param_groups])
    average = engine.average._weight if engine.average is not None else None
    optimizer = getattr(engine.optimizer, "inner", engine.optimizer)
    moments = [optimizer.state[p] for p in engine.model.parameters()]
    data = (engine.data.train_labels,)
    leaves = tree_leaves((state, average, moments, data, tuple(inputs)))
    return list({id(leaf): leaf for leaf in leaves if isinstance(leaf, Tensor)}.values())


@pytest.mark.parametrize("name", SPECS)
def test_a_traced_step_replays_with_the_same_bits(name: str) -> None:
    """As a CUDA graph does, it starts the same operations again, on what is then in the buffers."""
    eager, replayed = (Steps(tiny_spec(**SPECS[name])) for _ in range(2))
    engine, traces = replayed.engine, dict[bool, Any]()

    def replay(inputs: StepInputs, side: int) -> None:
        kind, found = replayed.syncs_next, tensors(engine, inputs)
        if kind not in traces:
            traces[kind] = make_fx(lambda *_: Engine.compute(engine, inputs, side))(*found)
            return
        with torch.no_grad():
            traces[kind](*found)
        engine.updates += 1
        if isinstance(engine.optimizer, Lookahead):
            engine.optimizer.counter += 1

    for number in range(8):
        eager()
        replayed(replay if number > 0 else None)  # the optimizer makes its momentum in the first step
        assert snapshot(eager.engine).digests() == snapshot(engine).digests(), number
        assert torch.equal(eager.engine.sums, engine.sums)
    assert len(traces) == 1 + isinstance(engine.optimizer, Lookahead)


class FakeGraph(TorchDispatchMode):
    """Does on a CPU what a CUDA graph does: keeps the memory of all operands, and repeats the operations on it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace != "profiler" and not func.is_view:
            self.calls.append((func, args, kwargs or {}, result))
        return result

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, result in self.calls:
            again = func(*args, **kwargs)
            for own, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if own is not new:
                    own.copy_(new)


class FakeCapture:
    """Captures what its context does, which a capture does not carry out: the state is as before, afterwards."""

    def __init__(self, graph: FakeGraph, state: Callable[[], list[Tensor]]) -> None:
        self.graph, self.state = graph, state

    def __enter__(self) -> None:
        self.before = [(tensor, tensor.detach().clone()) for tensor in self.state()]
        self.graph.__enter__()

    @torch.no_grad()
    def __exit__(self, *error: Any) -> None:
        self.graph.__exit__(*error)
        for tensor, value in self.before:
            tensor.copy_(value)


class FakeCuda:
    """What of torch.cuda an engine with graphs calls, on a CPU; and the graphs that it has captured."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.graphs: list[FakeGraph] = []
        self.state: Callable[[], list[Tensor]] = list
        self.inside = False  # the stream of the captures
        stream = SimpleNamespace(wait_stream=lambda other: None)
        fakes = {"Stream": lambda device: stream, "current_stream": lambda: stream, "stream": self.stream,
                 "CUDAGraph": FakeGraph, "graph": self.graph, "graph_pool_handle": lambda: (0, 1)}  # fmt: skip
        for key, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, key, fake)

    @contextmanager
    def stream(self, chosen: object) -> Iterator[None]:
        self.inside = True
        yield
        self.inside = False

    def graph(self, graph: FakeGraph, **options: Any) -> FakeCapture:
        assert options.keys() == {"pool", "stream", "capture_error_mode"}
        self.graphs.append(graph)
        return FakeCapture(graph, self.state)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    return FakeCuda(monkeypatch)


@pytest.mark.parametrize("name", SPECS)
def test_an_engine_with_graphs_takes_the_same_steps(name: str, cuda: FakeCuda) -> None:
    """Two epochs with an odd last batch each; only what CUDA itself does is a stand-in."""
    sections = merge(SPECS[name], {"train": {"epochs": 3}})
    eager = tiny_engine(tiny_spec(**sections))
    whole = tiny_engine(tiny_spec(**merge(sections, {"train": {"graph": "on"}})))
    cuda.state = lambda: tensors(whole, StepInputs(*[eager.bad_step] * 5, 0))
    for epoch in range(2):
        for engine in (eager, whole):
            take_steps(engine, 0, engine.steps_per_epoch, epoch)
        one, other = (dataclasses.replace(snapshot(engine), spec=to_plain(eager.spec)) for engine in (eager, whole))
        assert one.digests() == other.digests(), epoch
        assert (one.updates, one.optimizer.get("counter")) == (other.updates, other.optimizer.get("counter"))
        assert torch.equal(eager.sums, whole.sums)
    sizes = {training_size(whole.spec, epoch) for epoch in range(2)}
    assert len(cuda.graphs) == len(sizes) * (1 + isinstance(whole.optimizer, Lookahead))


def graphed(cuda: FakeCuda) -> tuple[Engine, list[bool]]:
    """An engine with graphs, and whether each of its forward passes was in the stream of the captures."""
    engine, seen = tiny_engine(tiny_spec(train={"shards": 1, "graph": "on"})), list[bool]()
    cuda.state = lambda: tensors(engine, StepInputs(*[engine.bad_step] * 5, 0))
    engine.model.get_submodule("stem").register_forward_hook(lambda *_: seen.append(cuda.inside))
    return engine, seen


def test_all_backward_passes_without_a_graph_are_in_the_captures_stream(cuda: FakeCuda) -> None:
    """A node of a network's graph that is kept from another stream makes a capture fail."""
    engine, seen = graphed(cuda)
    engine.first_gradient()
    take_steps(engine, 0, engine.steps_per_epoch)
    kinds = len(cuda.graphs)
    assert seen == [True] * (1 + WARM_UP) + [False] * kinds + [True], "the last batch is a smaller one"
    assert kinds == 2


@pytest.mark.parametrize(
    ("error", "expected", "words"),
    [
        (RuntimeError("an operation waits"), RunFailedError, r"train\.graph: on: .*an operation waits.*graph: off"),
        (torch.OutOfMemoryError("CUDA out of memory"), torch.OutOfMemoryError, "out of memory"),
    ],
)
def test_the_first_error_of_a_capture_is_told(
    cuda: FakeCuda,
    monkeypatch: pytest.MonkeyPatch,
    error: RuntimeError,
    expected: type[Exception],
    words: str,
) -> None:
    engine, _ = graphed(cuda)

    class Invalid(FakeCapture):
        def __exit__(self, *errors: Any) -> None:
            super().__exit__(*errors)
            if not isinstance(error, torch.OutOfMemoryError):
                raise RuntimeError("operation failed due to a previous error during capture")

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(torch.cuda, "graph", lambda graph, **options: Invalid(graph, cuda.state))
    take_steps(engine, 0, WARM_UP)
    engine.model.register_forward_hook(fail)
    with pytest.raises(expected, match=words) as caught:
        take_steps(engine, WARM_UP, WARM_UP + 1)
    assert "previous error" not in str(caught.value)


@pytest.mark.parametrize("optimizer", [{}, {"name": "adamw", "lr": 0.001}])
def test_a_checkpoint_goes_on_there_with_the_same_bits_and_elsewhere_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: dict[str, Any]
) -> None:
    spec = tiny_spec(optimizer=optimizer, ema={"decay": 0.9}, schedule={"per": "step"})
    whole, resumed = tiny_engine(spec), tiny_engine(spec)
    take_steps(whole, 0, 3)
    path = tmp_path / "step.pt"
    with path.open("wb") as file:
        tensorfile.save(dataclasses.replace(snapshot(whole), spec=to_plain(spec)).to_dict(), file)
    state = read_checkpoint(path)
    resumed.load(state)
    assert resumed.rate == whole.rate
    for engine in (whole, resumed):
        take_steps(engine, 3, 6)
    assert snapshot(whole).digests() == snapshot(resumed).digests()
    monkeypatch.setattr(engines, "capturable", lambda device, amp: False)
    elsewhere = tiny_engine(spec)
    elsewhere.load(state)
    take_steps(elsewhere, 3, 6)
    assert elsewhere.rate == whole.rate
    for one, other in zip(elsewhere.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)  # a fused update rounds otherwise

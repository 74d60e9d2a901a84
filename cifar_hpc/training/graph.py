"""CUDA graphs of whole training steps: one launch in place of hundreds, and the same bits.

A graph repeats its operations with the same numbers, on the same memory. So all that changes from step to step is in
tensors (`StepInputs`, the optimizer's rate), and what is left is a choice between a few graphs. See "CUDA graphs" in
PyTorch's notes on CUDA semantics."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from cifar_hpc.config import user_code
from cifar_hpc.errors import RunFailedError
from cifar_hpc.training.inputs import StepInputs
from cifar_hpc.training.optim import Lookahead

if TYPE_CHECKING:
    from cifar_hpc.training.engine import Engine

# Eager steps before the first capture for a size of images: libraries choose kernels and allocate workspaces in them.
WARM_UP = 3


def capturable(device: torch.device, amp: str) -> bool:
    """Return whether a step on this device may be captured; GradScaler, under fp16, waits for the device."""
    return device.type == "cuda" and amp != "fp16"


@dataclass(frozen=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    inputs: StepInputs  # the memory that the graph reads


class StepGraphs:
    """Steps of an engine as CUDA graphs, captured when first met.

    There is one for steps with Lookahead's sync and one for the others, for each size of the training images.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._eager: Counter[int] = Counter()  # steps of whole batches, by size of the images
        self._captured: dict[tuple[bool, int], _Captured] = {}
        self._stream = torch.cuda.Stream(engine.device)  # capture is not possible on the default stream
        self._pool = torch.cuda.graph_pool_handle()  # graphs that never run at the same time share memory

    def step(self, inputs: StepInputs, side: int) -> None:
        """Take a step, as `Engine.compute` does; of an epoch's smaller last batch without a graph."""
        optimizer, whole = self._engine.optimizer, inputs.batch == self._engine.spec.train.batch_size
        look = optimizer if isinstance(optimizer, Lookahead) else None
        sync = look is not None and look.syncs_next
        found = self._captured.get((sync, side))
        if not whole or (found is None and self._eager[side] < WARM_UP):
            self._eager[side] += whole
            with self.stream():
                self._engine.compute(inputs, side)
            return
        if found is None:
            # This runs the Python code once, which counts the update, but no operation.
            found = self._captured[sync, side] = self._capture(inputs, side)
        else:
            self._engine.updates += 1
            if look is not None:
                look.counter += 1
        found.inputs.copy_(inputs)
        found.graph.replay()

    @contextmanager
    def stream(self) -> Iterator[None]:
        """Give the context the stream of the captures.

        Each backward pass without a graph belongs there: a network may keep its nodes, which would still be of another
        stream in a capture.
        """
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            yield
        torch.cuda.current_stream().wait_stream(self._stream)

    def _capture(self, inputs: StepInputs, side: int) -> _Captured:
        own = inputs.clone()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                self._engine.compute(own, side)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            # The end of a capture that has failed raises another error.
            first = error.__context__ or error
            what = "train.graph: on: a step cannot be captured as a CUDA graph"
            raise RunFailedError(
                f"{user_code.explain(first, self._engine.code, what)}. HINT: start a new run with train.graph: off, or "
                "let nothing in the network wait for the GPU (.item(), if tensor: )."
            ) from error
        return _Captured(graph, own)

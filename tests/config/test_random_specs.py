"""Whatever spec is let through trains, or ends with an error that names what to mend: no traceback, no crash."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from cifar_hpc.config.io import from_plain
from cifar_hpc.errors import UserError
from cifar_hpc.runs.frozen_spec import freeze, resolve
from cifar_hpc.runs.paths import RunPaths
from cifar_hpc.training.attempt import Attempt
from cifar_hpc.training.context import Context
from cifar_hpc.training.process import Launch, StopFlag

LARGE = [1e3, 1e30, 1e38]
MANY = 2**31 - 1
TINY = [5e-324, 1e-300, 1e-45, 1e-8]


def pick(*values: Any) -> st.SearchStrategy[Any]:
    return st.sampled_from(values)


LAYER = st.tuples(pick(1, 2), pick(4, 5, 8))
SECTIONS = st.fixed_dictionaries(
    {
        "model": st.lists(LAYER, min_size=1, max_size=5).flatmap(
            lambda layers: st.fixed_dictionaries(
                {
                    "blocks": st.just([blocks for blocks, _ in layers]),
                    "widths": st.just([width for _, width in layers]),
                    "stem_width": pick(1, 3),
                    "dropout": pick(0, 0.1, 0.95),
                    "activation": pick("relu", "leaky_relu"),
                }
            )
        ),
        "train": st.fixed_dictionaries(
            {
                "epochs": pick(1, 2),
                "batch_size": pick(1, 2, 7, 33, MANY),
                "shards": pick(None, 1, 2, 3),
                "cpu_threads": pick(1, 1, 2),
                "device": st.just("cpu"),
                "amp": pick("fp32", "fp32", "fp32", "bf16", "fp16", "auto"),
                "label_smoothing": pick(0, 0.1, 1),
                "seed": pick(0, MANY),
                "log_seconds": pick(1e-300, 30),
            }
        ),
        "data": st.fixed_dictionaries(
            {"source": st.just("synthetic"), "train_size": pick(1, 3, 17), "test_size": pick(1, 11)}
        ),
        "lookahead": st.fixed_dictionaries(
            {
                "enabled": st.booleans(),
                "k": pick(1, 5, MANY),
                "alpha": pick(1e-300, 0.5, 1),
                "bn_batches": pick(0, 3, MANY),
            }
        ),
        "optimizer": st.fixed_dictionaries(
            {
                "lr": pick(0.1, 0.1, *TINY, *LARGE),
                "momentum": pick(0, 0.9, 1),
                "weight_decay": pick(0, 1e-4, *LARGE),
                "nesterov": st.just(False),
                "bias_factor": pick(1, 16, 1e6),
            }
        ),
        "schedule": st.fixed_dictionaries({"name": pick("cosine", "linear", "constant"), "per": pick("epoch", "step")}),
        "checkpoint": st.fixed_dictionaries(
            {"every_epochs": pick(1, MANY), "every_steps": pick(None, 1, MANY), "keep": pick(1, MANY)}
        ),
        "augment": st.fixed_dictionaries(
            {
                "crop_padding": pick(0, 4, 31),
                "flip": pick(0, 0.5, 1),
                "rotation": pick(0, 1e-300, 15, 180),
                "brightness": pick(0, 0.2, *LARGE),
                "contrast": pick(0, 0.2, *LARGE),
                "saturation": pick(0, 0.2, *LARGE),
                "hue": pick(0, 0.1, 0.5),
                "erasing": pick(0, 0.5, 1),
                "erasing_scale": pick([0, 0], [0, 1], [1, 1], [0.02, 0.33], [1e-300, 1e-300]),
                "erasing_ratio": pick([0.3, 3.3], [1e-300, 1e38], [1e-300, 1e-300], [5e-324, 1e38]),
            }
        ),
    }
)


class Telling(Attempt):
    """An attempt that hands its error on instead of writing it down."""

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.failures.report = self.hand_on

    def hand_on(self, error: Exception) -> int:
        self.context.lock.release()
        raise error


@given(SECTIONS, st.booleans())
@settings(max_examples=20, derandomize=True, deadline=None, database=None)
def test_what_is_let_through_trains_or_says_why_not(sections: dict[str, Any], again: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        paths = RunPaths(Path(folder), "run")
        paths.create()
        try:
            spec = resolve(paths, from_plain(sections), 1, 1)
            freeze(paths, spec)
            for _ in range(2 if again else 1):
                assert Telling(Context(paths, spec, Launch(0, 1, 0, None, None), StopFlag())).run() == 0
        except UserError as error:
            assert str(error)

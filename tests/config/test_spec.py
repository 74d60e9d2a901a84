"""The spec: the report's recipe by default, and combinations of values that cannot be."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from helpers import tiny_spec

from cifar_hpc.config.io import load_spec
from cifar_hpc.config.spec import ResourcesSpec, Spec
from cifar_hpc.config.validate import check
from cifar_hpc.errors import SpecError


def test_defaults_are_the_recipe() -> None:
    spec = check(Spec())
    assert (spec.train.epochs, spec.optimizer.lr, spec.lookahead.k, spec.lookahead.alpha) == (400, 0.05, 5, 0.5)
    assert (spec.train.batch_size, spec.model.dropout, spec.model.activation) == (128, 0.2, "leaky_relu")


def test_every_key_is_documented() -> None:
    sections = [getattr(Spec(), f.name) for f in dataclasses.fields(Spec)]
    undocumented = [f.name for s in sections for f in dataclasses.fields(s) if not f.metadata.get("help")]
    assert undocumented == []


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"train": {"epochs": -1}}, r"train\.epochs: -1 .* integer >= 1"),
        ({"train": {"epochs": 0}}, r"train\.epochs: 0 "),
        ({"optimizer": {"lr": float("nan")}}, r"optimizer\.lr: nan .* number > 0"),
        ({"model": {"blocks": [1, 1], "widths": [8, 8, 8]}}, r"model\.blocks: \[1, 1\].*model\.widths \[8, 8, 8\]"),
        (
            {"model": {"blocks": [1] * 6, "widths": [8] * 6, "width_multiplier": 1}},
            r"model\.widths: 6 layers .* at most 5",
        ),
        ({"model": {"widths": [64, 3, 8], "width_multiplier": 1}}, r"model\.widths: 3 .* width 3; allowed: at least 4"),
        ({"model": {"widths": [64, 64, 8], "width_multiplier": 0.01}}, r"multiplier: 0\.01 makes a layer of width 1;"),
        ({"train": {"epochs": 10**9}}, r"train\.epochs: 1000000000 .* >= 1 and <= 1000000"),
        ({"optimizer": {"lr": 1e39}}, r"optimizer\.lr: 1e\+39 .* > 0 and <= 1e\+38"),
        ({"optimizer": {"weight_decay": 1e300}}, r"optimizer\.weight_decay"),
        ({"train": {"watchdog_minutes": 1e308}}, r"train\.watchdog_minutes"),
        ({"model": {"width_multiplier": 1e300}}, r"model\.width_multiplier"),
        ({"train": {"cpu_threads": 10**9}}, r"train\.cpu_threads"),
        ({"train": {"device": "cuda:²"}}, r"train\.device"),
        ({"resources": {"nodes": "²"}}, r"resources\.nodes"),
        ({"resources": {"nodes": "1" * 5000}}, r"resources\.nodes: '111.*5,002 characters"),
        ({"resources": {"tasks_per_node": 10**9}}, r"resources\.tasks_per_node"),
        ({"resources": {"dependency": "afterok:1?afterok:2"}}, r"resources\.dependency: .* singleton"),
        ({"resources": {"sbatch": {"depend": "afterok:1"}}}, r"resources\.sbatch\.depend: .* short for dependency"),
        ({"train": {"shards": 33}}, r"train\.shards: 33 .* train\.batch_size \(32\)"),
        ({"checkpoint": {"every_minutes": 1, "every_steps": 2}}, r"every_minutes: 1 and checkpoint\.every_steps: 2"),
        ({"optimizer": {"nesterov": True, "momentum": 0}}, r"optimizer\.nesterov"),
        ({"train": {"compile": True}}, r"train\.compile: true needs train\.deterministic: false"),
        ({"train": {"graph": "on", "amp": "fp16"}}, r"train\.graph: on does not go with train\.amp: fp16\. HINT"),
        ({"train": {"graph": "on", "compile": True, "deterministic": False}}, r"does not go with train\.compile: true"),
        ({"train": {"graph": "maybe"}}, r"train\.graph: 'maybe' is not allowed; allowed: auto, on, off"),
        ({"resources": {"sbatch": {"dependency": "afterok:1"}}}, r"resources\.sbatch\.dependency: .* --dependency"),
        ({"train": {"device": "gpu"}}, r"train\.device: 'gpu' .* cuda:N"),
        ({"train": {"device": "cpu:1"}}, r"train\.device"),
        ({"train": {"device": "cuda:x"}}, r"train\.device"),
        ({"resources": {"time": "soon"}}, r"resources\.time: 'soon'"),
        ({"resources": {"nodes": "4-2"}}, r"resources\.nodes: '4-2' .* MIN-MAX"),
        ({"resources": {"nodes": "0"}}, r"resources\.nodes"),
        ({"resources": {"nodes": "1-2-3"}}, r"resources\.nodes"),
        ({"augment": {"erasing_scale": [0.5, 0.1]}}, r"augment\.erasing_scale: .* smaller first"),
        ({"augment": {"erasing_ratio": [1.0]}}, r"augment\.erasing_ratio: \[1\.0\] .* list of 2"),
    ],
)
def test_values_that_cannot_be(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        tiny_spec(**sections)


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda", "cuda:3"])
def test_devices(device: str) -> None:
    assert tiny_spec(train={"device": device}).train.device == device


@pytest.mark.parametrize(
    ("resources", "nodes", "tasks"),
    [
        (ResourcesSpec(), 1, 1),
        (ResourcesSpec(nodes="1-4", gpus_per_node=8), 4, 8),
        (ResourcesSpec(gpus_per_node=0), 1, 1),
        (ResourcesSpec(nodes="1,4", gpus_per_node="a100:2"), 4, 2),
        (ResourcesSpec(gpus_per_node=4, tasks_per_node=2), 1, 2),
    ],
)
def test_resources(resources: ResourcesSpec, nodes: int, tasks: int) -> None:
    assert (resources.max_nodes, resources.ntasks_per_node) == (nodes, tasks)


@pytest.mark.parametrize(("nodes", "fewest"), [("2", None), ("1-4", 8), ("2-4", 16), ("3-3", 24)])
def test_fewest_tasks_of_a_range_of_nodes(nodes: str, fewest: int | None) -> None:
    assert ResourcesSpec(nodes=nodes, gpus_per_node=8).fewest_tasks == fewest


@pytest.mark.parametrize(("written", "meant"), [("on", "on"), ("off", "off"), ("auto", "auto"), ("'on'", "on")])
def test_on_and_off_are_words_although_yaml_reads_them_as_booleans(tmp_path: Path, written: str, meant: str) -> None:
    job = tmp_path / "job.yaml"
    job.write_text(f"train:\n  graph: {written}\n")
    assert load_spec(job).train.graph == load_spec(job, [f"train.graph={written}"]).train.graph == meant

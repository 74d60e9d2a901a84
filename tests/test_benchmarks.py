"""What the benchmarks rest on: fair peers, right arithmetic, and a suite that hides no failure.

The peer that needs Lightning is no requirement of the tests; it is tried by `python -m benchmarks.step` alone.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from helpers import build_model
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import chart, launches, suite
from benchmarks.launches import Operation
from benchmarks.measure import ROOT, Row, alternate, meets, quartiles, ratios, rounds, table
from benchmarks.peers import careful, naive
from benchmarks.peers.data import synthetic_images
from benchmarks.peers.lookahead import Lookahead as PublicLookahead
from benchmarks.peers.network import Network
from benchmarks.step import PRODUCTS, roofline, roofline_row
from cifar_hpc.config.io import load_spec
from cifar_hpc.config.spec import ModelSpec
from cifar_hpc.training.optim import Lookahead

NOBODY = {"cpu": "Intel(R) Xeon(R) Processor @ 2.60GHz", "cores": 2, "gpu": None}


class EnoughError(Exception):
    """Ends a peer's training."""


def test_the_peers_network_is_the_reports() -> None:
    ours, theirs = build_model(ModelSpec(), 0), Network()
    assert sum(p.numel() for p in theirs.parameters()) == 4_903_082
    assert sorted(p.shape for p in theirs.parameters()) == sorted(p.shape for p in ours.parameters())


def test_the_peers_network_computes_what_ours_does() -> None:
    ours, theirs = build_model(ModelSpec(), 0).eval(), Network().eval()
    with torch.no_grad():
        for parameter, value in zip(theirs.parameters(), ours.parameters(), strict=True):
            parameter.copy_(value)
        images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(theirs(images), ours(images), rtol=1e-4, atol=1e-4)


def test_the_peers_lookahead_computes_what_ours_does() -> None:
    weights = [torch.nn.Parameter(torch.arange(3.0)) for _ in range(2)]
    optimizers = [
        look(torch.optim.SGD([weight], lr=0.1, momentum=0.9), k=2, alpha=0.5)
        for look, weight in zip((Lookahead, PublicLookahead), weights, strict=True)
    ]
    for step in range(5):
        for weight, optimizer in zip(weights, optimizers, strict=True):
            weight.grad = torch.full((3,), float(step))
            optimizer.step()
    torch.testing.assert_close(*weights)


@pytest.mark.parametrize("peer", [naive, careful])
def test_a_peer_trains_and_saves_each_epoch(peer: object, tmp_path: Path) -> None:
    steps = 0

    def after_step() -> None:
        nonlocal steps
        steps += 1
        if steps == 4:  # in the second epoch
            raise EnoughError

    images = synthetic_images(16)
    with pytest.raises(EnoughError):
        peer.train(images, tmp_path, after_step, batch_size=8, workers=0, width=8)  # type: ignore[attr-defined]
    weights = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    weights = weights.get("model", weights)
    torch.manual_seed(0)
    assert weights.keys() == Network(8).state_dict().keys()
    assert all(bool(value.isfinite().all()) for value in weights.values())


def test_the_peers_images_are_augmented_and_normalised() -> None:
    images = synthetic_images(4)
    first, label = images[0]
    assert isinstance(first, torch.Tensor)
    assert first.shape == (3, 32, 32)
    assert first.dtype == torch.float32
    assert label in range(10)
    assert not torch.equal(first, images[0][0])
    assert first.min() < -0.5 < 0.5 < first.max()


@pytest.fixture(scope="module")
def recipe() -> dict[str, dict[str, float]]:
    """Counts for the report's recipe: the full depth, which decides on launches, and a narrow width."""
    return launches.count(load_spec(ROOT / "jobs" / "improved_resnet.yaml", ["model.width_multiplier=0.0625"]), steps=8)


def test_a_step_of_the_reports_recipe_has_few_operations_that_launch_a_kernel(
    recipe: dict[str, dict[str, float]],
) -> None:
    assert sum(part["operations"] for part in recipe.values()) <= 335  # 350 is the goal


def test_each_part_of_a_step_is_counted_where_its_code_stands(recipe: dict[str, dict[str, float]]) -> None:
    network = Network(4)
    convolutions = sum(isinstance(module, torch.nn.Conv2d) for module in network.modules())
    forward, backward = recipe["forward"], recipe["backward"]
    assert forward["operations"] > 3 * convolutions  # with BatchNorm and activation
    assert 1.9 < backward["flops"] / forward["flops"] < 2.1
    assert 1 < recipe["optimizer"]["operations"] < 10  # _foreach_: not one for each parameter
    assert recipe["augmentation"]["bytes"] > 2 * 3 * 32 * 32  # reads uint8, writes float32
    with FlopCounterMode(display=False) as counter:
        Network(4)(torch.zeros(2, 3, 32, 32)).sum().backward()
    assert forward["flops"] + backward["flops"] == counter.get_total_flops() / 2


def test_operations_on_a_fake_gpu_are_counted_and_nothing_waits_for_it() -> None:
    with launches.fake_gpu() as recorder:
        x = torch.zeros(4, 8, device=launches.GPU)
        assert x.device.type == "cuda"
        moved = torch.ones(8).to(launches.GPU)  # a copy from the host
        (x.view(8, 4).t() + x[0, 0]).add_(1)
        x.copy_(moved)
        x.index_select(0, torch.arange(2, device=launches.GPU))
        torch._foreach_add_([x, moved], [x, moved])
        torch.zeros(8)  # on the host
        with pytest.raises(DataDependentOutputException):
            x.sum().item()
    found = [(one.name, one.bytes) for one in recorder.operations]
    assert found == [
        ("zeros", 128), ("copy from the host", 32), ("add", 128 + 4 + 128), ("add_", 2 * 128), ("copy_", 32 + 128),
        ("arange", 16), ("index_select", 64 + 16 + 64), ("_foreach_add_", 3 * (128 + 32)), ("sum", 128 + 4),
    ]  # fmt: skip


def test_quartiles_of_one_and_of_many() -> None:
    assert quartiles([3.0]) == [3, 3, 3]
    assert quartiles([4, 1, 3, 2, 5]) == [2, 3, 4]
    assert quartiles([123456.0]) == [123500] * 3


def test_ratios_are_of_neighbours() -> None:
    assert ratios([1, 20, 300], [1, 10, 100]) == [1.5, 2, 2.5]


@pytest.mark.parametrize(
    ("value", "target", "met"),
    [(4, ">= 4", True), (3.99, ">= 4", False), (1.9, "< 2 s", True), (2, "< 2 s", False), (1.01, "<= 1.01", True),
     (0, "> 0", False)],
)  # fmt: skip
def test_targets(value: float, target: str, met: bool) -> None:
    assert meets(value, target) is met


def test_what_is_no_target_is_an_error() -> None:
    with pytest.raises(ValueError, match="flat"):
        meets(1, "flat")


def test_works_alternate_in_both_directions() -> None:
    order: list[str] = []
    seconds = alternate({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 3, warm_up=1)
    assert "".join(order) == "abbaabba"
    assert [len(seconds[name]) for name in "ab"] == [3, 3]
    assert all(s >= 0 for name in "ab" for s in seconds[name])


def test_table() -> None:
    rows = [
        Row("step", "one", "img/s", [39, 40, 41], "them", [9, 10, 11], [3.9, 4.0, 4.1], ">= 4", True, "a note"),
        Row("step", "two", "s", [1, 2, 3], note="a note"),
        Row("login", "failed: no Slurm", "", (), met=False),
    ]
    lines = table(rows).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:5]]
    assert cells[0] == ["step", "one [1]", "40 img/s", "them", "10 img/s", "4.00", "3.90 to 4.10", ">= 4", "yes"]
    assert cells[1] == ["step", "two [1]", "2 s", "–", "–", "–", "1 to 3 s", "–", "–"]
    assert cells[2] == ["login", "failed: no Slurm", "–", "–", "–", "–", "–", "–", "NO"]
    assert len({len(line) for line in lines[:5]}) == 1
    assert lines[5:] == ["", "[1] a note"]


def _part(folder: Path, name: str, body: str) -> None:
    """A part as a module `benchmarks.<name>` that the suite's child processes find in `folder`."""
    package = folder / "benchmarks"
    package.mkdir(exist_ok=True)
    for file in ("__init__.py", "measure.py"):
        (package / file).write_text((ROOT / "benchmarks" / file).read_text())
    head = "from benchmarks.measure import Row, run_part\ndef measure(quick):\n"
    (package / f"{name}.py").write_text(f"{head}    {body}\nif __name__ == '__main__':\n    run_part(measure, None)\n")


@pytest.fixture
def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(suite, "ROOT", tmp_path)
    monkeypatch.setattr(suite, "PARTS", ("good", "bad", "slow"))
    monkeypatch.setattr(suite, "QUICK_PARTS", {"good": 50, "bad": 1, "slow": 1})
    _part(tmp_path, "good", "return [Row('good', f'quick {quick}', 's', [1, 2, 3])]")
    _part(tmp_path, "bad", "raise ValueError('no such thing')")
    _part(tmp_path, "slow", "import time; time.sleep(600)")
    return tmp_path


@pytest.mark.process
def test_a_part_that_fails_is_a_row_and_the_others_still_run(parts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = parts / "out.json"
    assert suite.main(["--only", "bad,good", "--quick", "--out", str(out)]) == 1
    report = json.loads(out.read_text())
    assert [row["what"] for row in report["rows"]] == ["failed: ValueError: no such thing", "quick True"]
    assert list(report["seconds"]) == ["bad", "good"]
    assert report["environment"]["torch"] == torch.__version__
    assert "failed: ValueError: no such thing" in capsys.readouterr().out


@pytest.mark.process
def test_the_exit_status_is_0_where_no_part_failed(parts: Path) -> None:
    assert suite.main(["--only", "good", "--out", str(parts / "out.json")]) == 0


@pytest.mark.process
def test_a_part_that_hangs_is_ended(parts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "PATIENCE_SECONDS", 2)  # where interrupts are ignored, as in a shell's background
    assert suite.run_part("slow", quick=False, limit=2)[0].what == "failed: not done in 2 s"


@pytest.mark.process
def test_a_quick_part_that_is_out_of_time_is_a_row_and_the_next_one_has_the_rest(
    parts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(suite, "QUICK_SECONDS", 100)
    out = parts / "out.json"
    assert suite.main(["--only", "slow,good", "--quick", "--out", str(out)]) == 0
    assert [row["what"] for row in json.loads(out.read_text())["rows"]] == [
        "not measured: not done in 2 s",
        "quick True",
    ]


def test_the_times_of_quick_parts_never_add_up_to_more_than_all_of_it() -> None:
    left, parts = float(suite.QUICK_SECONDS), list(suite.QUICK_PARTS)
    for number, part in enumerate(parts, 1):
        limit = suite.time_of(part, parts[number:], left)
        assert 0 < limit <= left
        left -= limit  # each uses all that it may
    assert left == pytest.approx(0, abs=1e-9)
    assert suite.time_of("login", [], 7.0) == 7.0  # what earlier ones left is used


def test_rounds_end_before_the_deadline_but_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 2.0, 2.0, 5.0, 5.0])
    monkeypatch.setattr("benchmarks.measure.time.monotonic", lambda: next(clock))
    monkeypatch.setattr("benchmarks.measure._deadline", 7.0)
    assert list(rounds(9)) == [0, 1]  # of 2 and of 3 seconds: a third may take until 8
    monkeypatch.setattr("benchmarks.measure.time.monotonic", lambda: 8.0)
    assert list(rounds(9)) == [0]


def test_the_roofline_takes_the_longer_of_bytes_and_arithmetic_of_each_operation() -> None:
    work = [
        Operation("add", "forward", bytes=100, flops=0),
        Operation("mm", "forward", bytes=100, flops=9000),
        Operation("add", "forward", bytes=4, flops=0),
    ]
    rates = {PRODUCTS: 1000.0, 10: 50.0, 100: 25.0}
    assert roofline(work, rates) == 100 / 25 + 9000 / 1000 + 4 / 50
    row = roofline_row([0.2, 0.2], {name: [rate, rate] for name, rate in rates.items()}, work, batch=4)
    assert row.theirs[1] == pytest.approx(4 / 13.08, rel=1e-3)
    assert row.ratio[1] == pytest.approx(0.654, rel=1e-3)
    assert row.met is True
    assert row.note.startswith("3 operations, 0.00 GFLOP and 0 MB an image; products at 0 GFLOP/s")


def test_an_unknown_part_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        suite.main(["--only", "stpe"])
    assert "--only stpe: allowed: step, augmentation" in capsys.readouterr().err


def test_every_part_of_the_suite_is_there() -> None:
    for part in suite.PARTS:
        assert (ROOT / "benchmarks" / f"{part}.py").exists(), part


def test_results_are_named_after_the_hardware_and_what_was_left_out() -> None:
    assert suite.machine(NOBODY) == "intel-xeon-2-cores"
    assert suite.machine(NOBODY | {"gpu": "NVIDIA H200"}) == "nvidia-h200-2-cores"
    names = [suite.default_path(NOBODY, quick, only).name for quick, only in ((False, []), (True, ["step"]))]
    assert names[0].endswith("-intel-xeon-2-cores.json")
    assert names[1].endswith("-intel-xeon-2-cores-quick-step.json")


def test_the_chart_shows_ratios_to_peers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        Row("step", "one", "img/s", [40] * 3, "them", [10] * 3, [3.9, 4.0, 4.1], ">= 4", True),
        Row("step", "two", "s", [1] * 3, "others", [4] * 3, [0.2, 0.25, 0.3], "<= 0.2", False),
        Row("startup", "no peer", "s", [1] * 3),
        Row("scaling", "ours with ours", "img/s", [2] * 3, "1 process", [1] * 3, [2] * 3),
        Row("login", "a target in seconds", "s", [1] * 3, "python", [1] * 3, [1] * 3, "< 1 s", True),
    ]
    assert chart.chosen(rows) == rows[:2]
    assert [chart.less_is_better(row) for row in rows] == [False, True, True, False, True]
    results, out = tmp_path / "results.json", tmp_path / "speed"
    environment = {**NOBODY, "torch": "2"}
    results.write_text(json.dumps({"environment": environment, "rows": [asdict(row) for row in rows]}))
    assert chart.main([str(results), "--out", str(out)]) == 0
    assert out.with_suffix(".png").stat().st_size > 10_000
    assert "against them" in out.with_suffix(".svg").read_text()
    results.write_text(json.dumps({"environment": environment, "rows": [asdict(row) for row in rows[2:]]}))
    assert chart.main([str(results), "--out", str(out)]) == 2
    assert "error: no row has a ratio to a peer" in capsys.readouterr().err


def test_the_chart_is_of_the_newest_full_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chart, "RESULTS", tmp_path)
    with pytest.raises(FileNotFoundError, match="make bench"):
        chart.newest()
    for name in ("2026-01-01-xeon-2-cores", "2026-01-02-xeon-2-cores", "2026-01-03-xeon-2-cores-quick",
                 "2026-01-04-xeon-2-cores-step", "chaos-2026-01-05"):  # fmt: skip
        (tmp_path / f"{name}.json").touch()
    assert chart.newest().stem == "2026-01-02-xeon-2-cores"

"""Which weights and which BatchNorm statistics a run's model gets, and what a checkpoint has to be for that."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import build_model

from cifar_hpc import tensorfile
from cifar_hpc.config.io import from_plain
from cifar_hpc.config.spec import Spec
from cifar_hpc.data.augment.pipeline import normalize
from cifar_hpc.data.info import DatasetInfo
from cifar_hpc.data.synthetic import make_synthetic
from cifar_hpc.errors import RunFailedError, SpecError
from cifar_hpc.training.trained_model import _code_of, load_trained, noted

IMAGES = make_synthetic(264, 100)[2]


@pytest.fixture
def root(tiny_run: Path, tmp_path: Path) -> Path:
    """A copy of the tiny run, to spoil."""
    shutil.copytree(tiny_run / "checkpoints", tmp_path / "checkpoints")
    (tmp_path / "logs" / "tiny").mkdir(parents=True)
    return tmp_path


def change(path: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    """Write a checkpoint anew, whole, with another content."""
    state = tensorfile.load(path)
    edit(state)
    with path.open("wb") as file:
        tensorfile.save(tensorfile.seal(state), file)


def without_lookahead(state: dict[str, Any]) -> None:
    state["spec"]["lookahead"].update(enabled=False)
    state["optimizer"] = state["optimizer"]["inner"]


def newest(root: Path) -> Path:
    return root / "checkpoints" / "tiny" / "step_00000018.pt"


def middle_of_an_epoch(root: Path) -> None:
    """Make step 16 the newest checkpoint, and step 9 the newest of an epoch's end."""
    newest(root).unlink()
    (root / "checkpoints" / "tiny" / "best.pt").unlink()


@pytest.mark.parametrize("weights", ["slow", "fast"])
def test_the_weights_are_those_of_a_model_put_together_by_hand(root: Path, weights: str) -> None:
    state = tensorfile.load(newest(root))
    model = build_model(from_plain(state["spec"]).model, 0).eval()
    values = state["optimizer"]["slow"] if weights == "slow" else list(state["model"].values())
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), values, strict=True):
            parameter.copy_(value)
        for name, buffer in model.named_buffers():
            buffer.copy_(state["slow_buffers" if weights == "slow" else "buffers"][name])
        expected = model(normalize(IMAGES, DatasetInfo()))
    trained = load_trained(root, "tiny", weights)
    assert trained.weights == weights
    assert (trained.logged is not None) == (weights == "slow")
    torch.testing.assert_close(trained.logits(IMAGES), expected)
    assert (trained.run, trained.amp, trained.device.type, trained.notes) == ("tiny", "fp32", "cpu", ())


def test_a_file_is_taken_as_it_is(root: Path) -> None:
    folder = root / "checkpoints" / "tiny"
    trained = load_trained(root, str(folder / "step_00000009.pt"), "slow")
    assert trained.logged is not None and trained.logged["epoch"] == 1
    assert trained.run == "tiny" and trained.facts(root)["position"] == "step 9, epoch 1 of 2"
    elsewhere = shutil.copy(folder / "step_00000016.pt", root / "x.pt")
    trained = load_trained(root, str(elsewhere), "fast")
    assert trained.run is None and trained.facts(root)["position"] == "step 16, epoch 1 of 2, step 7 of the next"


def test_within_an_epoch_the_slow_weights_are_those_of_the_last_epochs_end(root: Path) -> None:
    middle_of_an_epoch(root)
    trained = load_trained(root, "tiny", "slow")
    assert trained.path.name == "step_00000009.pt"
    assert trained.notes == (
        "step_00000016.pt is newer, but within an epoch, without BatchNorm statistics of the evaluated weights.",
    )
    assert load_trained(root, "tiny", "fast").path.name == "step_00000016.pt"
    for step in (8, 9):
        (root / "checkpoints" / "tiny" / f"step_{step:08d}.pt").unlink()
    with pytest.raises(SpecError, match=r"no checkpoint of an epoch's end yet.*--weights fast"):
        load_trained(root, "tiny", "slow")
    with pytest.raises(SpecError, match=r"step_00000016\.pt: was written in the middle of an epoch"):
        load_trained(root, str(root / "checkpoints" / "tiny" / "step_00000016.pt"), "slow")


def test_statistics_that_are_never_measured_anew_are_not_missed(root: Path) -> None:
    middle_of_an_epoch(root)
    for edit in (
        lambda state: state["spec"]["lookahead"].update(bn_batches=0),
        without_lookahead,
    ):
        change(root / "checkpoints" / "tiny" / "step_00000016.pt", edit)
        trained = load_trained(root, "tiny", "slow")
        assert trained.path.name == "step_00000016.pt" and trained.logged is None
    assert trained.weights == "fast" and "but one set of weights" in trained.notes[0]


def test_under_resizing_the_only_weights_go_with_statistics_of_whole_images(root: Path) -> None:
    """Where training's images are smaller, so that the running statistics are not those of the evaluation."""

    def edit(state: dict[str, Any]) -> None:
        without_lookahead(state)
        state["spec"]["resizing"].update(initial=16)

    change(root / "checkpoints" / "tiny" / "step_00000009.pt", edit)
    path = str(root / "checkpoints" / "tiny" / "step_00000009.pt")
    state = tensorfile.load(Path(path))
    for weights, expected in (("slow", "slow_buffers"), ("fast", "buffers")):
        have = load_trained(root, path, weights).model.state_dict()
        assert all(torch.equal(have[name], value) for name, value in state[expected].items())
    assert tensorfile.digest(state["slow_buffers"]) != tensorfile.digest(state["buffers"])
    within = str(root / "checkpoints" / "tiny" / "step_00000016.pt")
    change(Path(within), edit)
    with pytest.raises(SpecError, match=r"step_00000016\.pt: was written in the middle of an epoch"):
        load_trained(root, within, "slow")


def test_a_damaged_newest_one_is_passed_over_and_named(root: Path) -> None:
    newest(root).write_bytes(b"x")
    (root / "checkpoints" / "tiny" / "best.pt").unlink()
    assert load_trained(root, "tiny", "fast").notes[0].startswith("step_00000018.pt is newer, but does not verify: no ")


def test_a_run_on_gpus_is_computed_here_as_this_machine_can_and_says_so(root: Path) -> None:
    change(newest(root), lambda state: state["environment"].update(cuda="13.0", device="H100", amp="bf16"))
    trained = load_trained(root, str(newest(root)), "slow")
    assert trained.amp == "fp32"  # which the spec says
    assert "The run computed in bf16 on H100: figures may differ" in trained.notes[0]


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_the_runs_precision_is_kept(root: Path, amp: str) -> None:
    exact = load_trained(root, "tiny", "slow").logits(IMAGES)
    change(newest(root), lambda state: state["environment"].update(amp=amp))
    trained = load_trained(root, "tiny", "slow")
    logits = trained.logits(IMAGES)
    assert trained.amp == amp and logits.dtype == torch.float32
    assert not torch.equal(logits, exact)
    torch.testing.assert_close(logits, exact, atol=0.2, rtol=0.1)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda state: state.update(spec=0), "its spec: "),
        (lambda state: state["spec"]["model"].update(dropout=7), r"its spec: model\.dropout: "),
        (lambda state: state["spec"]["model"].update(later=7), r"its spec: model\.later: unknown.*newer cifar_hpc"),
        (lambda state: state.update(environment=None), "environment: is not a short mapping with amp"),
        (lambda state: state.update(history="[1]"), "history or environment: not what a run writes"),
        (lambda state: state.update(history="{"), "history or environment: not what a run writes"),
        (lambda state: state.update(step="x"), "step: 'x' is not allowed; allowed: an integer from 0"),
        (lambda state: state["environment"].update(amp="fp8"), r"environment\.amp: 'fp8' is not allowed; allowed"),
        (lambda state: state["optimizer"].pop("slow"), "optimizer: 'slow' is missing"),
        (lambda state: state["optimizer"]["slow"].pop(), r"optimizer\.slow: a list of 40 is .*; allowed: a list of 41"),
        (
            lambda state: state["optimizer"].update(slow=[0] * 41),
            r"optimizer\.slow\.0: 0 is .*; allowed: torch\.float32",
        ),
        (lambda state: state["spec"]["model"].update(widths=[64, 128, 512]), r"model\.layers\.4\.conv1\.weight: "),
        (
            lambda state: state["spec"]["model"].update(width_multiplier=100.0),
            r"model\.stem\.0\.weight: .*3200, 3, 3, 3",
        ),
        (lambda state: state["buffers"].clear(), r"buffers: 'stem\.1\.running_mean' is missing"),
        (lambda state: state["optimizer"]["slow"][0].fill_(float("nan")), "its slow weights .* are NaN or infinite"),
        (lambda state: state["slow_buffers"]["stem.1.running_var"].fill_(float("inf")), "are NaN or infinite"),
    ],
)
def test_whole_files_of_a_wrong_content_are_named_errors(root: Path, edit: Any, words: str) -> None:
    change(newest(root), edit)
    with pytest.raises(RunFailedError, match=rf"^{newest(root)}: .*{words}"):
        load_trained(root, str(newest(root)), "slow")


def test_outputs_that_are_not_finite_are_an_error(root: Path) -> None:
    change(newest(root), lambda state: state["optimizer"]["slow"][0].fill_(3e38))
    with pytest.raises(RunFailedError, match="outputs in fp32 are NaN or infinite"):
        load_trained(root, "tiny", "slow").logits(IMAGES)


def test_what_is_not_there_is_a_named_error(root: Path) -> None:
    for run, words in [("tinny", "'tinny': no such run"), ("none.pt", "none.pt: there is no such file")]:
        with pytest.raises(SpecError, match=words):
            load_trained(root, run, "slow")
    (root / "logs" / "new").mkdir()
    with pytest.raises(SpecError, match=r"run new has no checkpoint in .* yet"):
        load_trained(root, "new", "slow")
    (root / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    with pytest.raises(RunFailedError, match=r"model\.safetensors: no file of torch\.save"):
        load_trained(root, str(root / "model.safetensors"), "slow")


def test_notes_are_lines_of_80_columns() -> None:
    lines = noted(["word " * 40, "short"])
    assert max(map(len, lines)) <= 80
    assert lines[0].startswith("note: word") and lines[1].startswith("      word") and lines[-1] == "note: short"


@pytest.mark.parametrize("path", ["/best.pt", "/scratch/best.pt", "/scratch/me/best.pt"])
def test_a_checkpoint_may_lie_anywhere(path: str) -> None:
    assert _code_of(Path(path), Spec()).name == "user"
    with pytest.raises(SpecError, match="which is run only for a checkpoint in checkpoints/RUN"):
        _code_of(Path(path), from_plain({"model": {"target": "mine.py:Net"}}))

"""The facts about a finished run that must be those of an undisturbed one, and what must hold for any finished run."""

from __future__ import annotations

import json
import re
from hashlib import sha256
from pathlib import Path
from typing import Any

VOLATILE = {"epoch_seconds", "images_per_second", "world_size", "restart", "job_id", "time"}
# All of a checkpoint but the spec (checkpoint.* may differ), the times in it, and where it was computed.
STATE = (
    "step", "epoch", "step_in_epoch", "updates", "model", "buffers", "slow_buffers", "optimizer", "scaler",
    "sums",
)  # fmt: skip


def describe(root: Path, name: str, out: Path) -> None:
    """Write the facts about the run `name` under `root` to `out`, as JSON. Imports torch: for a forked process."""
    from cifar_hpc import tensorfile
    from cifar_hpc.training.checkpoints.format import read_checkpoint
    from cifar_hpc.training.checkpoints.store import candidates

    folder = root / "checkpoints" / name
    problems = []
    states = {}
    for path in [*candidates(folder), folder / "best.pt"]:
        try:
            states[path.name] = read_checkpoint(path)
        except Exception as error:
            problems.append(f"{path.name}: {type(error).__name__}: {error}")
    report: dict[str, Any] = {"problems": problems}
    newest = next((s for name, s in states.items() if name != "best.pt"), None)
    for name, state in (("final", newest), ("best", states.get("best.pt"))):
        if state is not None:
            report[name] = {
                **state.digests(),
                "state": tensorfile.digest({k: getattr(state, k) for k in STATE}),
                "step": state.step,
                "epoch": state.epoch,
                "best": state.best,
                "rows": [_steady(row) for row in state.rows],
            }
    out.write_text(json.dumps(report))


def _steady(row: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in row.items() if k not in VOLATILE}


def compare(mine: dict[str, Any], reference: dict[str, Any]) -> list[str]:
    """What differs from the reference's facts."""
    problems = list(mine["problems"])
    for which in ("final", "best"):
        ours, theirs = mine.get(which) or {}, reference[which]
        problems += [
            f"{which}.{key}: {_short(ours.get(key))}, undisturbed {_short(value)}"
            for key, value in theirs.items()
            if ours.get(key) != value
        ]
    return problems


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 100 else text[:100] + "..."


def check_files(root: Path, name: str, keep: int, rows: list[dict[str, Any]]) -> list[str]:
    """What is wrong with the files of the finished run `name` under `root`, a folder of its own.

    Args:
        keep: checkpoint.keep.
        rows: what metrics.jsonl must hold, without what may differ.
    """
    problems = []
    logs, folder = root / "logs" / name, root / "checkpoints" / name
    text = (logs / "metrics.jsonl").read_text() if (logs / "metrics.jsonl").exists() else ""
    try:
        found = [json.loads(line) for line in text.splitlines()]
    except ValueError:
        found = []
        problems.append(f"metrics.jsonl: broken lines: {text[-300:]!r}")
    if [_steady(row) for row in found] != rows:
        problems.append(f"metrics.jsonl: {[_steady(row) for row in found]}, undisturbed {rows}")
    problems += [f"metrics.jsonl: row {row['epoch']} lacks keys" for row in found if not row.keys() >= VOLATILE]

    problems += [f"left over: {p.relative_to(root)}" for p in sorted(root.rglob("*.tmp"))]
    names = {p.name for p in folder.iterdir() if p.suffix != ".damaged"}  # kept for inspection
    steps = {name for name in names if re.fullmatch(r"step_\d{8}\.pt", name)}
    if names != steps | {"best.pt", "index.json", "owner.lock"}:
        problems.append(f"checkpoints: {sorted(names)}")
    if not 1 <= len(steps) <= keep:
        problems.append(f"checkpoints: {len(steps)} files, checkpoint.keep is {keep}")
    try:
        index = json.loads((folder / "index.json").read_text())
    except (OSError, ValueError) as error:
        return [*problems, f"index.json: {error}"]
    if set(index["checkpoints"]) != steps:
        problems.append(f"index.json names {sorted(index['checkpoints'])}, there are {sorted(steps)}")
    for name, entry in [*index["checkpoints"].items(), ("best.pt", index["best"] or {})]:
        if not (folder / name).exists():
            continue
        content = (folder / name).read_bytes()
        if (entry.get("sha256"), entry.get("bytes")) != (sha256(content).hexdigest(), len(content)):
            problems.append(f"index.json: the entry of {name} (step {entry.get('step')}) is not of that file")
    return problems

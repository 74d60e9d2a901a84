"""Specs from and to YAML, --set overrides, differences, and the name of a run."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from cifar_hpc.config.fields import build
from cifar_hpc.config.spec import Spec
from cifar_hpc.config.validate import check
from cifar_hpc.config.yaml_loader import Dumper, parse_yaml, read_mapping
from cifar_hpc.errors import SpecError

# Keys that do not change the result of a run. They are left out of its name.
NOT_IN_NAME = (
    "resources",
    "checkpoint",
    "failures",
    "timeouts",
    "tracking",
    "data.root",
    "train.log_seconds",
    "train.watchdog_minutes",
)
# Keys that may change between a run's first start and a later one.
MAY_CHANGE = (*NOT_IN_NAME, "train.epochs", "train.device")
MAX_DEPTH = 8  # sections in a key; the spec has two


def load_spec(
    path: Path,
    overrides: Iterable[str] = (),
    base: Mapping[str, Any] | None = None,
    flags: Mapping[str, Any] | None = None,
) -> Spec:
    """Read a job file, laid over `base` (a site's defaults), under `key.path=value` overrides and `flags`.

    Raises:
        SpecError: names the file, the flag or the dotted key.
    """
    values = load_values(path, overrides, base, flags)
    if values.pop("sweep", None) is not None:
        raise SpecError(
            f"sweep: {path} describes many runs, and this command trains one. HINT: submit them with submit.py, or "
            "take the job file alone with --set sweep=null."
        )
    return from_plain(values)


def load_values(
    path: Path,
    overrides: Iterable[str] = (),
    base: Mapping[str, Any] | None = None,
    flags: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Read the same as plain, unchecked values; a section `sweep` may be among them.

    Raises:
        SpecError: names the file or the flag.
    """
    values = merge(dict(base or {}), read_mapping(path))
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key.strip().rpartition(".")[2] or key.count(".") > MAX_DEPTH:
            raise SpecError(f"--set {override}: not understood; allowed: key.path=value, such as train.epochs=10.")
        values = merge(values, nested(key.strip(), parse_yaml(text, f"--set {key}")))
    return merge(values, flags or {})


def nested(key: str, value: Any) -> dict[str, Any]:
    """{'a': {'b': value}} for the dotted key a.b."""
    for section in reversed(key.split(".")):
        value = {section: value}
    result: dict[str, Any] = value
    return result


def merge(below: dict[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`below` with the values of `above` laid over it, section by section."""
    result = dict(below)
    for key, value in above.items():
        old = result.get(key)
        result[key] = merge(old, value) if isinstance(old, dict) and isinstance(value, Mapping) else value
    return result


def to_plain(spec: Spec) -> dict[str, Any]:
    """Convert to nested dicts, lists, numbers and strings, which YAML, JSON and checkpoints can hold."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(spec)))
    return plain


def from_plain(values: Mapping[str, Any]) -> Spec:
    """Build and check a spec; the inverse of `to_plain`."""
    return check(build(Spec, dict(values)))


def to_yaml(spec: Spec, header: str) -> str:
    """YAML of every key, under comment lines."""
    comment = "".join(f"# {line}\n" for line in header.splitlines())
    sections = (_section_yaml(name, json.dumps(values)) for name, values in to_plain(spec).items())
    return comment + "".join(sections)


@functools.lru_cache(maxsize=1000)  # the points of a sweep differ in few sections, and yaml takes its time
def _section_yaml(name: str, values: str) -> str:
    text: str = yaml.dump({name: json.loads(values)}, Dumper=Dumper, sort_keys=False)
    return text


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{'train.epochs': 400, ...}; empty mappings stay values."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def differences(old: Spec, new: Spec) -> dict[str, tuple[Any, Any]]:
    """Dotted keys whose values differ, with (old, new)."""
    before, after = flatten(to_plain(old)), flatten(to_plain(new))
    return {
        k: (before.get(k), after.get(k)) for k in sorted(before.keys() | after.keys()) if before.get(k) != after.get(k)
    }


def covered(key: str, prefixes: Iterable[str]) -> bool:
    """Return whether `key` is one of `prefixes` or in a section that one of them names."""
    return any(key == p or key.startswith(p + ".") for p in prefixes)


def check_resumable(old: Spec, new: Spec, run: str) -> None:
    """Refuse to resume a run under a spec that would give another result.

    Raises:
        SpecError: shows each differing key, old and new.
    """
    fatal = {k: v for k, v in differences(old, new).items() if not covered(k, MAY_CHANGE)}
    # A value that is only resolved at the first start (null) agrees with whatever it became.
    fatal = {k: (a, b) for k, (a, b) in fatal.items() if not (k in ("train.shards", "train.cpu_threads") and b is None)}
    if fatal:
        lines = "\n".join(f"  {k}: {a!r} -> {b!r}" for k, (a, b) in fatal.items())
        raise SpecError(
            f"run {run}: it was started under another spec:\n{lines}\n"
            f"Allowed to change: {', '.join(MAY_CHANGE)}. HINT: give the new run another --name."
        )


def run_name(job: str, spec: Spec) -> str:
    """`<job>-<8 hex digits>` of what differs from the defaults, so that the same spec finds the same run."""
    changed = {k: new for k, (_, new) in differences(Spec(), spec).items() if not covered(k, NOT_IN_NAME)}
    if spec.data.source == "folder":
        changed["data.root"] = spec.data.root  # it chooses the images; for other sources it is only their place
    digest = hashlib.sha256(json.dumps(changed, sort_keys=True).encode()).hexdigest()
    return f"{job}-{digest[:8]}"


def in_words(value: Any) -> str:
    """Format a value of a spec as its YAML does: true, null, 0.3, [64, 128]."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return f"[{', '.join(map(in_words, value))}]"
    return f"{value:g}" if isinstance(value, float) else str(value)

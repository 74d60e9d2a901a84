"""Specs from and to YAML, --set overrides, differences, and the name of a run."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from cifar_hpc.errors import SpecError, nearest
from cifar_hpc.spec import Spec, check
from cifar_hpc.spec_fields import build

# Where a run runs and how often it saves do not change what it computes: these are left out of a run's name.
NOT_IN_NAME = ("resources", "checkpoint", "failures", "timeouts", "data.root", "train.log_seconds")
# What may differ between a run's first start and a later one.
MAY_CHANGE = (*NOT_IN_NAME, "train.epochs", "train.device")


class _Loader(yaml.SafeLoader):
    """safe_load without three traps of YAML 1.1: 24:00:00 and 010 are text (not base 60 and 8), 1e-4 is a number."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag == "tag:yaml.org,2002:merge":
                continue  # the base class refuses the one and merges the other
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.MarkedYAMLError(problem=f"the key {key!r} is given twice", problem_mark=key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if tag not in _NUMBERS]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


class _Dumper(yaml.SafeDumper):
    """safe_dump that also quotes text which `_Loader`, though not YAML 1.1, would read as a number, such as 1e4."""


for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(_NUMBERS[0], re.compile(r"[-+]?(0|[1-9][0-9]*)$"), list("-+0123456789"))
    _class.add_implicit_resolver(
        _NUMBERS[1],
        re.compile(r"[-+]?(\d+\.\d*|\.\d+|\d+(?=[eE]))([eE][-+]?\d+)?$|[-+]?\.(inf|nan)$", re.I),
        list("-+.0123456789"),
    )


def parse_yaml(text: str, name: str) -> Any:
    """The plain values of a YAML text.

    Raises:
        SpecError: names the file, line and column.
    """
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: what looks like a date and is none
        raise SpecError(f"{name}: not readable as YAML: {' '.join(str(error).split())}") from None


def read_mapping(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; an empty file is an empty mapping."""
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        siblings = [p.name for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
        reason = error.strerror if isinstance(error, OSError) else "not a text file"
        raise SpecError(f"{path}: cannot be read: {reason}." + nearest(path.name, siblings)) from None
    values = parse_yaml(text, str(path))
    if values is not None and not isinstance(values, dict):
        raise SpecError(f"{path}: holds {type(values).__name__}; allowed: a mapping of sections such as train:")
    return values or {}


def load_spec(path: Path, overrides: Iterable[str] = (), base: Mapping[str, Any] | None = None) -> Spec:
    """The spec of a job file, laid over `base` (a site's defaults), with `key.path=value` overrides on top."""
    values = merge(dict(base or {}), read_mapping(path))
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key.strip():
            raise SpecError(f"--set {override}: not understood; allowed: key.path=value, such as train.epochs=10.")
        *sections, last = key.strip().split(".")
        leaf: dict[str, Any] = {last: parse_yaml(text, f"--set {key}")}
        for section in reversed(sections):
            leaf = {section: leaf}
        values = merge(values, leaf)
    return check(build(Spec, values))


def merge(below: dict[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`below` with the values of `above` laid over it, section by section."""
    result = dict(below)
    for key, value in above.items():
        old = result.get(key)
        result[key] = merge(old, value) if isinstance(old, dict) and isinstance(value, Mapping) else value
    return result


def to_plain(spec: Spec) -> dict[str, Any]:
    """Nested dicts, lists, numbers and strings only: what YAML, JSON and torch.load(weights_only=True) can hold."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(spec)))
    return plain


def from_plain(values: Mapping[str, Any]) -> Spec:
    """The inverse of `to_plain`."""
    return check(build(Spec, dict(values)))


def to_yaml(spec: Spec, header: str) -> str:
    """YAML of every key, under comment lines."""
    comment = "".join(f"# {line}\n" for line in header.splitlines())
    return comment + yaml.dump(to_plain(spec), Dumper=_Dumper, sort_keys=False)


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


def _covered(key: str, prefixes: Iterable[str]) -> bool:
    return any(key == p or key.startswith(p + ".") for p in prefixes)


def check_resumable(old: Spec, new: Spec, run: str) -> None:
    """Refuse to go on with a run under a spec that would compute something else.

    Raises:
        SpecError: shows each differing key, old and new.
    """
    fatal = {k: v for k, v in differences(old, new).items() if not _covered(k, MAY_CHANGE)}
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
    changed = {k: new for k, (_, new) in differences(Spec(), spec).items() if not _covered(k, NOT_IN_NAME)}
    if spec.data.source == "folder":
        changed["data.root"] = spec.data.root  # here it says which images; elsewhere only where the same ones are
    digest = hashlib.sha256(json.dumps(changed, sort_keys=True).encode()).hexdigest()
    return f"{job}-{digest[:8]}"


def check_run_name(name: str) -> str:
    """`name`, if it can be a directory, a Slurm job name and a word in a shell alike."""
    if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        return name
    raise SpecError(
        f"--name: {name!r} is not allowed; allowed: up to 100 letters, digits, '.', '_' and '-', "
        "beginning with a letter or a digit. HINT: without --name it is made from the job file's name."
    )

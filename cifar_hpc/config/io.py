"""Specs from and to YAML, --set overrides, site profiles, differences, and the name of a run."""

import functools
import hashlib
import json
import re
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from cifar_hpc.config import user_code
from cifar_hpc.config.fields import build, nearest_key, option
from cifar_hpc.config.spec import NotifySpec, ResourcesSpec, Spec
from cifar_hpc.config.user_code import is_file
from cifar_hpc.config.validate import check
from cifar_hpc.config.yaml_loader import Dumper, parse_yaml, read_mapping
from cifar_hpc.errors import SpecError, nearest
from cifar_hpc.files import expand_path, read_regular
from cifar_hpc.text import shown

# Keys that do not change the result of a run. They are left out of its name.
NOT_IN_NAME = (
    "resources", "checkpoint", "failures", "timeouts", "notify", "tracking",
    "model.init_from", "data.root", "train.log_seconds", "train.watchdog_minutes",
)  # fmt: skip
# Keys that may change between a run's first start and a later one.
MAY_CHANGE = (*NOT_IN_NAME, "train.epochs", "train.device")
MAX_DEPTH = 8  # sections in a key; the spec has two, but model.args and data.args as many as the user likes
HERE = Path()
CLUSTERS = Path(__file__).resolve().parents[2] / "slurm" / "clusters"


def load_spec(path: Path, overrides: Iterable[str] = (), root: Path = HERE) -> Spec:
    """Read a job file of one run under `key.path=value` overrides; `root` as in `new_spec`.

    Raises:
        SpecError: names the file, the override or the dotted key.
    """
    values = load_values(path, overrides)
    if values.pop("sweep", None) is not None:
        raise SpecError(
            f"sweep: {path} describes many runs, and this command trains one. HINT: submit them with submit.py, or "
            "take the job file alone with --set sweep=null."
        )
    return new_spec(values, path.parent, root)


def load_values(
    path: Path, overrides: Iterable[str] = (), base: Mapping[str, Any] = {}, flags: Mapping[str, Any] = {}
) -> dict[str, Any]:
    """Read a job file as plain, unchecked values; a section `sweep` may be among them.

    Args:
        overrides: `key.path=value`, above the file.
        base: below the file, such as a site's defaults.
        flags: above the overrides.

    Raises:
        SpecError: names the file or the override.
    """
    values = merge(base, _sweep_by_dotted_keys(read_mapping(path)))
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key.strip().rpartition(".")[2] or key.count(".") > MAX_DEPTH:
            hint = " HINT: the job file comes first." if override.endswith(".yaml") else nearest_key(key, Spec)
            hint = "" if hint.endswith(f"'{key}'?") else hint  # it lacks its value alone
            allowed = "allowed: key.path=value, such as train.epochs=10."
            raise SpecError(f"--set {override}: not understood; {allowed}{hint}")
        values = merge(values, _sweep_by_dotted_keys(nested(key.strip(), parse_yaml(text, f"--set {key}"))))
    return merge(values, flags)


def _sweep_by_dotted_keys(values: dict[str, Any]) -> dict[str, Any]:
    """`values` with the keys of sweep.grid and sweep.zip as `flatten` writes them, so that --set finds them there."""
    sweep = values.get("sweep")
    if not isinstance(sweep, dict):
        return values
    parts = {k: flatten(v, f"sweep.{k}") for k, v in sweep.items() if k in ("grid", "zip") and isinstance(v, dict)}
    return {**values, "sweep": {**sweep, **parts}}


def nested(key: str, value: Any) -> dict[str, Any]:
    """{'a': {'b': value}} for the dotted key a.b."""
    for section in reversed(key.split(".")):
        value = {section: value}
    return dict(value)


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`below` with the values of `above` laid over it, section by section."""
    result = dict(below)
    for key, value in above.items():
        old = result.get(key)
        result[key] = merge(old, value) if isinstance(old, dict) and isinstance(value, Mapping) else value
    return result


def to_plain(spec: Spec) -> dict[str, Any]:
    """Convert to nested dicts, lists, numbers and strings, which YAML, JSON and checkpoints can hold."""
    return dict(json.loads(json.dumps(asdict(spec))))


def from_plain(values: Mapping[str, Any]) -> Spec:
    """Build and check a spec; the inverse of `to_plain`."""
    return check(build(Spec, dict(values)))


def new_spec(values: Mapping[str, Any], folder: Path = HERE, root: Path = HERE) -> Spec:
    """`from_plain` for what a person has written: ~ and $VARIABLE in data.root are replaced, files are digested.

    Args:
        folder: of the job file, from which the paths of targets start.
        root: the project's root, with the checkpoints of the runs that model.init_from may name.
    """
    spec = from_plain(values)
    for section, files in user_files(spec, folder).items():
        code = user_code.digest_of(files) if files else None
        spec = replace(spec, **{section: replace(getattr(spec, section), code=code)})
    if spec.model.init_from is not None:
        file, digest = _init_file(spec.model.init_from, root)
        spec = replace(spec, model=replace(spec.model, init_from=file, init_digest=digest))
    return replace(spec, data=replace(spec.data, root=expand_path(spec.data.root, "data.root")))


def _init_file(source: str, root: Path) -> tuple[str, str]:
    """Return the absolute path of the file that model.init_from names, and its digest."""
    is_file = source.endswith((".pt", ".safetensors"))
    path = Path(expand_path(source, "model.init_from")) if is_file else root / "checkpoints" / source / "best.pt"
    path = path.absolute()
    try:
        return str(path), hashlib.sha256(read_regular(path)).hexdigest()[:16]
    except OSError as error:
        what = "" if is_file else " HINT: best.pt is written at the end of a run's first epoch."
        raise SpecError(
            f"model.init_from: {shown(source)}: {path} cannot be read: {error.strerror}; allowed: a run's name, or a "
            f"file that ends in .pt or .safetensors.{what}"
        ) from None


def user_files(spec: Spec, folder: Path) -> dict[str, dict[str, bytes]]:
    """Files of the user that the sections model and data name, by section; none for a section without.

    Raises:
        SpecError: names the key and the file that is missing or wrong.
    """
    targets = {"model": spec.model.target, "data": spec.data.target}
    return {
        section: user_code.collect(target, folder, f"{section}.target") if target and is_file(target) else {}
        for section, target in targets.items()
    }


def to_yaml(spec: Spec, header: str) -> str:
    """YAML of every key, under comment lines."""
    sections = (_section_yaml(name, json.dumps(values)) for name, values in to_plain(spec).items())
    return textwrap.indent(header, "# ") + "\n" + "".join(sections)


@functools.lru_cache(maxsize=1000)  # the points of a sweep differ in few sections, and yaml takes its time
def _section_yaml(name: str, values: str) -> str:
    return str(yaml.dump({name: json.loads(values)}, Dumper=Dumper, sort_keys=False))


def flatten(values: Mapping[str, Any], where: str = "", prefix: str = "") -> dict[str, Any]:
    """{'train.epochs': 400, ...}; empty mappings stay values.

    Raises:
        SpecError: for a key that is given twice, dotted and nested; `where` is the section that it names.
    """
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        found = flatten(value, where, f"{name}.") if isinstance(value, Mapping) and value else {name: value}
        for twice in flat.keys() & found:
            raise SpecError(f"{where}: {twice} is given twice, dotted and nested; allowed: once.")
        flat |= found
    return flat


def differences(old: Spec, new: Spec) -> dict[str, tuple[Any, Any]]:
    """Dotted keys whose values differ, with (old, new)."""
    before, after = flatten(to_plain(old)), flatten(to_plain(new))
    keys = sorted(before.keys() | after.keys())
    pairs = {k: (before.get(k), after.get(k)) for k in keys}
    # A mapping that is empty in one of them only, such as model.args: its keys tell the difference.
    return {k: pair for k, pair in pairs.items() if pair[0] != pair[1] and pair not in ((None, {}), ({}, None))}


def covered(key: str, prefixes: Iterable[str]) -> bool:
    """Return whether `key` is one of `prefixes` or in a section that one of them names."""
    return any(key == p or key.startswith(p + ".") for p in prefixes)


def check_resumable(old: Spec, new: Spec, run: str) -> None:
    """Refuse to resume a run under a spec that would give another result.

    Raises:
        SpecError: shows each differing key, old and new.
    """
    # A value that is only resolved at the first start (null) agrees with whatever it became.
    resolved = ("train.shards", "train.cpu_threads", "data.image_size")
    fatal = [
        f"  {k}: {a!r} -> {b!r}" + " (a file of the target was edited)" * k.endswith(".code")
        for k, (a, b) in differences(old, new).items()
        if not covered(k, MAY_CHANGE) and not (k in resolved and b is None)
    ]
    if fatal:
        lines = "\n".join(fatal)
        raise SpecError(
            f"run {run}: it was started under another spec:\n{lines}\n"
            f"Allowed to change: {', '.join(MAY_CHANGE)}. HINT: give the new run another --name."
        )


def run_name(job: str, spec: Spec) -> str:
    """`<job>-<8 hex digits>` of what differs from the defaults, so that the same spec finds the same run."""
    digest = hashlib.sha256(json.dumps(changed_keys(spec), sort_keys=True).encode()).hexdigest()
    return f"{job}-{digest[:8]}"


def changed_keys(spec: Spec) -> dict[str, Any]:
    """Values by dotted key that differ from the defaults, but for those that do not change the result of a run."""
    changed = {k: new for k, (_, new) in differences(Spec(), spec).items() if not covered(k, NOT_IN_NAME)}
    if spec.data.in_root:
        changed["data.root"] = spec.data.root  # it chooses the images; for other sources it is only their place
    return changed


def in_words(value: Any) -> str:
    """Format a value of a spec as its YAML does: true, null, 0.3, [64, 128]."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return f"[{', '.join(map(in_words, value))}]"
    return f"{value:g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True)
class Site:
    """A site profile, slurm/clusters/*.yaml: settings of a cluster, not of a job."""

    resources: ResourcesSpec = field(default_factory=ResourcesSpec)
    notify: NotifySpec = field(default_factory=NotifySpec)
    setup: tuple[str, ...] = option((), "shell lines before training, such as module load")
    python: str | None = option(None, "command that runs Python on a compute node; null is this very Python")
    srun: tuple[str, ...] = option((), "further options of srun")
    gpus: str | None = option(
        "gpus-per-node={gpus}",
        "the option of sbatch that asks for a node's GPUs, such as gres=gpu:{gpus} or gpus-per-node=a100:{gpus}; null "
        "is none",
    )

    def gpu_option(self, gpus: int | str) -> dict[str, str]:
        """Option of sbatch that requests so many GPUs on each node, N or TYPE:N; none for 0.

        Raises:
            SpecError: the profile asks for GPUs of another type, or for none.
        """
        kind, _, number = str(gpus).rpartition(":")
        name, _, value = (self.gpus or "").partition("=")
        own = re.sub("^(gres[:/])?gpu:?", "", value.partition("{gpus}")[0].rpartition(",")[2]).rstrip(":")
        if kind and (own or not name) and kind != own:
            raise SpecError(
                f"resources.gpus_per_node: {shown(gpus)} is not allowed; allowed with this profile's gpus: "
                f"{self.gpus or 'null'}: a number. HINT: without '{kind}:'; another profile for other GPUs."
            )
        return {name: value.replace("{gpus}", number if own else str(gpus))} if name and number != "0" else {}


def load_site(profile: str | None) -> tuple[Site, dict[str, Any]]:
    """Load a site profile; returns it and the keys of the spec that it sets, a layer below the job's own.

    Args:
        profile: a name in slurm/clusters, or a path; None is `default`.

    Raises:
        SpecError: names the file and lists the profiles there are.
    """
    path = _find(profile or "default")
    values = read_mapping(path)
    try:
        site = build(Site, values)
    except SpecError as error:
        raise SpecError(f"{path}: {error}") from None
    for line in site.setup:
        if re.match(r"\s*#\s*(SBATCH|PBS|BSUB)", line):
            raise SpecError(
                f"{path}: setup: {shown(line)} is not allowed; allowed: shell lines. HINT: options of sbatch belong "
                "into resources.sbatch, as option: value."
            )
    if site.gpus and re.fullmatch(r"(gpus-per-node|gres)=[^{}]*\{gpus\}[^{}]*", site.gpus) is None:
        raise SpecError(
            f"{path}: gpus: {shown(site.gpus)} is not allowed; allowed: gpus-per-node=... or gres=..., with {{gpus}} "
            "once for the number, such as gres=gpu:a100:{gpus}, or null. HINT: without '--'; put it in quotes."
        )
    layer = {name: (asdict(getattr(site, name)), values.get(name) or {}) for name in ("resources", "notify")}
    return site, {name: {k: v for k, v in of_site.items() if k in given} for name, (of_site, given) in layer.items()}


def _find(profile: str) -> Path:
    if profile.endswith((".yaml", ".yml")):
        return Path(profile)
    names = sorted(p.stem for p in CLUSTERS.glob("*.yaml"))
    if profile in names:  # and nothing else: a '/' or '..' would lead out of the directory
        return CLUSTERS / f"{profile}.yaml"
    raise SpecError(
        f"--profile: {shown(profile)} is not in {CLUSTERS}; there are: {', '.join(names)}, or a path ending in .yaml."
        + nearest(profile[:100], names)
    )

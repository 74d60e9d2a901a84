"""YAML from files and flags to plain values: safe_load without its traps, and with limits on what a file may cost."""

import contextlib
import functools
import re
from pathlib import Path
from typing import Any

import yaml

from cifar_hpc.errors import SpecError, nearest
from cifar_hpc.text import shown

MAX_CHARACTERS = 1_000_000
MAX_VALUES = 10_000  # with each alias counted as what it stands for: a spec has about a hundred


class WrittenInt(int):
    """An integer that remembers how it was written, for the keys that are text (`comment: +5`)."""

    text: str


class WrittenFloat(float):
    """A number that remembers how it was written, for the keys that are text (`comment: 1.10`, `gres-flags: 1e3`)."""

    text: str


class _Loader(yaml.SafeLoader):
    """safe_load without these traps of YAML 1.1: 24:00:00 and 010 are text (not base 60 and 8), and so are 2024-01-01
    and =; 1e-4 is a number; a key given twice is an error."""

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

    def construct_number(self, node: yaml.ScalarNode) -> WrittenInt | WrittenFloat:
        is_int = node.tag == _INT and len(node.value) < 4300  # Python reads no longer ones: infinite, and never allowed
        number = WrittenInt(self.construct_yaml_int(node)) if is_int else WrittenFloat(self.construct_yaml_float(node))
        number.text = self.construct_scalar(node)
        return number


_INT, _FLOAT = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"
_NOT_AS_IN_YAML_1_1 = (_INT, _FLOAT, "tag:yaml.org,2002:timestamp", "tag:yaml.org,2002:value")
_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if tag not in _NOT_AS_IN_YAML_1_1]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag in (_INT, _FLOAT):
    _Loader.add_constructor(_tag, _Loader.construct_number)


class Dumper(yaml.SafeDumper):
    """safe_dump that also quotes text which `parse_yaml`, though not YAML 1.1, would read as a number, such as 1e4."""


for _class in (_Loader, Dumper):
    _class.add_implicit_resolver(_INT, re.compile(r"[-+]?(0|[1-9][0-9]*)$"), list("-+0123456789"))
    _class.add_implicit_resolver(
        _FLOAT,
        re.compile(r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?$|[-+]?\.(inf|nan)$", re.I),
        list("-+.0123456789"),
    )


def parse_yaml(text: str, name: str) -> Any:
    """The plain values of a YAML text; numbers are of the `Written` kinds.

    Raises:
        SpecError: names the file, line and column.
    """
    if len(text) > MAX_CHARACTERS:
        raise SpecError(f"{name}: is too long; allowed: {MAX_CHARACTERS:,} characters.")
    try:
        loader = _Loader(text)  # looks for characters that YAML does not allow
        node = loader.get_single_node()
        if node is None:
            return None
        _expanded(node, {})
        return loader.construct_document(node)
    except RecursionError:
        raise SpecError(f"{name}: not readable as YAML: it is nested too deeply.") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: an integer of thousands of digits
        words = " ".join(str(error).split()).replace('in "<unicode string>", line', "in line").removesuffix(" ^")
        raise SpecError(f"{name}: not readable as YAML: {words}") from None
    except (LookupError, AttributeError):  # `!!bool maybe`, `!!int`, `!!timestamp x`
        raise SpecError(f"{name}: not readable as YAML: a value is not of the type that its !!tag says.") from None


def _expanded(node: yaml.Node, known: dict[yaml.Node, int]) -> int:
    """Count the values of `node` with every alias written out.

    A few lines of aliases of aliases can stand for more values than any memory holds. Python shares them while they
    are only read, but merging, showing and writing them would not.

    Raises:
        MarkedYAMLError: for too many, and for an alias of what it is in.
    """
    if isinstance(node, yaml.ScalarNode):
        return 1
    if node not in known:
        known[node] = 0
        children = [n for pair in node.value for n in pair] if isinstance(node, yaml.MappingNode) else node.value
        known[node] = 1 + sum(_expanded(child, known) for child in children)
    if known[node] == 0:
        raise yaml.MarkedYAMLError(problem="a value cannot hold itself", problem_mark=node.start_mark)
    if known[node] > MAX_VALUES:
        problem = f"it stands for more than {MAX_VALUES:,} values, with its aliases written out"
        raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
    return known[node]


def read_mapping(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file (UTF-8); an empty file is an empty mapping.

    Raises:
        SpecError: names the file; where it is missing, the nearest name beside it.
    """
    hint = "" if path.suffix in (".yaml", ".yml") else " HINT: a job file is YAML, such as jobs/demo.yaml."
    try:
        with path.open("rb") as file:  # not read_text: /dev/zero has no end
            text = file.read(4 * MAX_CHARACTERS + 1).decode()
    except (OSError, UnicodeDecodeError) as error:
        siblings = [p.name for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
        reasons = {IsADirectoryError: "is a folder", UnicodeDecodeError: "is no text file"}
        reason = reasons.get(type(error)) or f"cannot be read: {getattr(error, 'strerror', error)}"
        raise SpecError(f"{path}: {reason}.{nearest(path.name, siblings) or hint}") from None
    try:
        values = parse_yaml(text, str(path))
    except SpecError as error:
        raise SpecError(f"{error}{hint}") from None
    if values is not None and not isinstance(values, dict):
        raise SpecError(f"{path}: holds {shown(values)}; allowed: a mapping of sections such as train:.{hint}")
    return values or {}


_parsed = functools.lru_cache(maxsize=1000)(parse_yaml)


def read_sections(path: Path) -> dict[str, Any]:
    """`read_mapping`, of many files that are nearly the same: what was written by `io.to_yaml` is parsed by sections,
    equal ones once."""
    with contextlib.suppress(OSError, ValueError, AttributeError, SpecError), path.open("rb") as file:
        text = file.read(MAX_CHARACTERS).decode()
        head, *sections = re.split("^(?=[a-z])", text, flags=re.MULTILINE)
        values = {key: value for section in sections for key, value in _parsed(section, "").items()}
        odd = len(text) == MAX_CHARACTERS or "\n." in text or re.search("^[^#]", head, re.MULTILINE)
        if len(values) == len(sections) and not odd:
            return values
    return read_mapping(path)

"""docs/spec.md, every key of the spec, from the spec itself.

python -m tests.spec_page    writes it anew
"""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cifar_hpc.config import fields as spec_fields
from cifar_hpc.config.io import MAY_CHANGE, NOT_IN_NAME, to_plain
from cifar_hpc.config.spec import Spec

PAGE = Path(__file__).resolve().parent.parent / "docs" / "spec.md"
HEAD = """# Every key of a spec
Made from `cifar_hpc/config/spec.py` by `python -m tests.spec_page`. A job file ([jobs/](../jobs)) has those that differ
from the defaults; `--set KEY=VALUE` overrides one. A key that is unknown, of a wrong type or out of range is an error
that names it.

"""


def page() -> str:
    """The text of docs/spec.md."""
    tables = "\n".join(_tables(Spec, to_plain(Spec())))
    return (
        f"{HEAD}Not part of a run's name, and free to change while it is under way: {_listed(NOT_IN_NAME)}.\n"
        f"Free to change, but part of the name: {_listed(k for k in MAY_CHANGE if k not in NOT_IN_NAME)}.\n{tables}\n"
        "The section `sweep`, which only a job file has: [sweeps.md](sweeps.md).\n"
    )


def _listed(keys: typing.Iterable[str]) -> str:
    return ", ".join(f"`{key}`" for key in keys)


def _tables(cls: Any, defaults: dict[str, Any]) -> Iterator[str]:
    hints = typing.get_type_hints(cls)
    for section in dataclasses.fields(cls):
        yield f"\n## {section.name}\n| key | default | allowed | what |\n|---|---|---|---|"
        inner = typing.get_type_hints(hints[section.name])
        for key in dataclasses.fields(hints[section.name]):
            allowed = spec_fields.describe(inner[key.name], key.metadata)
            cells = (
                f"`{section.name}.{key.name}`",
                f"`{json.dumps(defaults[section.name][key.name])}`",
                allowed,
                key.metadata["help"],
            )
            yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


if __name__ == "__main__":
    PAGE.write_text(page())

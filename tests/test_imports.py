"""ARCHITECTURE.md's table of modules, held: who may import whom, by reading the code and by running it."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "cifar_hpc"
MODULES = sorted(p.stem for p in PACKAGE.glob("*.py") if p.stem != "__init__")
TABLE = {
    cells[1].strip().split(",")[0]: re.findall(r"`(\w+)`", cells[2])
    for line in (ROOT / "ARCHITECTURE.md").read_text().splitlines()
    if (cells := line.split("|"))[0] == "" and len(cells) == 5
}
SHARED, LOGIN, COMPUTE, BRIDGE, TRACKERS, DRAWING, ENTRY = (
    TABLE[side] for side in ("shared", "login node", "compute", "bridge", "trackers", "drawing", "entry points")
)


def imports(path: Path) -> tuple[set[str], set[str]]:
    """(modules of this package, packages from outside the standard library) that a file imports, anywhere in it."""
    own, foreign = set(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} imports relatively"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            first, *rest = name.split(".")
            if first != "cifar_hpc":
                foreign |= {first} - sys.stdlib_module_names
            elif rest[0] in MODULES:
                own.add(rest[0])
            else:
                assert rest == ["__version__"], f"{path.name}: {name} is no module"
    return own, foreign


def at_top(module: str) -> set[str]:
    """Modules of this package that importing `module` brings in, by its own top-level statements."""
    tree = ast.parse((PACKAGE / f"{module}.py").read_text())
    tree.body = [n for n in tree.body if isinstance(n, (ast.Import, ast.ImportFrom))]
    names = [f"{n.module}.{a.name}" for n in tree.body if isinstance(n, ast.ImportFrom) for a in n.names]
    return {n.split(".")[1] for n in names if n.startswith("cifar_hpc.")} & set(MODULES)


def loaded_by(statement: str) -> set[str]:
    """Top-level packages that a fresh interpreter has loaded after `statement`."""
    code = f"import sys\n{statement}\nprint(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
        env={k: v for k, v in os.environ.items() if not k.startswith("COV")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_the_table_names_every_module_once() -> None:
    named = [
        *SHARED,
        *LOGIN,
        *COMPUTE,
        *BRIDGE,
        *TRACKERS,
        *DRAWING,
        *(m for m in ENTRY if m != "submit" and m != "py"),
    ]
    assert sorted(named) == MODULES


@pytest.mark.parametrize("module", SHARED)
def test_shared_modules_import_earlier_ones_and_yaml(module: str) -> None:
    own, foreign = imports(PACKAGE / f"{module}.py")
    assert own <= set(SHARED[: SHARED.index(module)])
    assert foreign <= {"yaml"}


@pytest.mark.parametrize("module", LOGIN)
def test_login_modules_never_touch_the_compute_side(module: str) -> None:
    own, foreign = imports(PACKAGE / f"{module}.py")
    assert own <= {*SHARED, *LOGIN, *DRAWING, *(["worker"] if module == "launcher" else [])}
    assert foreign <= {"yaml", "rich", *{"launcher": ["submitit"], "completion": ["shtab"]}.get(module, [])}


@pytest.mark.parametrize("module", COMPUTE)
def test_compute_modules_know_nothing_of_the_login_side(module: str) -> None:
    own, foreign = imports(PACKAGE / f"{module}.py")
    assert own <= {*SHARED, *COMPUTE, *DRAWING}
    assert foreign <= {"torch", "torchvision", "yaml", "numpy", "PIL", "safetensors"}


@pytest.mark.parametrize("module", TRACKERS)
def test_what_is_beside_a_run_knows_no_part_of_it_and_loads_a_tracker_only_when_it_runs(module: str) -> None:
    own, foreign = imports(PACKAGE / f"{module}.py")
    assert own <= {*SHARED, *TRACKERS}
    assert foreign <= {"tensorboard", "wandb"}
    assert not loaded_by(f"import cifar_hpc.{module}") & {"tensorboard", "wandb", "numpy", "torch"}


@pytest.mark.parametrize("module", DRAWING)
def test_drawing_modules_know_neither_side_and_load_nothing_heavy(module: str) -> None:
    own, foreign = imports(PACKAGE / f"{module}.py")
    assert own <= {*SHARED, *DRAWING, *(["architecture"] if module == "plot_architecture" else [])}
    assert foreign <= {"matplotlib", "plotext", "numpy"}
    assert not loaded_by(f"import cifar_hpc.{module}") & {"matplotlib", "plotext", "numpy", "torch"}


@pytest.mark.parametrize("module", [*BRIDGE, "__main__"])
def test_entry_points_import_the_rest_only_when_it_is_needed(module: str) -> None:
    assert at_top(module) <= set(SHARED)


def test_importing_has_no_circles() -> None:
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path, module])
        if module not in done:
            for other in sorted(at_top(module)):
                visit(other, (*path, module))
            done.add(module)

    for module in MODULES:
        visit(module, ())


@pytest.mark.parametrize("module", [*LOGIN, "worker", "__main__"])
def test_importing_a_login_module_loads_no_torch(module: str) -> None:
    assert not loaded_by(f"import cifar_hpc.{module}") & {"torch", "torchvision", "numpy"}


def test_shared_modules_and_the_help_of_submit_py_load_nothing_heavy() -> None:
    heavy = {"torch", "torchvision", "numpy", "submitit", "rich", "cloudpickle"}
    assert not loaded_by("import " + ", ".join(f"cifar_hpc.{m}" for m in SHARED)) & heavy
    run = "sys.argv[1:] = ['--help']\nimport runpy\ntry: runpy.run_path('submit.py', None, '__main__')"
    loaded = loaded_by(f"{run}\nexcept SystemExit: pass")
    assert "argparse" in loaded
    assert not loaded & heavy


def test_importing_the_whole_compute_side_loads_neither_submitit_nor_rich() -> None:
    loaded = loaded_by("import " + ", ".join(f"cifar_hpc.{m}" for m in COMPUTE))
    assert "torch" in loaded
    assert not loaded & {"submitit", "rich", "cloudpickle", "matplotlib"}

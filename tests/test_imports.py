"""Rules about imports: each room imports only from rooms below it, and loads nothing heavy by accident."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "cifar_hpc"
# But models/standalone.py, which export copies beside the weights and nothing imports.
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "standalone.py")
CELLAR = {"errors", "files", "randomness", "tensorfile", "text"}
SHIMS = {"model", "spec"}  # old places that the cards of exported models name

# (room, rooms that it may import from, packages that it may import)
RULES: dict[str, tuple[set[str], set[str]]] = {
    "slurm": (set(), set()),
    "config": ({"slurm"}, {"yaml"}),
    "runs": ({"slurm", "config"}, {"yaml"}),
    "data": ({"config"}, {"torch", "torchvision", "PIL", "numpy"}),
    "models": ({"config", "data"}, {"torch", "safetensors"}),
    "training": ({"slurm", "config", "runs", "data", "models"}, {"torch", "numpy"}),
    "launch": ({"slurm", "config", "runs", "data", "training"}, {"submitit", "yaml"}),
}
COMPUTE = {"data", "models", "training"}


def room(path: Path) -> str:
    """The room of a file; for a base module its own name."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def module(path: Path) -> str:
    """The dotted name of a file."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path, *, top_level: bool = False) -> tuple[set[str], set[str]]:
    """(modules of this package, packages from outside the standard library) that a file imports."""
    own, foreign = set(), set()
    tree = ast.parse(path.read_text())
    for node in tree.body if top_level else ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            if name.startswith("cifar_hpc."):
                known = [module(f) for f in FILES if f.name != "__init__.py"]
                own |= {other for other in known if name == other or name.startswith(other + ".")}
            else:
                foreign |= {name.split(".")[0]} - sys.stdlib_module_names - {"cifar_hpc"}
    return own, foreign


def loaded_by(statement: str) -> set[str]:
    """Top-level packages that a fresh interpreter has loaded after `statement`."""
    code = f"import sys\n{statement}\nprint(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
        env={k: v for k, v in os.environ.items() if not k.startswith("COV")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def everything(*rooms: str) -> str:
    """A statement that imports all modules of `rooms`."""
    return "import " + ", ".join(module(f) for f in FILES if room(f) in rooms and f.name != "__init__.py")


def test_every_file_is_in_a_room_or_is_a_base_module() -> None:
    assert {room(f) for f in FILES} == {*RULES, *CELLAR, *SHIMS, "cli", "__main__", "__init__"}


@pytest.mark.parametrize("path", [f for f in FILES if room(f) in RULES], ids=module)
def test_a_room_imports_only_from_rooms_below_it(path: Path) -> None:
    rooms, packages = RULES[room(path)]
    own, foreign = imports(path)
    assert {name.split(".")[1] for name in own} <= {room(path), *rooms, *CELLAR}
    assert foreign <= packages


@pytest.mark.parametrize("name", sorted(CELLAR))
def test_base_modules_import_only_base_modules(name: str) -> None:
    own, foreign = imports(PACKAGE / f"{name}.py")
    assert {other.split(".")[1] for other in own} <= CELLAR
    assert foreign <= ({"torch"} if name in ("randomness", "tensorfile") else set())


@pytest.mark.parametrize("path", [f for f in FILES if f.name == "__init__.py" and f.parent != PACKAGE], ids=module)
def test_packages_import_nothing_eagerly(path: Path) -> None:
    assert imports(path, top_level=True) == (set(), set())


def test_only_commands_print() -> None:
    printing = {
        module(path)
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
        if not any(keyword.arg == "file" for keyword in node.keywords)
    }
    assert {name for name in printing if name.split(".")[1] != "cli"} == set()


def test_importing_has_no_circles() -> None:
    graph = {module(f): imports(f, top_level=True)[0] for f in FILES}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path, name])
        if name not in done:
            for other in sorted(graph[name]):
                visit(other, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


@pytest.mark.process
def test_the_login_side_loads_no_torch() -> None:
    names = everything("errors", "files", "text", "slurm", "config", "runs", "launch")
    assert not loaded_by(names) & {"torch", "torchvision", "numpy", "submitit", "rich"}


@pytest.mark.process
def test_the_help_of_submit_py_and_the_commands_parser_load_nothing_heavy() -> None:
    heavy = {"torch", "torchvision", "numpy", "submitit", "rich", "cloudpickle", "yaml"}
    run = "sys.argv[1:] = ['--help']\nimport runpy\ntry: runpy.run_path('submit.py', None, '__main__')"
    loaded = loaded_by(f"{run}\nexcept SystemExit: pass")
    assert "argparse" in loaded
    assert not loaded & heavy
    assert not loaded_by("import cifar_hpc, cifar_hpc.__main__") & heavy


@pytest.mark.process
def test_the_compute_side_loads_neither_submitit_nor_rich() -> None:
    loaded = loaded_by(everything(*COMPUTE))
    assert "torch" in loaded
    assert not loaded & {"submitit", "rich", "cloudpickle", "matplotlib"}


@pytest.mark.process
def test_figures_load_a_drawing_library_only_when_they_draw() -> None:
    assert not loaded_by(everything_below("figures")) & {"matplotlib", "plotext", "numpy", "torch"}


def everything_below(folder: str) -> str:
    """A statement that imports all modules in cli/`folder`."""
    return "import " + ", ".join(module(f) for f in FILES if f.parent.name == folder and f.name != "__init__.py")

"""A user's own network or images: the files that a target such as `mynets.py:WideResNet` needs, and loading it.

The submission finds the files without running them: the target's own, and those beside it that it imports. Jobs run
copies of them, which lie in a folder by their digest, so later edits never reach a run."""

import ast
import hashlib
import importlib
import os
import re
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from cifar_hpc.errors import RunFailedError, SpecError
from cifar_hpc.files import DIRECTORY_MODE, expand_path, read_regular, write_atomic
from cifar_hpc.text import one_line, shown

_TAKEN = {*sys.stdlib_module_names, "cifar_hpc", "numpy", "torch", "torchvision"}  # importing these finds others
_TARGET = re.compile(r"(?P<place>[^:\0]+\.py|[A-Za-z_]\w*(\.[A-Za-z_]\w*)*):(?P<name>[A-Za-z_]\w*(\.[A-Za-z_]\w*)*)")


def check_target(target: str, key: str) -> None:
    """Check the form of a target.

    Raises:
        SpecError: names `key`.
    """
    if _TARGET.fullmatch(target) is None:
        raise SpecError(
            f"{key}: {shown(target)} is not allowed; allowed: FILE.py:NAME, with a path from the job file's folder, "
            "such as mynets.py:WideResNet, or MODULE:NAME of an installed package, such as torchvision.models:resnet18."
        )


def is_file(target: str | None) -> bool:
    """Return whether a target is in a file of the user, and not in an installed package."""
    return target is not None and target.rpartition(":")[0].endswith(".py")


def collect(target: str, folder: Path, key: str) -> dict[str, bytes]:
    """Read the file of a target, and all files beside it that it imports, by their paths.

    Args:
        folder: of the job file; imports are searched there and beside the file itself.
        key: the spec's key that names the target, for messages.

    Raises:
        SpecError: a file cannot be read, imported by its name or parsed, or does not define the target's name.
    """
    place, _, name = target.rpartition(":")
    path = Path(os.path.abspath(folder / expand_path(place, key)))  # noqa: PTH100 - links stay as they are
    roots = [_package_root(path), Path(os.path.abspath(folder))]  # noqa: PTH100
    base = roots[1] if path.is_relative_to(roots[1]) else roots[0]
    found: dict[Path, bytes] = {}
    left = [path]
    while left:
        file = left.pop()
        if file in found:
            continue
        try:
            found[file] = read_regular(file)
            tree = ast.parse(found[file], file.name)
        except OSError as error:
            raise SpecError(f"{key}: {shown(target)}: {file} cannot be read: {error.strerror}.") from None
        except (SyntaxError, ValueError) as error:
            line = f", line {error.lineno}" if isinstance(error, SyntaxError) else ""
            raise SpecError(f"{key}: {file}{line}: is no Python: {getattr(error, 'msg', error)}.") from None
        if file == path:
            _check_name(tree, name.partition(".")[0], f"{key}: {shown(target)}: {file}")
        left += [part for part in _imported(tree, file, roots) if part.is_relative_to(base)]
    for file in found:
        parts = file.relative_to(_package_root(file)).with_suffix("").parts
        if parts[0] in _TAKEN or "." in parts[-1]:
            raise SpecError(
                f"{key}: {file} is not allowed; allowed: names without a dot, and none of a module of Python, "
                "torch, torchvision, numpy or cifar_hpc, which would be imported in its place. HINT: rename it."
            )
    return {file.relative_to(base).as_posix(): content for file, content in sorted(found.items())}


def _check_name(tree: ast.Module, name: str, where: str) -> None:
    """Check that a file may define `name`; one that imports with a star may define anything."""
    defined = {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.alias))}
    defined |= {node.asname for node in ast.walk(tree) if isinstance(node, ast.alias) and node.asname}
    defined |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    if name not in defined and "*" not in defined:
        known = [node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
        raise SpecError(f"{where} defines no {name}; it defines: {', '.join(known) or 'nothing'}.")


def _package_root(file: Path) -> Path:
    """The folder from which `file` is imported: above all packages that it is in."""
    folder = file.parent
    while (folder / "__init__.py").exists() and folder.parent != folder:
        folder = folder.parent
    return folder


def _imported(tree: ast.Module, file: Path, roots: list[Path]) -> Iterator[Path]:
    """Files below `roots` that a file imports, also within functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                for root in roots:
                    yield from _files_of(root, alias.name.split("."))
        elif isinstance(node, ast.ImportFrom):
            starts = [file.parents[node.level - 1]] if 0 < node.level <= len(file.parents) else roots
            parts = node.module.split(".") if node.module else []
            for start in starts:
                for alias in node.names:  # a module, or a name within one
                    yield from _files_of(start, [*parts, alias.name])


def _files_of(root: Path, parts: list[str]) -> Iterator[Path]:
    """The files that importing a dotted name from `root` runs."""
    for number in range(len(parts) + 1):
        place = root.joinpath(*parts[:number])
        candidates = [place / "__init__.py"] if number == 0 else [place / "__init__.py", place.with_suffix(".py")]
        yield from (candidate for candidate in candidates if candidate.is_file())


def digest_of(files: dict[str, bytes]) -> str:
    """Digest of the files' names and contents, 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for name, content in sorted(files.items()):
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()[:16]


def write(files: dict[str, bytes], folder: Path) -> None:
    """Write `files` to the folder of their digest below `folder`, unless they are there."""
    place = folder / digest_of(files)
    for name, content in files.items():
        if not (place / name).is_file() or (place / name).read_bytes() != content:
            (place / name).parent.mkdir(DIRECTORY_MODE, parents=True, exist_ok=True)
            write_atomic(place / name, content)


def load(target: str, code: str | None, folder: Path, key: str) -> Any:
    """Import what a target names.

    Args:
        code: digest of its files, in the folder of that name below `folder`; None for an installed package.

    Raises:
        SpecError: its files are missing or modified.
        RunFailedError: importing it fails; shows the line of the user's file.
    """
    place, _, name = target.rpartition(":")
    try:
        if code is None:
            value: Any = importlib.import_module(place)
        else:
            value = _import_file(place, code, folder / code, key)
        for part in name.split("."):
            value = getattr(value, part)
    except (SpecError, RunFailedError):
        raise
    except (Exception, SystemExit) as error:  # argparse outside of `if __name__ == "__main__"` exits
        hint = ""
        if isinstance(error, ImportError):
            hint = (
                ". HINT: jobs have the files beside it and beside the job file, and what is installed for "
                f"{sys.executable}; relative imports need an __init__.py, which may be empty, in their folder."
            )
        raise RunFailedError(explain(error, folder, f"{key}: {shown(target)} cannot be loaded") + hint) from None
    return value


_loaded: list[Path] = []  # the folder whose files are imported at the moment


def _import_file(place: str, code: str, folder: Path, key: str) -> Any:
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.py")}
    if digest_of(files) != code:
        state = "has been modified" if files else "is missing"
        raise SpecError(f"{key}: the copy of {place} in {folder} {state}. HINT: submit the run again.")
    root, module = module_of(place, folder)
    if _loaded and _loaded[-1] != folder:  # files of another run may have the same names
        for name, loaded in list(sys.modules.items()):
            if (getattr(loaded, "__file__", None) or "").startswith(f"{_loaded[-1]}/"):
                del sys.modules[name]
        sys.path[:] = [entry for entry in sys.path if not Path(entry).is_relative_to(_loaded[-1])]
    if not _loaded or _loaded[-1] != folder:
        _loaded[:], sys.path[:0] = [folder], [str(root), str(folder)]
    bytecode, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # the copy stays as it was made
    try:
        return importlib.import_module(module)
    finally:
        sys.dont_write_bytecode = bytecode


def module_of(place: str, folder: Path) -> tuple[Path, str]:
    """Return the folder from which a target's file is imported, and the module's dotted name.

    Args:
        folder: of the copies; `place` may begin with folders that the copies have not.
    """
    parts = Path(place).parts
    file = next(path for first in range(len(parts)) if (path := folder.joinpath(*parts[first:])).is_file())
    root = _package_root(file)
    return root, ".".join(file.relative_to(root).with_suffix("").parts)


def explain(error: BaseException, folder: Path, what: str) -> str:
    """Describe an error of a user's code by the last line of it that was running.

    Args:
        folder: above the folders of copies.
    """
    line = line_of(error, folder)
    words = one_line(str(error))[:500]
    return f"{what}: {line + ': ' if line else ''}{type(error).__name__}{': ' + words if words else ''}"


def frames_of(error: BaseException, folder: Path) -> TracebackType | None:
    """Return the part of an error's traceback that begins in user files below `folder`, without the callers' frames."""
    frames = error.__traceback__
    while frames is not None and not frames.tb_frame.f_code.co_filename.startswith(f"{folder}/"):
        frames = frames.tb_next
    return frames


def line_of(error: BaseException, folder: Path) -> str:
    """Return the last line of user files below `folder` that was running at an error; an empty text if none was."""
    lines = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.startswith(f"{folder}/")]
    if not lines:
        return ""
    name = "/".join(Path(lines[-1].filename).relative_to(folder).parts[1:])
    return f"{name}, line {lines[-1].lineno}: {lines[-1].line}"

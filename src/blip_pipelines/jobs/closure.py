"""Which files of the package decide what a module does: its import closure, found by reading the source.

Nothing is imported to find it. Nested imports count, `__init__` files of the packages on the way count, and a string
constant that is the dotted name of a module of the package counts too: jobs are launched by name.
"""

import ast
import functools
import importlib.util
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from blip_pipelines.data.storage import sha256, sha256_file

_DOTTED = re.compile(r"\w+(\.\w+)+")


def closure(modules: str | Iterable[str]) -> list[Path]:
    """The files of the modules' own top-level package that running them may execute, sorted.

    Args:
        modules: dotted names, all of one top-level package.

    Raises:
        ModuleNotFoundError: there is no such module.
    """
    waiting = [modules] if isinstance(modules, str) else list(modules)
    root = _root(waiting[0])
    for name in waiting:
        if not _file(root, name):
            raise ModuleNotFoundError(f"{name}: no such module under {root}", name=name)
    found: dict[str, Path] = {}
    while waiting:
        name = waiting.pop()
        parts = name.split(".")
        for depth in range(1, len(parts) + 1):
            module = ".".join(parts[:depth])
            file = _file(root, module)
            if file and module not in found:
                found[module] = file
                waiting += _mentioned(root, module, file, file.stat().st_mtime_ns)
    return sorted(set(found.values()))


def file_hashes(files: Iterable[Path]) -> dict[str, str]:
    """sha256 by path, relative to the folder above their package: equal wherever the package is installed."""
    files = sorted(files)
    root = _above_packages(files[0])
    return {file.relative_to(root).as_posix(): sha256_file(file) for file in files}


def code_hash(files: Iterable[Path]) -> str:
    """One hash of names and contents."""
    return sha256("".join(f"{name}\0{digest}\n" for name, digest in file_hashes(files).items()).encode())


def changed_files(old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    """What differs between two `file_hashes`, a line each, for messages."""
    lines = []
    for name in sorted({*old, *new}):
        if old.get(name) != new.get(name):
            lines.append(f"{name} ({'added' if name not in old else 'removed' if name not in new else 'changed'})")
    return lines


def _root(module: str) -> Path:
    """The folder that holds the top-level package (or module) of a dotted name, found without importing it."""
    top = module.partition(".")[0]
    spec = importlib.util.find_spec(top)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"{top}: no such package", name=top)
    return _above_packages(Path(spec.origin))


def _above_packages(file: Path) -> Path:
    folder = file.parent
    while (folder / "__init__.py").exists():
        folder = folder.parent
    return folder


def _file(root: Path, module: str) -> Path | None:
    path = root.joinpath(*module.split("."))
    for candidate in (path / "__init__.py", path.with_suffix(".py")):
        if candidate.is_file():
            return candidate
    return None


@functools.lru_cache(maxsize=1024)
def _mentioned(root: Path, module: str, file: Path, _modified_ns: int) -> tuple[str, ...]:
    """Modules of the same package that the file names."""
    top = module.partition(".")[0]
    names = _names(ast.parse(file.read_bytes(), str(file)), module, file.name == "__init__.py")
    return tuple(sorted({name for name in names if name.partition(".")[0] == top and _file(root, name)}))


def _names(tree: ast.AST, module: str, is_package: bool) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(node, module, is_package)
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and _DOTTED.fullmatch(node.value):
            yield node.value


def _absolute(node: ast.ImportFrom, module: str, is_package: bool) -> str:
    if not node.level:
        return node.module or ""
    up = node.level - (1 if is_package else 0)
    parts = module.split(".")[: len(module.split(".")) - up]
    return ".".join([*parts, *([node.module] if node.module else [])])

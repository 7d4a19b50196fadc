"""The import closure of a file: what it imports, what that imports, and so on.

Read by ast, so nothing is imported; imports inside functions count. A job's code is the closure of
its stage and its plug-ins: an edited file makes stale exactly the jobs whose closure holds it.
"""

from __future__ import annotations

import ast
import os
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path, PurePosixPath

from workflow.messages import ParamsError

# They only watch what runs; no result depends on them.
OBSERVERS = frozenset(f"stages/kit/job/{name}.py" for name in ("track", "told", "courier"))


def closure(entries: Iterable[str], root: Path) -> tuple[str, ...]:
    """Posix paths below `root`, sorted, of the entries and of all that they import.

    Only stages/** and workflow/checks.py are followed, OBSERVERS are left out. A module comes with
    the __init__.py of its packages. ParamsError for a file that is not Python.
    """
    found, seen, waiting = set(), set(OBSERVERS), []
    for entry in entries:
        found.add(entry)
        waiting += [entry, *_packages(entry)]
    base = os.fspath(root)
    while waiting:
        path = waiting.pop()
        if path in seen:
            continue
        seen.add(path)
        if (state := _state(f"{base}/{path}")) is not None:
            found.add(path)
            if path.endswith(".py"):
                waiting += imports(base, path, state)
    return tuple(sorted(found))


def _state(file: str) -> tuple[int, int] | None:
    """(modification time, size) of a file, None if there is no such file."""
    try:
        found = os.stat(file)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return found.st_mtime_ns, found.st_size


@lru_cache(maxsize=4096)
def imports(root: str, path: str, state: tuple[int, int]) -> tuple[str, ...]:
    """Where the modules that a file imports would lie; some of the paths do not exist.

    `state` is not read: it makes the cache forget what an edited file imported before.
    """
    package = PurePosixPath(path).parent.parts
    tree = parse(path, Path(root, path).read_text(encoding="utf-8"))
    modules = {module for node in ast.walk(tree) for module in _modules(node, package)}
    files = {file for module in modules for file in _files(module)}
    return tuple(f for f in files if f.startswith("stages/") or f == "workflow/checks.py")


def parse(path: str, text: str) -> ast.Module:
    """The syntax tree of a file; ParamsError with its line if it is not Python."""
    try:
        return ast.parse(text, path)
    except SyntaxError as error:
        raise ParamsError(f"{path}, line {error.lineno}: {error.msg}") from None


def _modules(node: ast.AST, package: tuple[str, ...]) -> Iterator[str]:
    """Dotted names of what a statement imports. `package`: of the file, for relative imports."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        above = package[: len(package) - node.level + 1] if node.level else ()
        module = ".".join([*above, *([node.module] if node.module else [])])
        yield module
        yield from (f"{module}.{alias.name}" for alias in node.names)  # a module, or a name in it


def _files(module: str) -> list[str]:
    """Where a module may lie, and its packages' __init__.py."""
    path = module.replace(".", "/")
    return [f"{path}.py", f"{path}/__init__.py", *_packages(path)]


def _packages(path: str) -> list[str]:
    parts = PurePosixPath(path).parts[:-1]
    return ["/".join([*parts[:n], "__init__.py"]) for n in range(len(parts), 0, -1)]


def mentions(tree: ast.Module) -> frozenset[str]:
    """Names that a file reads as attributes (`config.lr`) or holds as strings ("lr").

    What `__post_init__` and `check` of a class named Config say is left out: a setting that is
    only checked is not used.
    """
    names: set[str] = set()
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            names.add(node.attr)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names.add(node.value)
        children = list(ast.iter_child_nodes(node))
        if isinstance(node, ast.ClassDef) and node.name == "Config":
            children = [c for c in children if getattr(c, "name", "") not in _CHECKS]
        waiting += children
    return frozenset(names)


_CHECKS = ("__post_init__", "check")

"""The plug-ins in stages/{sources,encoders,targets,methods,tasks}: one file each, found by name.

There is no registry: the kind in params.yaml is the file's name. `declared` reads what a file
declares from its text, so the plan needs no torch; `module` imports it, for the stages.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib
import re
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from pydantic import ConfigDict, TypeAdapter

from workflow import checks
from workflow.closure import closure, mentions, parse
from workflow.literals import DEFAULTS, REQUIRED, literals
from workflow.messages import ParamsError, did_you_mean, nearest

__all__ = ["ROOT", "ParamsError", "Plugin", "declared", "module", "names"]
__all__ += ["did_you_mean", "nearest"]

ROOT = Path(__file__).resolve().parents[1]
NAME = re.compile(r"[a-z0-9][a-z0-9_-]*\Z")
FOLDERS = {
    "source": "sources",
    "encoder": "encoders",
    "target": "targets",
    "method": "methods",
    "task": "tasks",
}
# Keys of an entry in params.yaml that are not settings of its plug-in.
WORDS = {
    "source": (),
    "encoder": ("kind",),
    "target": ("kind", "upstream", "seed", "data", "model", "recipe"),
    "method": ("kind", "recipe"),
    "task": ("kind", "data", "after", "recipe"),
}


@dataclass(frozen=True)
class Plugin:
    """What a plug-in file declares. `literals`: its module-level literals, with their defaults."""

    path: str
    config: type
    literals: dict[str, Any]
    doc: str = dataclasses.field(repr=False)

    @property
    def fields(self) -> list[str]:
        """Names of the settings."""
        return [f.name for f in dataclasses.fields(self.config) if f.init]

    @functools.cached_property
    def adapter(self) -> TypeAdapter:
        """Builds the Config from JSON and checks all types."""
        return TypeAdapter(self.config)


def names(kind: str, root: Path = ROOT) -> list[str]:
    """Names of all plug-ins of a kind: "source", "encoder", "target", "method" or "task"."""
    files = (root / "stages" / FOLDERS[kind]).glob("*.py")
    return sorted(p.stem for p in files if not p.stem.startswith("_"))


def module(kind: str, name: str) -> ModuleType:
    """The imported plug-in, with the default of every literal that it does not declare.

    ParamsError with the nearest name if there is no such file.
    """
    _file(kind, name, ROOT)
    found = importlib.import_module(f"stages.{FOLDERS[kind]}.{name}")
    for key, value in DEFAULTS[kind].items():
        if value is not REQUIRED and not hasattr(found, key):
            setattr(found, key, value)
    return found


def declared(kind: str, name: str, root: Path = ROOT) -> Plugin:
    """What a plug-in declares, read without importing it.

    ParamsError if there is no such file, if it cannot be read so, or if nothing reads one of its
    settings.
    """
    path = _file(kind, name, root)
    text = (root / path).read_text(encoding="utf-8")
    plugin, unread = _declared(kind, path, text)
    if unread:
        _refuse_unread(plugin, unread, root)
    return plugin


def _file(kind: str, name: str, root: Path) -> str:
    path = f"stages/{FOLDERS[kind]}/{name}.py"
    if not NAME.match(name) or name.startswith("_") or not (root / path).is_file():
        what = f"kind of {kind}" if kind in ("target", "encoder") else kind
        raise ParamsError(
            f"there is no {what} {name!r}: {path} does not exist{nearest(name, names(kind, root))}"
        )
    return path


@functools.lru_cache(maxsize=256)
def _declared(kind: str, path: str, text: str) -> tuple[Plugin, frozenset[str]]:
    """The plug-in, and the settings that it adds to those which it inherits and does not read."""
    tree = parse(path, text)
    found = literals(kind, path, tree)
    node = next((n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "Config"), None)
    if node is None:
        raise ParamsError(f"{path}: has no dataclass named Config for its settings")
    config = _config(path, node)
    fields = {f.name for f in dataclasses.fields(config)}
    for key in fields.intersection(WORDS[kind]):
        raise ParamsError(f"{path}: Config has a setting {key!r}, which is a word of params.yaml")
    for key in set(found.get("PATHS", ())) - fields:
        raise ParamsError(f"{path}: PATHS names {key!r}, which is no setting{nearest(key, fields)}")
    bases = [base for base in config.__bases__ if dataclasses.is_dataclass(base)]
    inherited = {f.name for base in bases for f in dataclasses.fields(base)}
    plugin = Plugin(path, config, found, ast.get_docstring(tree) or "")
    return plugin, frozenset(fields - inherited - mentions(tree))


def _config(path: str, node: ast.ClassDef) -> type:
    """The class Config, executed alone."""
    space = {
        "dataclass": dataclass,
        "field": dataclasses.field,
        "Literal": Literal,
        "checks": checks,
        "__name__": path,
    }
    try:
        exec(compile(ast.Module([node], []), path, "exec", dont_inherit=True), space)
    except NameError as error:
        raise ParamsError(
            f"{path}: Config may use only builtins, Literal, field and checks ({error})"
        ) from None
    except Exception as error:  # whatever Python objects to, such as a mutable default
        raise ParamsError(f"{path}: Config cannot be read: {error}") from None
    config = space["Config"]
    if "__dataclass_fields__" not in vars(config):
        raise ParamsError(f"{path}: Config must be decorated with @dataclass(frozen=True)")
    config.__pydantic_config__ = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    return config


def _refuse_unread(plugin: Plugin, unread: frozenset[str], root: Path) -> None:
    """ParamsError if no file that the plug-in imports reads one of these settings either."""
    read: set[str] = set()
    for path in closure([plugin.path], root):
        if path.startswith("stages/"):  # workflow/checks.py only checks
            read |= mentions(parse(path, (root / path).read_text(encoding="utf-8")))
    for key in sorted(unread - read):
        near = did_you_mean(key, read | set(plugin.fields) - unread, 0.75)
        raise ParamsError(
            f"{plugin.path}: nothing reads the setting {key!r} of Config, neither this file nor "
            f"what it imports{near}"
        )

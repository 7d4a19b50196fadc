"""What the files in stages/{sources,targets,methods,tasks} declare, read from their text without
importing them.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import importlib
import re
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from pydantic import ConfigDict

from workflow import checks

ROOT = Path(__file__).resolve().parents[1]
NAME = re.compile(r"[a-z0-9][a-z0-9_-]*\Z")
FOLDERS = {
    "source": "sources",
    "encoder": "encoders",
    "target": "targets",
    "method": "methods",
    "task": "tasks",
}


class ParamsError(ValueError):
    """Something in params.yaml (or a plug-in it names) is wrong; the message lists every problem
    found.
    """

    plain = True  # the message is for the user: stages print it without a traceback


@dataclass(frozen=True)
class Plugin:
    """What a plug-in file declares: its settings class and its module-level literals."""

    path: str
    config: type
    literals: dict[str, Any]

    @property
    def fields(self) -> list[str]:
        return [f.name for f in dataclasses.fields(self.config) if f.init]

    def defaults(self) -> dict[str, Any]:
        return {
            f.name: f.default
            for f in dataclasses.fields(self.config)
            if f.default is not dataclasses.MISSING
        }


LITERALS = {
    "TARGET": None,
    "UPSTREAM": None,
    "PRODUCES": None,
    "LABELS": False,
    "TRAINS": True,
    "SPREADS": False,
    "ENCODERS": ("vit",),
}


def plugin_names(kind: str, root: Path = ROOT) -> list[str]:
    """Names of all plug-ins of a kind ("method", "target", "task", "source"), from the folder."""
    return sorted(
        p.stem for p in (root / "stages" / FOLDERS[kind]).glob("*.py") if not p.stem.startswith("_")
    )


def plugin(kind: str, name: str, root: Path = ROOT) -> Plugin:
    """Read stages/<kind>s/<name>.py without importing it. ParamsError if it is not there or cannot
    be read so.
    """
    path = root / "stages" / FOLDERS[kind] / f"{name}.py"
    relative = path.relative_to(root).as_posix()
    if not NAME.match(name) or name.startswith("_") or not path.is_file():
        what = "kind of target" if kind == "target" else kind
        raise ParamsError(
            f"there is no {what} {name!r}: {relative} does not exist{nearest(name, plugin_names(kind, root))}"
        )
    return _declared(relative, path.read_text(encoding="utf-8"))


@functools.lru_cache(maxsize=256)
def _declared(path: str, text: str) -> Plugin:
    try:
        body = ast.parse(text, path).body
    except SyntaxError as error:
        raise ParamsError(f"{path}, line {error.lineno}: {error.msg}") from None
    literals, config = dict(LITERALS), None
    for node in body:
        if isinstance(node, ast.ClassDef) and node.name == "Config":
            config = node
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for key in (t.id for t in targets if isinstance(t, ast.Name) and t.id in LITERALS):
                try:
                    literals[key] = ast.literal_eval(node.value)
                except (ValueError, TypeError):
                    raise ParamsError(
                        f'{path}, line {node.lineno}: {key} must be a literal such as "ids", None or True'
                    ) from None
    if config is None:
        raise ParamsError(f"{path}: has no dataclass named Config for its settings")
    space = {
        "dataclass": dataclass,
        "field": dataclasses.field,
        "Literal": Literal,
        "checks": checks,
        "__name__": path,
    }
    try:
        exec(compile(ast.Module([config], []), path, "exec", dont_inherit=True), space)
    except NameError as error:
        raise ParamsError(
            f"{path}: Config may use only builtins, Literal, field and checks ({error})"
        ) from None
    except (
        Exception
    ) as error:  # a wrong default, an unhashable one, ...: whatever Python says about that class
        raise ParamsError(f"{path}: Config cannot be read: {error}") from None
    if not dataclasses.is_dataclass(space["Config"]):
        raise ParamsError(f"{path}: Config must be decorated with @dataclass(frozen=True)")
    space["Config"].__pydantic_config__ = ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False
    )
    return Plugin(path, space["Config"], literals)


def module(kind: str, name: str) -> ModuleType:
    """Imports stages/<folder>/<name>.py. ParamsError with the nearest name if there is no such file;
    an import error inside the file passes on as it is.
    """
    known = plugin_names(kind)
    if name not in known:
        raise ParamsError(f"there is no {kind} {name!r}{nearest(name, known)}")
    return importlib.import_module(f"stages.{FOLDERS[kind]}.{name}")


def did_you_mean(word, words) -> str:
    """The nearest of `words`, for the end of a message; nothing if none is near."""
    near = difflib.get_close_matches(str(word), list(words), 1, 0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


def nearest(word, words) -> str:
    """The nearest of `words` and all of them, for the end of a message."""
    allowed = f" (allowed: {', '.join(sorted(words))})" if words else " (none is defined)"
    return did_you_mean(word, words) + allowed

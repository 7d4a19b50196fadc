"""The section `methods`."""

from __future__ import annotations

from dataclasses import dataclass

from workflow.params.sections import MethodWords
from workflow.params.settings import Checker, Layer
from workflow.plugins import Plugin


@dataclass(frozen=True)
class Method:
    """An entry of `methods`. `layers`: its recipe, if it asks for one, and its settings."""

    kind: str
    plugin: Plugin
    key: str
    layers: list[Layer]


def check_methods(checker: Checker) -> dict[str, Method]:
    """The entries of `methods` whose file is good, used or not; problems go to the checker."""
    found = {}
    for name, section in checker.params.methods.items():
        key = f"methods.{name}"
        words, given = checker.words(MethodWords, key, section)
        plugin = words and checker.plugin("method", key, name, words.kind)
        if not plugin:
            continue
        kind = words.kind or name
        layers = [checker.published(plugin, key)] if words.recipe else []
        layers.append(Layer(key, given))
        checker.settings("method", kind, plugin, key, layers)
        found[name] = Method(kind, plugin, key, layers)
    return found

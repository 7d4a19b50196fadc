"""Masked-image-modelling methods, one file each; the file's name is the method's name in
params.yaml.

A method module has: a docstring (paper, idea, every departure), `TARGET`, `LABELS`, `TRAINS`, a
frozen dataclass `Config`, `views(config, spec)` and `class Method(nn.Module)`. docs/ tells how to
write one; the tests sweep this folder.
"""

from __future__ import annotations

from types import ModuleType

from stages.kit.plugin import load


def find(name: str) -> ModuleType:
    """The module of method `name`; a ValueError with the nearest name if there is no such file."""
    return load("stages.methods", name)

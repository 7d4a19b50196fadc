"""Finds a plug-in module by its file name: the name in params.yaml is the module's name, there is
no registry.
"""

from __future__ import annotations

import importlib
import pkgutil
from difflib import get_close_matches
from types import ModuleType


def load(package: str, name: str) -> ModuleType:
    """Imports `<package>.<name>`. ValueError with what there is and the nearest name when no such
    file exists; an import error inside the file itself is passed on as it is.
    """
    names = sorted(
        module.name for module in pkgutil.iter_modules(importlib.import_module(package).__path__)
    )
    if name not in names:
        near = get_close_matches(name, names, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{package}: there is no {name!r}, only {', '.join(names)}{hint}")
    return importlib.import_module(f"{package}.{name}")

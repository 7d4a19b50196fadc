"""The key data.source, NAME or NAME:ARGUMENT, and the source's own settings."""

from __future__ import annotations

from workflow.params.settings import Checker, Settings
from workflow.plugins import nearest, plugin_names


def check_source(checker: Checker) -> tuple[str, str | None, Settings | None]:
    """Name, argument and settings of the source of images; problems go to the checker."""
    data = checker.params.data
    name, _, argument = data.source.partition(":")
    names = plugin_names("source", checker.root)
    settings = None
    if name not in names:
        checker.problems.append(
            f"data.source: no source is called {name!r}{nearest(name, names)}; expected shapes, folder:PATH, "
            "parquet:PATH or hub:NAME"
        )
    elif name == "shapes" and argument:
        checker.problems.append(
            f"data.source: shapes takes nothing after the colon (found {argument!r})"
        )
    elif name != "shapes" and not argument:
        what = "NAME" if name == "hub" else "PATH"
        checker.problems.append(f"data.source: {name} needs something to read, as in {name}:{what}")
    else:
        settings = checker.settings("source", name, ("data.options", data.options), suits=False)
    return name, argument or None, settings

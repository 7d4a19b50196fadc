"""Files of the user's own that params.yaml names: their state is part of the parameters of a job.

A source says of itself that it reads files: `ARGUMENT = "PATH"` is what follows the colon in
`source: NAME:PATH`, and `PATHS` lists settings that name further files. A target's setting
`local:PATH` or `file:PATH` names weights; its `PATHS` lists settings that are plain paths.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from workflow.files import sha256
from workflow.manifest import Manifest
from workflow.params import DataSet, Settings
from workflow.plan import digest
from workflow.plugins import ParamsError, did_you_mean

SCHEMES = ("local:", "file:")


@dataclass(frozen=True)
class Named:
    """A path that params.yaml names. `key`: where; `state`: makes a digest of what lies there."""

    key: str
    path: Path
    state: Callable[[Path], str]


def source_state(data: DataSet, source: dict, output: Path, params_file: Path) -> dict | None:
    """{"argument" or setting: digest} of the files that a source reads; None if it reads none.

    Of folders and of the argument the digest covers names and sizes, of other files their bytes.
    When files are gone, but `output` was made from the same `source`, the digests of that time.
    """
    named: dict[str, Named] = {}
    if data.settings.plugin.literals["ARGUMENT"] == "PATH":
        named["argument"] = Named(f"{data.key}.source", Path(data.argument), names_and_sizes)
    for setting, path in _paths(data.settings).items():
        key = data.settings.origin.get(setting, f"{data.key}.options.{setting}")
        named[setting] = Named(key, Path(path), _listing_or_bytes)
    made = _made(output)
    recorded = made.get("source_state") if made.get("source") == source else None
    return _states(named, recorded, output, params_file)


def weights_state(settings: Settings, key: str, output: Path, params_file: Path) -> dict | None:
    """{setting: digest of the bytes} of the files that a target's settings name; None for none.

    `key`: where params.yaml declares the target. When files are gone, but `output` was made from
    the same names, the digests of that time.
    """
    paths = _paths(settings)
    for setting, value in settings.config.items():
        if isinstance(value, str) and value.startswith(SCHEMES):
            paths[setting] = value.partition(":")[2]
    named = {
        setting: Named(settings.origin.get(setting, f"{key}.{setting}"), Path(path), all_bytes)
        for setting, path in paths.items()
    }
    made = _made(output).get("target", {})
    before = made.get("config", {})
    same = all(before.get(setting) == settings.config[setting] for setting in paths)
    return _states(named, made.get("files") if same else None, output, params_file)


def _paths(settings: Settings) -> dict[str, str]:
    """{setting: path} of those that the plug-in's PATHS lists and params.yaml gives."""
    paths = settings.plugin.literals.get("PATHS", ())
    return {setting: settings.config[setting] for setting in paths if settings.config[setting]}


def _made(output: Path) -> dict:
    """The parameters from which an output folder was made; empty if it is not complete."""
    manifest = Manifest.read(output / "manifest.json")
    return manifest.params if manifest else {}


def _states(
    named: dict[str, Named], recorded: dict | None, output: Path, params_file: Path
) -> dict[str, str] | None:
    found = {}
    for name, about in named.items():
        path = about.path.expanduser()
        if path.exists():
            found[name] = about.state(path)
        elif recorded:
            gone = f"{about.key}: {path} is not there"
            warnings.warn(f"{gone}; {output}, made from it before, stays in use", stacklevel=2)
            return recorded
        else:
            why = f"{about.key}: {path} does not exist{_near(path)}"
            raise ParamsError(f"{params_file}:\n  {why}")
    return found or None


def names_and_sizes(path: Path) -> str:
    """Digest of the names and sizes of all files in a folder, or of one file."""
    if path.is_dir():
        return digest.of_text("\n".join(sorted(f"{p} {size}" for p, size in _walk(str(path), ""))))
    return digest.of_text(f"{path.name} {path.stat().st_size}")


def all_bytes(path: Path) -> str:
    """Digest of the names and contents of all files in a folder, or of one file."""
    files = {path.name: path}
    if path.is_dir():
        files = {name: path / name for name, _ in sorted(_walk(str(path), ""))}
    return digest.of_value([[name, sha256(file)] for name, file in files.items()])


def _listing_or_bytes(path: Path) -> str:
    return names_and_sizes(path) if path.is_dir() else all_bytes(path)


def _walk(folder: str, prefix: str) -> Iterator[tuple[str, int]]:
    """(name below the folder, size) of every file in it."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                yield from _walk(entry.path, f"{prefix}{entry.name}/")
            elif entry.is_file():
                yield prefix + entry.name, entry.stat().st_size


def _near(path: Path) -> str:
    """For the end of a message: the nearest name in its folder, or the folder that is missing."""
    if path.parent.is_dir():
        return did_you_mean(path.name, (entry.name for entry in path.parent.iterdir()))
    missing = next(folder for folder in reversed(path.parents) if not folder.is_dir())
    return f" ({missing} is no folder)"

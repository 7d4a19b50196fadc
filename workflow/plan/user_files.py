"""Files of the user's own that params.yaml names: what they hold is part of the parameters of the
jobs that read them.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from pathlib import Path

from workflow.params import Experiment, Target
from workflow.plan import digest, manifests
from workflow.plugins import ParamsError, did_you_mean


def source_state(experiment: Experiment, results: Path, params_file: Path) -> str | None:
    """Digest of the names and sizes of the files that a folder: or parquet: source reads; None for
    other sources.

    When the files are gone but results/data was made from them (a clone with pulled results), the
    recorded digest.
    """
    name, argument, _ = experiment.source
    if name not in ("folder", "parquet"):
        return None
    path = Path(argument).expanduser()
    if path.is_file():
        return digest.of_bytes(f"{path.name} {path.stat().st_size}".encode())
    if path.is_dir():
        return digest.of_bytes(
            "\n".join(sorted(f"{p} {s}" for p, s in _walk(str(path), ""))).encode()
        )
    recorded = manifests.read(results / "data" / "manifest.json") or {}
    if recorded.get("params", {}).get("data", {}).get("source") == experiment.params.data.source:
        warnings.warn(
            f"data.source: {path} is not there; {results / 'data'}, made from it before, stays in use",
            stacklevel=2,
        )
        return recorded["params"]["source_state"]
    raise ParamsError(f"{params_file}:\n  data.source: {path} does not exist{_near(path)}")


def weights_state(target: Target, results: Path, params_file: Path) -> str | None:
    """Digest of the bytes behind a setting `local:PATH` of a target; None if it has none.

    When they are gone but the target was made from them, the recorded digest, as for a source."""
    key, path = next(
        (
            (k, v[6:])
            for k, v in target.settings.config.items()
            if isinstance(v, str) and v.startswith("local:")
        ),
        (None, None),
    )
    if key is None:
        return None
    path = Path(path).expanduser()
    if path.exists():
        files = (
            [(path.name, path)]
            if path.is_file()
            else [(n, path / n) for n, _ in sorted(_walk(str(path), ""))]
        )
        return digest.of_value([[name, digest.of_file(file)] for name, file in files])
    made = (
        (manifests.read(results / "target" / target.name / "manifest.json") or {})
        .get("params", {})
        .get("target", {})
    )
    if made.get("config", {}).get(key) == target.settings.config[key] and made.get("files"):
        warnings.warn(
            f"targets.{target.name}.{key}: {path} is not there; the target made from it before stays in use",
            stacklevel=2,
        )
        return made["files"]
    raise ParamsError(
        f"{params_file}:\n  targets.{target.name}.{key}: {path} does not exist{_near(path)}"
    )


def _near(path: Path) -> str:
    """For the end of a message: what lies there with nearly the name of `path`; else where the way
    to it ends.
    """
    if path.parent.is_dir():
        return did_you_mean(path.name, (entry.name for entry in path.parent.iterdir()))
    missing = next(folder for folder in reversed(path.parents) if not folder.is_dir())
    return f" ({missing} is no folder)"


def _walk(folder: str, prefix: str) -> Iterator[tuple[str, int]]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                yield from _walk(entry.path, f"{prefix}{entry.name}/")
            elif entry.is_file():
                yield prefix + entry.name, entry.stat().st_size

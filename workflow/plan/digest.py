"""SHA-256, of which fingerprints are made."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from workflow.files import sha256
from workflow.plan.user_files import without_places
from workflow.plugins import ParamsError


def of_text(text: str) -> str:
    """Of a text's UTF-8 bytes, as 64 hexadecimal digits; all of these are."""
    return hashlib.sha256(text.encode()).hexdigest()


def of_value(value) -> str:
    """Of anything that JSON can hold. The order of a mapping's keys does not matter."""
    return of_text(json.dumps(value, sort_keys=True, separators=(",", ":")))


def of_job(
    stage: str, params: dict, places: dict[str, str], hashes: dict[str, str], inputs: dict[str, str]
) -> str:
    """A job's fingerprint. `places`: as a Job's; `inputs`: role -> fingerprint."""
    return of_value([stage, without_places(params, places), hashes, inputs])


class Files:
    """Hashes of the files below `root`, each read once."""

    def __init__(self, root: Path):
        self.root = root
        self._known: dict[str, str] = {}

    def hashes(self, paths: tuple[str, ...]) -> dict[str, str]:
        """{path: hash}; ParamsError if a file cannot be read."""
        return {path: self._hash(path) for path in paths}

    def _hash(self, path: str) -> str:
        if path not in self._known:
            try:
                self._known[path] = sha256(self.root / path)
            except OSError as error:
                raise ParamsError(
                    f"{path}: part of the code is missing or unreadable: {error.strerror}"
                ) from None
        return self._known[path]

"""SHA-256, of which fingerprints are made."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path


def of_bytes(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def of_value(value) -> str:
    """Of anything that JSON can hold; the order of a mapping's keys does not matter."""
    return of_bytes(json.dumps(value, sort_keys=True, separators=(",", ":")).encode())


def of_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

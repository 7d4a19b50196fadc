"""The code that a job depends on: which files, and what is in them."""

from __future__ import annotations

from pathlib import Path

from workflow.plan import digest
from workflow.plugins import ROOT, ParamsError

UNTRACKED = (
    "stages/kit/job/track.py",
    "stages/kit/job/courier.py",
)  # they only watch what runs (also in .dvcignore)


class Code:
    """Hashes of the files below `root`, each read once."""

    def __init__(self, root: Path):
        self.root = root
        self._known: dict[str, str] = {}

    def hashes(self, entries: tuple[str, ...]) -> dict[str, str]:
        """{path: hash} of all files behind some entries of Job.code; ParamsError if one cannot be
        read.
        """
        return {
            path: self._hash(path) for entry in entries for path in code_files(entry, self.root)
        }

    def _hash(self, path: str) -> str:
        if path not in self._known:
            try:
                self._known[path] = digest.of_file(self.root / path)
            except OSError as error:
                raise ParamsError(
                    f"{path}: part of the code is missing or unreadable: {error.strerror}"
                ) from None
        return self._known[path]


def code_files(entry: str, root: Path = ROOT) -> list[str]:
    """The files behind an entry of Job.code: itself, or every file (of stages/kit: every module) of
    a folder.
    """
    folder = root / entry
    if not folder.is_dir():
        return [entry] if folder.exists() or not entry.endswith("__init__.py") else []
    pattern = "*.py" if entry.rstrip("/") == "stages/kit" else "*"
    found = (p for p in folder.rglob(pattern) if p.is_file() and "__pycache__" not in p.parts)
    paths = sorted(p.relative_to(root).as_posix() for p in found)
    return [p for p in paths if p not in UNTRACKED]

"""What files of the user's hold: names and SHA-256 of contents, remembered from look to look.

A file is read again when its size, times or number on the disk changed, or when it was written so
shortly before the last look that they could not tell. What is remembered lies in `work/seen/`. It
only saves time, and tells a person which file changed; without it everything is read again.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import translate
from pathlib import Path

from workflow.files import sha256, write_atomic
from workflow.messages import legible, shortened

TELL = 2 * 10**9  # bytes to be read before a person is told why it takes so long
FRESH = 2 * 10**9  # nanoseconds: what was written within them may be written again unseen


@dataclass(frozen=True)
class Names:
    """Which names below a folder count. Patterns as in a shell, capitals and small letters alike.

    reads: of files; skips: of files and folders that are passed over.
    """

    reads: tuple[str, ...] = ("*",)
    skips: tuple[str, ...] = ()

    def matchers(self):
        """(does a file of this name count?, is a file or folder of this name passed over?)."""
        return _matcher(self.reads), _matcher(self.skips)


ALL = Names()


def _matcher(patterns: tuple[str, ...]):
    if not patterns:
        return lambda name: False
    if "*" in patterns:
        return lambda name: True
    return re.compile("|".join(map(translate, patterns)), re.IGNORECASE).match


class Memory:
    """What was seen of one place: a file for its present state and one for that of the results."""

    def __init__(self, folder: Path, path: Path, names: Names):
        self.folder = folder
        place = json.dumps([os.path.abspath(path), names.reads, names.skips])
        self._place = hashlib.sha256(place.encode("utf-8", "surrogateescape")).hexdigest()[:16]

    def last(self) -> dict[str, list]:
        """{name: [stamp or None, hash]} as it was seen last; empty if it was not."""
        with suppress(OSError):  # another process may forget one of them at the same time
            files = sorted(self._files(), key=lambda file: file.stat().st_mtime_ns)
            return _content(files[-1]) if files else {}
        return {}

    def keep(self, digest: str, seen: dict[str, list], also: str | None) -> None:
        """Remember a state by its digest. Others are forgotten, but for `also`."""
        with suppress(OSError, RuntimeError):  # a full or read-only disk costs time, no result
            path = self.folder / f"{self._place}-{digest[:16]}.json"
            write_atomic(path, json.dumps(seen, separators=(",", ":")), sync=False)
            kept = {digest[:16], (also or "")[:16]}
            for file in self._files():
                if file.stem.partition("-")[2] not in kept:
                    file.unlink()

    def has(self, digest: str) -> bool:
        return (self.folder / f"{self._place}-{digest[:16]}.json").is_file()

    def _files(self) -> list[Path]:
        return list(self.folder.glob(f"{self._place}-*.json"))


def state(path: Path, names: Names, memory: Memory, recorded: str | None = None) -> str:
    """Digest of the names and contents below a folder, or of the bytes of one file.

    The folder's own name and place are no part of it. `recorded`: another digest to remember.
    OSError if the path itself cannot be read.
    """
    looked, before = time.time_ns(), memory.last()
    found = dict(_found(path, names))
    seen = _hashed(path, found, before)
    digest = _digest({name: hash for name, (_, hash) in seen.items()})
    for entry in seen.values():
        if entry[0] and max(entry[0][2], min(entry[0][1], looked)) > looked - FRESH:
            entry[0] = None
    if seen != before or not memory.has(digest):
        memory.keep(digest, seen, recorded)
    return digest


def changes(folder: Path, old: str, new: str) -> list[str]:
    """What differs between two remembered states: "a.png was added"; empty if one is forgotten."""
    both = [next(folder.glob(f"*-{digest[:16]}.json"), None) for digest in (old, new)]
    if None in both:
        return []
    before, after = ({n: entry[1] for n, entry in _content(file).items()} for file in both)
    said = []
    for name in sorted({*before, *after}):
        what = "added" if name not in before else "removed" if name not in after else "changed"
        if name and before.get(name) != after.get(name):
            said.append(f"{shortened(legible(name))} was {what}")
    return said


def _content(file: Path) -> dict[str, list]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        return content if all(len(entry) == 2 for entry in content.values()) else {}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _digest(hashes: dict[str, str]) -> str:
    total = hashlib.sha256()
    for name in sorted(hashes):
        total.update(os.fsencode(name) + b"\0" + hashes[name].encode() + b"\0")
    return total.hexdigest()


def _found(path: Path, names: Names) -> Iterator[tuple[str, list | str]]:
    """(name below the path, stamp) of every file that counts; "" is the name of a single file.

    Of what cannot be read as a file, a word instead of the stamp. A folder to which several links
    lead is entered once.
    """
    about = path.stat()
    if not stat.S_ISDIR(about.st_mode):
        yield "", _stamp(about)
        return
    reads, skips = names.matchers()
    seen = {(about.st_dev, about.st_ino): ""}
    waiting = [("", str(path))]
    while waiting:
        prefix, folder = waiting.pop()
        try:
            with os.scandir(folder) as listed:
                entries = sorted(listed, key=lambda entry: entry.name, reverse=True)
        except OSError:
            if not prefix:
                raise
            yield prefix, "unreadable"
            continue
        for entry in entries:
            if skips(entry.name):
                continue
            name, word = prefix + entry.name, "unreadable"
            with suppress(OSError):
                about = entry.stat()
                if stat.S_ISDIR(about.st_mode):
                    first = seen.setdefault((about.st_dev, about.st_ino), name)
                    if first == name:
                        waiting.append((f"{name}/", entry.path))
                    else:
                        yield f"{name}/", f"is {first or 'the folder itself'}"
                    continue
                word = _stamp(about) if stat.S_ISREG(about.st_mode) else "no file"
            if reads(entry.name):
                yield name, word


def _stamp(about: os.stat_result) -> list[int]:
    return [about.st_size, about.st_mtime_ns, about.st_ctime_ns, about.st_ino]


def _hashed(path: Path, found: dict[str, list | str], before: dict[str, list]) -> dict[str, list]:
    """{name: [stamp or None, hash]}; files that look as before are not read."""
    seen, waiting = {}, []
    for name, stamp in found.items():
        if isinstance(stamp, str):
            seen[name] = [None, stamp]
        elif name in before and before[name][0] == stamp:
            seen[name] = [stamp, before[name][1]]
        else:
            waiting.append(name)
    size = sum(found[name][0] for name in waiting)
    if size > TELL:
        what = f"{len(waiting)} files ({size / 1e9:.1f} GB) of {path}"
        print(f"reading {what} once, so that changes are seen", file=sys.stderr, flush=True)

    def read(name: str) -> list:
        try:
            return [found[name], sha256(path / name if name else path)]
        except OSError:
            if not name:
                raise
            return [None, "unreadable"]

    with ThreadPoolExecutor(4) as pool:
        seen |= zip(waiting, pool.map(read, waiting), strict=True)
    return seen

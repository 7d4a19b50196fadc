"""Jobs whose engine was killed and that go on: they hold their lock, and are waited for."""

from __future__ import annotations

import json
import os
from pathlib import Path


def sign(path: Path) -> None:
    """Write into a lock file, which this process holds, who it is and who started it."""
    path.write_text(json.dumps([os.getpid(), _above(os.getpid())]))


def left_behind(path: Path) -> int | None:
    """The process that signed a lock file, if it is alive and one that started it is not.

    None where the system does not tell (there is no /proc).
    """
    try:
        pid, above = json.loads(path.read_text())
    except (OSError, ValueError, TypeError):
        return None
    now = _above(pid)
    return pid if now and now != above else None


def _above(pid: int) -> list[int]:
    """The processes above one, the nearest first; empty if it is not there."""
    found = []
    while pid > 1:
        try:
            stat = Path(f"/proc/{pid}/stat").read_text()
        except OSError:
            return []
        pid = int(stat.rpartition(")")[2].split()[1])
        found.append(pid)
    return found

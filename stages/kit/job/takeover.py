"""A job that would make again what it has made before takes that over instead.

workflow/plan/kept.py says what was set aside and when it is the same. Here the files are linked
into the output folder, and every hash is compared with the manifest of then. Where one differs, or
a file is missing, the job computes as any other.
"""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path

from workflow.files import sha256
from workflow.manifest import Manifest

# How and when the outputs were computed stays true of them.
STAYS = (
    *("outputs", "content", "environment", "git", "wall_s", "peak_memory_mb"),
    *("device", "threads", "summary", "created"),
)


def restored(old: Manifest, kept: Path, out: Path) -> bool:
    """Fill the empty folder `out` with what an old manifest lists, from `kept`; all of it or False.

    OSError if the disk is full, where files have to be copied.
    """
    for path, hash in old.outputs.items():
        source, to = kept / path, out / path
        to.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            _bring(source, to)
        if not to.is_file() or sha256(to) != hash:
            return False
    return True


def facts(old: Manifest) -> dict:
    """What the new manifest says as the old one did, and where it is from."""
    before = old.taken_over or old.fingerprint
    return {name: getattr(old, name) for name in STAYS} | {"taken_over": before}


def _bring(source: Path, to: Path) -> None:
    try:
        os.link(source, to)
    except FileNotFoundError:
        raise
    except OSError:
        shutil.copyfile(source, to)

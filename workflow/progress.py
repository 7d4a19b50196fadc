"""How far a running job is: `progress.json` in its work folder, for whoever watches.

A stage writes it when a job begins, a training every few seconds, and once more when a job fails.
No result depends on it, and nothing waits for it: it is not synced to the disk, and where it cannot
be written the job goes on. It goes with the work folder when the job has finished.
"""

from __future__ import annotations

import json
import os
import platform
import time
from contextlib import contextmanager, suppress
from pathlib import Path

from workflow.files import JobError, write_atomic

FILE = "progress.json"


@contextmanager
def shown(work: Path, job: str):
    """Notes that the job inside runs, and why it ended if it did not finish."""
    _write(work, {"job": job, "state": "running", "pid": os.getpid(), "host": platform.node()})
    note(work, began=time.time())
    try:
        yield
    except SystemExit:
        note(work, state="stopped")
        raise
    except BaseException as error:
        kind = "" if getattr(error, "plain", False) else f"{type(error).__name__}: "
        note(work, state="failed", error=f"{kind}{error}")
        raise


def note(work: Path, **facts) -> None:
    """Add facts to a job's record, such as step, steps, images_per_s; they replace older ones."""
    _write(work, read(work) | facts | {"time": time.time()})


def read(work: Path) -> dict:
    """The record in a work folder; {} if there is none."""
    try:
        found = json.loads((work / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def alive(record: dict) -> bool:
    """Whether the process that wrote a record lives. On another machine nobody can know: True."""
    if record.get("host") != platform.node():
        return True
    try:
        os.kill(int(record["pid"]), 0)
    except PermissionError:
        return True
    except (OSError, KeyError, ValueError):
        return False
    return True


def _write(work: Path, record: dict) -> None:
    with suppress(OSError, JobError):
        write_atomic(work / FILE, json.dumps(record), sync=False)

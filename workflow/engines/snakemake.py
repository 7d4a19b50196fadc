"""File times by which Snakemake decides as the plan does, and who owns its locks."""

from __future__ import annotations

import fcntl
import os
import platform
import shutil
import time
import warnings
from contextlib import suppress
from pathlib import Path
from typing import IO

from workflow.engines.exhibits import exhibits
from workflow.plan import Job, Plan

# Nanoseconds of 1980-01-02: older than any input. Snakemake takes 1970 for "no time at all", and
# zip files begin in 1980.
STALE = 315_619_200 * 10**9
PATIENCE = 2.0  # seconds in which another dry run ends


def reconcile(plan: Plan) -> None:
    """Give the outputs of all jobs times by which Snakemake, which goes by time alone, is right.

    Those of a fresh job are never older than its inputs', those of a stale job are of 1980.
    Contents stay as they are. A second call, also while jobs run, changes nothing more.
    """
    times: dict[str, int] = {}
    for id, job in plan.jobs.items():
        fresh = plan.fresh(id)
        inputs = [times[name] for name in job.inputs.values()] or [_stage_file(job, plan)]
        shown = [each.path for each in exhibits(plan)] if id == "report" else []
        for path in (*job.files, *shown, _benchmark(job, plan)):
            time = _time(path)
            if time is None:
                continue
            wanted = max(time, *inputs) if fresh else STALE
            if time != wanted:
                _set_time(path, wanted, job)
        times[id] = _time(job.manifest) or 0


def own(folder: Path) -> IO | None:
    """Sign this run into Snakemake's folder, and take over locks whose owner was killed.

    Keep what it returns: that file is locked until the process ends, however it ends. Snakemake's
    own locks are plain files. They are removed if nobody holds a lock here, which a run that lives
    does, and only this machine has signed. None where files cannot be locked.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / "owners").open("a+", encoding="utf-8")
    except OSError:
        return None
    host, locks = platform.node(), folder / "locks"
    try:
        if _locked(file, fcntl.LOCK_EX, PATIENCE if locks.is_dir() else 0):
            file.seek(0)
            if set(file.read().split("\n")) == {host, ""}:
                shutil.rmtree(locks, ignore_errors=True)
            if not locks.is_dir():
                file.truncate(0)
        file.write(f"{host}\n")
        file.flush()
        if _locked(file, fcntl.LOCK_SH, PATIENCE):
            return file
    except OSError:
        pass
    file.close()
    return None


def _locked(file: IO, how: int, patience: float) -> bool:
    """Lock the file within so many seconds; OSError where the file system knows no locks."""
    end = time.monotonic() + patience
    while True:
        with suppress(BlockingIOError):
            fcntl.flock(file, how | fcntl.LOCK_NB)
            return True
        if time.monotonic() >= end:
            return False
        time.sleep(0.05)


def _set_time(path: Path, time: int, job: Job) -> None:
    try:
        os.utime(path, ns=(time, time))
    except OSError as error:
        if not path.exists():  # its job has just begun again
            return
        what = f"{path}: its time cannot be set ({error.strerror})"
        warnings.warn(f"{what}; Snakemake may run {job.id} again", stacklevel=3)


def _benchmark(job: Job, plan: Plan) -> Path:
    """Where Snakemake notes a job's time and memory; that file counts as one of its outputs."""
    return plan.results.parent / "logs" / "benchmarks" / f"{job.id}.tsv"


def _stage_file(job: Job, plan: Plan) -> int:
    """The time of the stage's file: Snakemake's only input of a job that has no other."""
    return _time(plan.root / f"stages/{job.stage}.py") or 0


def _time(path: Path) -> int | None:
    """Modification time in nanoseconds; None if there is no such file."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return None

"""File times by which Snakemake decides as the plan does."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

from workflow.plan import Job, Plan

# ns: 1980-01-02: older than any input; Snakemake overlooks 1970 itself, zip files need 1980
STALE = 315_619_200 * 10**9


def reconcile(plan: Plan) -> None:
    """Give manifests times by which Snakemake decides rightly: a fresh one is not older than its
    inputs, a stale one lies in 1980. Contents stay as they are. Doing it twice, or while jobs run,
    changes nothing more.
    """
    times: dict[str, int] = {}
    for job in plan.jobs.values():
        found = {f: t for f in (*job.files, _benchmark(job, plan)) if (t := _mtime(f)) is not None}
        if not found:
            continue
        if fresh := plan.fresh(job.id):
            wanted = max([times.get(i, 0) for i in job.inputs] + [_oldest(job, plan)])
        else:
            wanted = STALE
        for path, time in found.items():
            if time < wanted if fresh else time != wanted:
                try:
                    os.utime(path, ns=(wanted, wanted))
                except OSError as error:  # gone, as its job is running just now, or another user's
                    if path.exists():
                        said = f"{path}: its time cannot be set ({error.strerror})"
                        warnings.warn(f"{said}; Snakemake may run {job.id} again", stacklevel=2)
        times[job.id] = _mtime(job.manifest) or 0


def _benchmark(job: Job, plan: Plan) -> Path:
    """Where Snakemake notes time and memory of a job; it counts that file's time among the
    outputs'.
    """
    return plan.results.parent / "logs" / "benchmarks" / f"{job.id}.tsv"


def _oldest(job: Job, plan: Plan) -> int:
    """The time of stages/data.py, which the rule of the data stage has as its input so that 1980
    counts as older.
    """
    return 0 if job.inputs else _mtime(plan.root / f"stages/{job.stage}.py") or 0


def _mtime(path: Path) -> int | None:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return None

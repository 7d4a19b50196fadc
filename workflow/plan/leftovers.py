"""Outputs of jobs that were in the plan once: listed, and deleted on request."""

from __future__ import annotations

import shutil
from pathlib import Path

from workflow.plan import Plan

PLACES = ("data/*", "target/*", "pretrain/*", "transfer/*/*")


def leftovers(plan: Plan) -> list[Path]:
    """Output folders with a manifest that belong to no job of the plan."""
    known = {job.output for job in plan.jobs.values()}
    manifests = [m for place in PLACES for m in plan.results.glob(f"{place}/manifest.json")]
    return sorted({manifest.parent for manifest in manifests} - known)


def prune(plan: Plan) -> list[Path]:
    """Delete the leftovers, each manifest first; the list of what was deleted."""
    found = leftovers(plan)
    for folder in found:
        (folder / "manifest.json").unlink()
        shutil.rmtree(folder)
    return found

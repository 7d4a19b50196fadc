"""Outputs of jobs that were in the plan once: listed, and deleted on request."""

from __future__ import annotations

import shutil
from pathlib import Path

from workflow.manifest import FILE
from workflow.plan import Plan, kept

PLACES = ("data/*", "target/*", "pretrain/*", "transfer/*/*")


def leftovers(plan: Plan) -> list[Path]:
    """Output folders with a manifest that belong to no job of the plan, and what is kept of such
    jobs.
    """
    known = {job.output for job in plan.jobs.values()}
    known |= {kept.place(job, plan) for job in plan.jobs.values()}
    found = {m.parent for place in PLACES for m in plan.results.glob(f"{place}/{FILE}")}
    aside = plan.aside("")
    found |= {folder for place in PLACES for folder in aside.glob(place) if folder.is_dir()}
    return sorted(found - known)


def prune(plan: Plan) -> list[Path]:
    """Delete the leftovers, each manifest first; the list of what was deleted."""
    found = leftovers(plan)
    for folder in found:
        (folder / FILE).unlink(missing_ok=True)
        shutil.rmtree(folder)
    return found

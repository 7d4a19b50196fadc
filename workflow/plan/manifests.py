"""Manifests on disk: a folder that has one is complete, and says what it was made from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from workflow.plan import Plan


def read(path: Path) -> dict | None:
    """The manifest in a file; None if there is none, or if it is not one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def seconds(manifest: dict) -> float:
    """What a job took: the wall time of its last start, or its whole training's if it was killed on
    the way.
    """
    return max(manifest["wall_s"], manifest["summary"].get("train_s") or 0)


def leftovers(plan: Plan) -> list[Path]:
    """Output folders with a manifest that belong to no job of the plan."""
    known = {job.output for job in plan.jobs.values()}
    places = ("target/*", "pretrain/*", "transfer/*/*")
    found = [
        path.parent for place in places for path in plan.results.glob(f"{place}/manifest.json")
    ]
    return sorted(folder for folder in found if folder not in known)


def prune(plan: Plan) -> list[Path]:
    """Delete the outputs of jobs that are no longer in the plan; the list of what was deleted."""
    found = leftovers(plan)
    for folder in found:
        (folder / "manifest.json").unlink()
        shutil.rmtree(folder)
    return found

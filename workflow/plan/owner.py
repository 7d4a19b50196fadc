"""Which params file a results folder belongs to: another one does not replace its results unasked.

`results/.params` names the file whose jobs ran last, as seen from that folder. Without it the owner
is the params.yaml beside the folder.
"""

from __future__ import annotations

import os
from pathlib import Path

from workflow.files import write_changed
from workflow.messages import ParamsError
from workflow.plan import Plan

FILE = ".params"


def check(plan: Plan) -> None:
    """ParamsError if a job would replace a result that another params file made."""
    owner = _owner(plan.results)
    if plan.compute["replace"] or owner is None or _same(owner, plan.params_file):
        return
    for job in plan.jobs.values():
        if plan.manifest(job.id) is not None and not plan.fresh(job.id):
            raise ParamsError(
                f"{plan.params_file}: found {plan.results}, which holds {job.id} and more of "
                f"{os.path.relpath(owner)}, expected another folder (snakemake --config "
                f"params={plan.params_file} results=FOLDER, or --results FOLDER), or compute: "
                "{replace: true}, to replace them"
            )


def claim(plan: Plan) -> None:
    """Check, then note that the folder is that of this params file."""
    check(plan)
    write_changed(plan.results / FILE, os.path.relpath(plan.params_file, plan.results) + "\n")


def _owner(results: Path) -> Path | None:
    """The file that a folder belongs to, if it is still there."""
    try:
        noted = (results / FILE).read_text(encoding="utf-8").rstrip("\n")
    except (OSError, ValueError):
        noted = "../params.yaml"
    # relpath knows no links: results may be one
    path = Path(os.path.normpath(results.absolute() / noted))
    return path if path.is_file() else None


def _same(one: Path, other: Path) -> bool:
    """Whether both are one file, or copies."""
    return os.path.samefile(one, other) or one.read_bytes() == other.read_bytes()

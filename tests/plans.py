"""For tests of the plan: plans of tiny params files, edits of code, jobs finished without work."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

from tests.conftest import tiny_content, write_params
from workflow.plan import Plan, load
from workflow.plugins import ROOT

MAE = {
    "pretrain/mae-s0",
    "transfer/mae-s0/knn",
    "transfer/mae-s0/linear",
    "transfer/mae-s0/finetune",
    "report",
}


def editable(folder: Path) -> Path:
    """The project's stages, copied into a folder where they can be edited."""
    shutil.copytree(
        ROOT / "stages", folder / "stages", ignore=shutil.ignore_patterns("__pycache__")
    )
    (folder / "workflow").mkdir()
    return folder


def plan_of(folder: Path, root: Path = ROOT, **changes) -> Plan:
    """The plan of a tiny params file; `changes` as for tiny_content."""
    return load(write_params(folder, tiny_content(**changes)), folder / "results", root)


def changed(before: Plan, after: Plan) -> set[str]:
    """The jobs that are only in one of the plans, or have another fingerprint."""
    ids = {*before.jobs, *after.jobs}
    return {
        i
        for i in ids
        if i not in before.jobs
        or i not in after.jobs
        or before.jobs[i].fingerprint != after.jobs[i].fingerprint
    }


def finish(plan, *ids: str) -> None:
    """What running these jobs leaves behind, without the work."""
    for id in ids or plan.jobs:
        job = plan.jobs[id]
        job.output.mkdir(parents=True, exist_ok=True)
        for file in job.files[1:]:
            file.write_text("x")
        (job.output / "value").write_text("x")
        job.manifest.write_text(plan.finished(id, outputs={"value": ""}).text())


@contextlib.contextmanager
def edited(root: Path, path: str):
    """A comment more in a file, or a new file, for the time of a test."""
    file = root / path
    before = file.read_text() if file.exists() else None
    file.write_text((before or "") + "\n# edited\n")
    try:
        yield
    finally:
        file.unlink() if before is None else file.write_text(before)

"""workflow/runs.json: what dvc.yaml loops over, as params.yaml asks for it."""

from __future__ import annotations

import json
import os
import tempfile

from workflow.plan import Plan

RUNS = "workflow/runs.json"


def loops(plan: Plan) -> dict:
    """What dvc.yaml loops over, under one key of its own (DVC merges this file with params.yaml)."""
    p, data = plan.params, plan.jobs["data"].params
    watch = {"source": {"path": data["source"]["argument"]}} if data["source_state"] else {}
    alone, above, without, using = {}, {}, {}, {}
    for job in plan.jobs.values():
        if job.stage == "target":
            about, upstream = job.params["target"], p.targets[job.name].get("upstream")
            item = {"kind": about["kind"], "files": about.get("files")}
            (above if upstream else alone)[job.name] = item | (
                {"upstream": upstream} if upstream else {}
            )
            watch |= {f"target-{job.name}": {"path": job.name}} if item["files"] else {}
        elif job.stage == "pretrain":
            item = {"run": job.params["run"], "method": job.params["method"]["name"]}
            (using if job.inputs[1:] else without)[job.name] = item | dict(
                zip(["teacher"], job.inputs[1:])
            )
    content = {
        "data": {"data": {"source": data["source"]["name"]}},
        "source_state": data["source_state"],
        "watch": watch,
        "targets": alone,
        "targets_upstream": above,
        "runs": {
            n: {"method": r.method, "target": r.target, "teacher": r.teacher, "set": r.set}
            for n, r in plan.runs.items()
        },
        "pretrain": without,
        "pretrain_taught": using,
        "jobs": [*without, *using],
        "tasks": list(p.tasks),
    }
    return {"plan": content}


def runs_text(plan: Plan) -> str:
    """JSON, as DVC reads it hundreds of times in a `dvc status`, with a reader for YAML that is
    slow.
    """
    return json.dumps(loops(plan), indent=1) + "\n"


def write_runs(plan: Plan) -> bool:
    """Write workflow/runs.json if it differs; True if it did. Whole or not at all."""
    path, text = plan.root / RUNS, runs_text(plan)
    if path.exists() and path.read_text(encoding="utf-8") == text:
        return False
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".runs-")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(text)
    os.chmod(temporary, 0o644)
    os.replace(temporary, path)
    return True

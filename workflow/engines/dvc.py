"""What dvc.yaml follows, and DVC's record of what Snakemake made.

workflow/runs.json lists the jobs for the loops of dvc.yaml; it is in git. `results/plan/<job>`
holds the fingerprint that the plan gives to a job; every job has its own as a dependency, so DVC
sees a changed parameter, code file or input without knowing any of them.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

from workflow.files import write_changed
from workflow.plan import Job, Plan, load

RUNS = "workflow/runs.json"
VEGA = ("vega", "vega-lite", "vega-embed")


def loops(plan: Plan) -> dict:
    """What dvc.yaml loops over: of each stage, its jobs with what their commands and inputs need.

    `data` is the data set that a job reads, `above` the input that is made last.
    """
    stages: dict[str, dict] = {stage: {} for stage in ("data", "target", "pretrain", "transfer")}
    for job in plan.jobs.values():
        if job.stage not in stages:
            continue
        item = {}
        if job.stage == "transfer":
            item["run"], item["task"] = job.name.split("/")
        if job.inputs:
            item |= {"data": job.inputs["data"], "above": list(job.inputs.values())[-1]}
        stages[job.stage][job.name] = item
    stage, _, key = _plan_stage(plan).partition("@")
    return {"plan": {"plan": {}, "watch": {}} | {stage: {key: {}}} | stages}


def runs_text(plan: Plan) -> str:
    """workflow/runs.json as it should be. All is under one key: DVC merges it with params.yaml."""
    return json.dumps(loops(plan), indent=1) + "\n"


def follow(plan: Plan) -> bool:
    """Write workflow/runs.json and the fingerprints where they differ; True if the jobs changed."""
    folder = plan.results / "plan"
    for job in plan.jobs.values():
        write_changed(folder / job.id, job.fingerprint)
    known = {folder / id for id in plan.jobs}
    for path in [p for p in folder.rglob("*") if p.is_file() and p not in known]:
        path.unlink()
    offline(plan.root)
    return write_changed(plan.root / RUNS, runs_text(plan))


def offline(root: Path) -> None:
    """Lay Vega where the page of `dvc plots` (.dvc/plots/page.html) looks for it, once.

    DVC itself has it loaded from the network. Snakemake brings it for its own reports; without that
    copy the page loads it as DVC does.
    """
    snakemake, place = importlib.util.find_spec("snakemake"), root / ".dvc/tmp/vega.js"
    if snakemake is None or place.exists() or not (root / ".dvc").is_dir():
        return
    folder = Path(snakemake.origin).parent / "assets/data"
    with contextlib.suppress(OSError):
        parts = [(folder / name / f"{name}.js").read_text(encoding="utf-8") for name in VEGA]
        place.parent.mkdir(exist_ok=True)
        write_changed(place, "\n".join(parts))


def note(job: Job, plan: Plan) -> None:
    """Have DVC record a finished job under the fingerprint that it was made with.

    It differs from what `follow` wrote when a file was edited while the job waited or ran.
    """
    path = plan.results / "plan" / job.id
    if path.is_file():
        write_changed(path, job.fingerprint)


def stage_name(job: Job) -> str:
    """The name of a job's stage in dvc.yaml."""
    return job.id if job.stage == job.id else f"{job.stage}@{job.name}"


def _plan_stage(plan: Plan) -> str:
    """The name of the stage that writes the fingerprints; "watch" looks at files every time."""
    watch = outside(plan) or any(job.user_files for job in plan.jobs.values())
    return "watch@files" if watch else "plan@params"


def outside(plan: Plan) -> str:
    """Why DVC cannot take the results, which lie on another disk; empty if they do not."""
    root = (plan.root / "results").parent.resolve()
    place = (plan.root / "results").resolve()
    if place.is_relative_to(root):
        return ""
    return (
        f"found {plan.results} as a link to {place}, expected a folder of the checkout, as DVC "
        "takes no other; Snakemake does (`--config dvc=false` ends this warning)"
    )


def record(plan: Plan) -> bool:
    """`dvc commit` the finished jobs, so that dvc.lock and DVC's cache follow; True if it did.

    Does nothing without DVC or outside of a DVC repository. A failure is a warning: results are
    good without it.
    """
    if not (plan.root / ".dvc").is_dir() or importlib.util.find_spec("dvc") is None:
        return False
    plan = load(plan.params_file, plan.results, plan.root)  # it may have changed meanwhile
    follow(plan)
    fresh = [job for job in plan.jobs.values() if plan.fresh(job.id)]
    everything = len(fresh) == len(plan.jobs)
    names = [] if everything else [_plan_stage(plan), *map(stage_name, fresh)]
    if outside(plan):
        print(f"warning: dvc.lock was not updated: {outside(plan)}", file=sys.stderr)
        return False
    command = [sys.executable, "-m", "dvc", "commit", "--force", *names]
    environment = os.environ | {"DVC_NO_ANALYTICS": "1", "DO_NOT_TRACK": "1"}
    done = subprocess.run(command, cwd=plan.root, env=environment, capture_output=True, text=True)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR: ")]
        why = said[-1].removeprefix("ERROR: ") if said else done.stderr.strip()[-500:]
        why = why or f"dvc commit ended with status {done.returncode}"
        hint = "; `--config dvc=false` does without it"
        print(f"warning: dvc.lock was not updated: {why}{hint}", file=sys.stderr)
    return done.returncode == 0

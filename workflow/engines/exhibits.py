"""What Snakemake's own report shows (`snakemake --report report.zip`): the page, every figure and
picture of the report stage, and the record of every job, by stage and method or task.

Figures and pictures are outputs of the rule `report` only once that job is done, as nobody knows
before which there will be.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from workflow.plan import Plan

CATEGORIES = {  # Snakemake sorts them
    "report": "1. Report",
    "data": "2. Data",
    "target": "3. Targets",
    "pretrain": "4. Pretraining",
    "transfer": "5. Tasks",
}
FIGURES = {  # how the names of figures begin -> stage, what they show
    "loss": ("pretrain", "training loss"),
    "scores": ("transfer", "scores of all runs"),
    "cost": ("transfer", "scores against cost"),
    "stages": ("transfer", "scores by stage of a chain"),
    "target": ("target", ""),
}
ALL = "all"


@dataclass(frozen=True)
class Exhibit:
    """A file with its place in the report. subcategory: a method, task, target or data set;
    caption: the name of a file in workflow/report/.
    """

    path: Path
    category: str
    subcategory: str
    labels: dict[str, str]

    @property
    def caption(self) -> str:
        return "figures" if self.path.suffix == ".svg" else "pictures"


def exhibits(plan: Plan) -> list[Exhibit]:
    """The figures and pictures of the report stage; none before it is done."""
    if not plan.fresh("report"):
        return []
    folder = plan.jobs["report"].output
    figures = [_figure(plan, path) for path in sorted(folder.glob("figures/*.svg"))]
    return figures + [_picture(plan, path) for path in sorted(folder.glob("pictures/*/*/*.png"))]


def about(plan: Plan) -> dict[str, str]:
    """What the first page of Snakemake's report says of this experiment."""
    made = plan.manifest("report") if plan.fresh("report") else None
    git = (made and made.git) or {}
    return {
        "experiment": plan.experiment,
        "params": str(plan.params_file),
        "headline": str(made.summary.get("headline", "")) if made else "",
        "fingerprint": made.fingerprint if made else "",
        "commit": f"{git.get('commit', '')}{', with changes' if git.get('dirty') else ''}",
    }


def _figure(plan: Plan, path: Path) -> Exhibit:
    kind, _, name = path.stem.partition("-")
    stage, what = FIGURES.get(kind, ("report", path.stem))
    if stage == "pretrain":
        return _exhibit(path, stage, _method(plan, name), what, name)
    if stage == "target":
        targets = [job.name for job in plan.jobs.values() if job.stage == "target"]
        of = max((t for t in targets if name.startswith(f"{t}-")), key=len, default=name)
        return _exhibit(path, stage, of, name.removeprefix(f"{of}-"), of)
    return _exhibit(path, stage, name if stage == "transfer" else "", what, ALL)


def _picture(plan: Plan, path: Path) -> Exhibit:
    stage, name = path.parts[-3:-1]
    what, run = path.stem.replace("_", " "), plan.runs.get(name)
    if stage == "pretrain" and run:
        return _exhibit(path, stage, run.method, what, name, str(run.seeds[0]))
    return _exhibit(path, stage, name, what, name)


def _exhibit(path: Path, stage: str, of: str, what: str, name: str, seed: str = ALL) -> Exhibit:
    return Exhibit(path, CATEGORIES[stage], of, labelled(what, name, seed))


def labelled(what: str, name: str = ALL, seed: str = ALL, score: str = "") -> dict[str, str]:
    """The same columns everywhere: else Snakemake shows names of files instead."""
    return {"what": what, "of": name, "seed": seed, "score": score}


def _method(plan: Plan, run: str) -> str:
    return plan.runs[run].method if run in plan.runs else run


def subcategory(plan: Plan, id: str) -> str:
    """Under what a job's record stands: its method, task, target or data set."""
    job = plan.jobs[id]
    if job.stage == "pretrain":
        return job.params["method"]["name"]
    return job.params["task"]["name"] if job.stage == "transfer" else job.name


def labels(plan: Plan, id: str) -> dict[str, str]:
    """The line of a job's record, with its score if it is a task's."""
    job = plan.jobs[id]
    name = job.params.get("run", job.name)
    return labelled("record", name, str(job.params.get("seed", "")), _score(plan, id))


def _score(plan: Plan, id: str) -> str:
    path = plan.jobs[id].output / "metrics.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return f"{found[found['headline']['key']]:.4f}"
    except (OSError, ValueError, KeyError, TypeError):
        return ""

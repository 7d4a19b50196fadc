"""What MLflow is told of a job: tags, parameters, what it was made from, what a run cost.

MLflow's table shows one row per pretraining, a run of params.yaml with one seed. That row is the
parent of the pretraining job and of its tasks. It is the same for all of them, in whatever order
they arrive, since its `group` is the fingerprint of the pretraining.

Data sets and targets are shared by many pretrainings, but in MLflow a run has one parent. A copy
for each would count their cost many times, and the first pretraining that names a target is no
better a parent than the others. So they are children of one row of their own, with the reports, and
every pretraining links to those that it was made from: by tags with their fingerprints, and by its
description. This file must not import anything slow.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from stages.kit.job.provenance import git_state
from stages.kit.settings import differing, flat
from workflow.manifest import Manifest

SHARED = {"group": "shared", "name": "data, targets, reports", "stage": "shared"}


def story(run) -> dict:
    """The facts of a job that has started. `run`: a Run of kit/job/job.py."""
    group = _group(run)
    return {
        "tags": _tags(run) | {"group": group["group"]},
        "params": flat(run.job.params),
        "made_from": _made_from(run.plan, run.job),
        "data": _data(run),
        "group": group,
    }


def cost(run) -> dict[str, float]:
    """What a finished pretraining cost, as the report counts it.

    Images, seconds and FLOPs include the runs whose encoders taught it; targets count in
    seconds_in_all and in FLOPs.
    """
    if run.job.stage != "pretrain" or (own := Manifest.read(run.job.manifest)) is None:
        return {}
    jobs = run.plan.jobs
    above = [Manifest.read(jobs[id].manifest) for id, _ in _made_from(run.plan, run.job)]
    above = [manifest for manifest in above if manifest]
    trained = [own, *(m for m in above if m.stage == "pretrain")]
    everything = trained + [m for m in above if m.stage == "target"]

    def images(manifest: Manifest) -> float:
        return manifest.summary.get("images_seen") or 0

    def flops(manifest: Manifest) -> float:
        return images(manifest) * (manifest.summary.get("flops_per_image") or 0)

    return {
        "images_seen": sum(map(images, trained)),
        "seconds": sum(m.seconds for m in trained),
        "seconds_in_all": sum(m.seconds for m in everything),
        "flops": sum(map(flops, everything)),
        "peak_memory_mb": own.peak_memory_mb,
    }


def _tags(run) -> dict[str, str]:
    job, params = run.job, run.job.params
    git = git_state(run.plan.root) or {}
    tags = {
        "job": job.id,
        "stage": job.stage,
        "run": params.get("run") or job.name,
        "fingerprint": job.fingerprint,
        "seed": params.get("seed"),
        "labels": _labels(run),
        "git_commit": git.get("commit"),
        "git_dirty": git.get("dirty"),
        "mlflow.source.git.commit": git.get("commit"),
        "mlflow.source.name": f"stages/{job.stage}.py",
        "mlflow.source.type": "LOCAL",
        "mlflow.user": os.environ.get("USER"),
    }
    for kind in ("method", "task", "target"):
        value = params.get(kind)
        tags[kind] = value.get("name") if isinstance(value, dict) else value
    data = _data(run)
    tags |= {"data_hash": data.get("hash"), "data_source": data.get("source")}
    return _texts(tags)


def _group(run) -> dict:
    """The row of MLflow's table that a job belongs to."""
    job = _pretraining(run)
    if job is None:
        return SHARED
    jobs, params = run.plan.jobs, job.params
    method, model = params.get("method", {}), params.get("model", {})
    above = _made_from(run.plan, job)
    target = job.inputs.get("target", "").partition("/")[2]
    data = job.inputs.get("data", "").removeprefix("data/")
    source = _facts(jobs, job).get("source")
    shown = {
        "method": method.get("name"),
        "target": target or "none",
        "data": source if source and data == "main" else data,
        "model": model.get("config", {}).get("name") or model.get("kind"),
        "seed": params.get("seed"),
        "labels": _labels(run),
    }
    others = [other.params for other in jobs.values() if other.id.startswith("pretrain/")]
    links = {f"{id.partition('/')[0]}_fingerprint": print for id, print in reversed(above)}
    return {
        "group": job.fingerprint,
        "name": job.name,
        "stage": "run",
        "tags": _texts({"run": params.get("run"), **shown, **links}),
        "params": _texts(shown | differing(params, others)),
        "made_from": above,
    }


def _pretraining(run):
    """The pretraining that a job is, or whose encoder it tests; else None."""
    job = run.job
    return job if job.stage == "pretrain" else run.plan.jobs.get(job.inputs.get("encoder"))


def _made_from(plan, job) -> list[list[str]]:
    """[id, fingerprint] of every job that a job was made from, the nearest first.

    Of a report, which is made from all, none.
    """
    found, waiting = {}, [] if job.stage == "report" else list(job.inputs.values())
    while waiting:
        above = plan.jobs.get(waiting.pop(0))
        if above is not None and above.id not in found:
            found[above.id] = above.fingerprint
            waiting += above.inputs.values()
    return [[id, print] for id, print in found.items()]


def _labels(run) -> str:
    """Where labels had a part in an encoder: "none", "its own", or the teachers that saw them."""
    job = _pretraining(run)
    if job is None:
        return ""
    report = run.plan.jobs.get("report")
    facts = report.params["runs"].get(job.name, {}) if report else {}
    if facts.get("labels"):
        return "its own"
    return ", ".join(facts.get("label_targets", ())) or "none"


def _data(run) -> dict:
    """What is to be said of the data set that a job works on; {} of the job that makes it."""
    data = _facts(run.plan.jobs, run.job)
    splits = data.get("splits", {})
    about = {f"{split}_images": facts.get("count") for split, facts in splits.items()}
    about |= {"classes": len(data.get("classes", ())), "image_size": data.get("image_size")}
    return {"hash": data["hash"], "source": data.get("source"), "about": about} if data else {}


def _facts(jobs: dict, job) -> dict:
    data = jobs.get(job.inputs.get("data"))
    return read(Path(data.output) / "data.json") if data else {}


def _texts(values: dict) -> dict[str, str]:
    return {key: str(value) for key, value in values.items() if value not in (None, "")}


def read(path: Path) -> dict:
    """The object in a JSON file; an empty one where there is none."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        found = None
    return found if isinstance(found, dict) else {}

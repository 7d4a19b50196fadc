"""What came before a run: its cost with that of its teachers, and chains of stages with their
quality by stage.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from workflow.plan.manifests import seconds


def cost(row, manifests: Mapping[str, dict], data: dict) -> dict:
    """What a run cost, as means over its seeds.

    `images`, `epochs`, `seconds` count the run and those above it whose encoders taught it (their
    names: `before`); `own_images`, `own_seconds` the run alone. Its targets' cost is apart, as runs
    share them; `all_seconds` and `all_flops` are everything together. `flops` is per image of the
    run's own training.
    """
    jobs = [f"pretrain/{job}" for job in row.jobs]
    own = [manifests[id] for id in jobs]
    trained = [[id, *above(id, manifests, "pretrain/")] for id in jobs]
    targets = [above(id, manifests, "target/") for id in jobs]

    def total(groups: list[list[str]], what) -> float:
        return mean([sum(what(manifests[id]) for id in ids) for ids in groups]) or 0

    count = data["splits"]["train"]["count"]
    taught_seconds, target_seconds = total(trained, seconds), total(targets, seconds)
    return {
        "images": total(trained, _images),
        "own_images": mean([_images(m) for m in own]),
        "target_images": total(targets, _images),
        "epochs": total(trained, _views) / count if count else None,
        "seconds": taught_seconds,
        "own_seconds": mean([seconds(m) for m in own]),
        "target_seconds": target_seconds,
        "all_seconds": taught_seconds + target_seconds,
        "all_flops": total(trained, _flops) + total(targets, _flops) or None,
        "flops": mean([m["summary"].get("flops_per_image") for m in own]) or None,
        "before": [manifests[id]["params"].get("run", id) for id in reversed(trained[0][1:])],
        "memory": max(m["peak_memory_mb"] for m in own),
        "parameters": own[0]["summary"].get("parameters"),
        "device": own[0].get("device", ""),
        "rate": mean([m["summary"].get("images_per_s") for m in own]),
    }


def above(id: str, manifests: Mapping[str, dict], kind: str) -> list[str]:
    """The jobs of a kind ("pretrain/" or "target/") that a job was made from, nearest first, each
    once.
    """
    found, waiting = [], [id]
    while waiting:
        inputs = manifests[waiting.pop(0)]["inputs"]
        waiting += inputs
        found += [i for i in inputs if i.startswith(kind)]
    return list(dict.fromkeys(found))


def _images(manifest: dict) -> float:
    return manifest["summary"].get("images_seen", 0)


def _views(manifest: dict) -> float:
    return manifest["summary"].get("views_seen", _images(manifest))


def _flops(manifest: dict) -> float:
    return (manifest["summary"].get("flops_per_image") or 0) * _images(manifest)


@dataclass(frozen=True)
class Chain:
    """Stages of one method, each the teacher of the next: {stage: run}, the first teacher, if a
    run, as stage 0.
    """

    name: str
    first: str
    runs: dict[int, str]


def chains(rows: Mapping) -> list[Chain]:
    """The chains of two stages and more among the rows ({run: Row}), each up to a last stage that
    taught none.
    """
    found = []
    continued = {r.facts["teacher"] for r in rows.values() if r.facts["stage"] > 1}
    for name, row in rows.items():
        if row.facts["stage"] < 2 or name in continued:
            continue
        runs, at = {}, row
        while True:
            runs[at.facts["stage"]] = at.name
            teacher = at.facts["teacher"]
            if at.facts["stage"] == 1:
                break
            at = rows[teacher]
        first = teacher or at.facts["target"]
        runs |= {0: teacher} if teacher else {}
        found.append(
            Chain(name.removesuffix(f"-{row.facts['stage']}"), first, dict(sorted(runs.items())))
        )
    return found


def by_stage(found: list[Chain], cells: Mapping, task: str) -> dict | None:
    """Accuracy on a task by stage: {"stages": [0, 1, ...], "chains": [(chain, {stage: Cell})],
    "spread": {stage: standard deviation of the chains' means, where two or more of them have that
    stage}}; None if no chain has any.
    """
    lines = [
        (
            chain,
            {
                stage: cells[run, task]
                for stage, run in chain.runs.items()
                if cells[run, task].interval
            },
        )
        for chain in found
    ]
    lines = [(chain, points) for chain, points in lines if points]
    if not lines:
        return None
    stages = sorted({stage for _, points in lines for stage in points})
    means = {
        stage: [points[stage].interval.mean for _, points in lines if stage in points]
        for stage in stages
    }
    return {
        "stages": stages,
        "chains": lines,
        "spread": {s: float(np.std(v, ddof=1)) for s, v in means.items() if len(v) > 1},
    }


def mean(values) -> float | None:
    """Of those that are not None; None if none are left."""
    values = [v for v in values if v is not None]
    return sum(values) / len(values) if values else None

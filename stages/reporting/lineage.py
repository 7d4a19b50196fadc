"""What came before a run: its cost with that of its teachers, and chains of stages with their
quality by stage.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from stages.reporting.results import Cell, Jobs, Row


@dataclass(frozen=True)
class Cost:
    """What a run cost, as means over its seeds; None where nothing is known.

    `images`, `epochs`, `seconds` count the run and those above it whose encoders taught it (their
    names: `before`); `own_images`, `own_seconds` the run alone. Its targets' cost is apart, as runs
    share them; `all_seconds` and `all_flops` are everything together. `flops` is per image of the
    run's own training, `memory` in MB.
    """

    images: float
    own_images: float
    target_images: float
    epochs: float | None
    seconds: float
    own_seconds: float
    target_seconds: float
    all_seconds: float
    flops: float | None
    all_flops: float | None
    memory: float
    parameters: int | None
    rate: float | None  # images/s
    before: tuple[str, ...]


def cost(row: Row, jobs: Jobs) -> Cost:
    """What a run cost."""
    own = [f"pretrain/{job}" for job in row.jobs]
    taught = [[i for i in jobs.above(id) if i.startswith("pretrain/")] for id in own]
    trained = [[id, *teachers] for id, teachers in zip(own, taught, strict=True)]
    targets = [[i for i in jobs.above(id) if i.startswith("target/")] for id in own]

    def total(groups: list[list[str]], of: Callable[[str], float]) -> float:
        """The sum over a group, which is what one seed needed; its mean over seeds."""
        return mean([sum(of(id) for id in group) for group in groups]) or 0

    def summary(id: str, key: str) -> float:
        return jobs.manifests[id].summary.get(key) or 0

    def seconds(id: str) -> float:
        return jobs.manifests[id].seconds

    def images(id: str) -> float:
        return summary(id, "images_seen")

    def flops(id: str) -> float:
        return summary(id, "flops_per_image") * images(id)

    def epochs(id: str) -> float:
        views = jobs.manifests[id].summary.get("views_seen", images(id))
        return views / jobs.data[jobs.data_of(id)]["splits"]["train"]["count"]

    first = jobs.manifests[own[0]]
    taught_seconds, target_seconds = total(trained, seconds), total(targets, seconds)
    return Cost(
        images=total(trained, images),
        own_images=mean([images(id) for id in own]),
        target_images=total(targets, images),
        epochs=total(trained, epochs),
        seconds=taught_seconds,
        own_seconds=mean([seconds(id) for id in own]),
        target_seconds=target_seconds,
        all_seconds=taught_seconds + target_seconds,
        flops=mean([summary(id, "flops_per_image") for id in own]) or None,
        all_flops=total(trained, flops) + total(targets, flops) or None,
        memory=max(jobs.manifests[id].peak_memory_mb for id in own),
        parameters=first.summary.get("parameters"),
        rate=mean([jobs.manifests[id].summary.get("images_per_s") for id in own]),
        before=tuple(jobs.manifests[id].params.get("run", id) for id in reversed(taught[0])),
    )


@dataclass(frozen=True)
class Chain:
    """Stages of one method, each the teacher of the next: {stage: run}, the first teacher, if a
    run, as stage 0.
    """

    name: str
    first: str
    runs: dict[int, str]


def chains(rows: Mapping[str, Row]) -> list[Chain]:
    """The chains of two stages and more, each up to a last stage that taught none."""
    found = []
    continued = {row.facts["teacher"] for row in rows.values() if row.facts["stage"] > 1}
    for name, row in rows.items():
        last = row.facts["stage"]
        if last < 2 or name in continued:
            continue
        runs, at = {last: name}, row
        while at.facts["stage"] > 1:
            at = rows[at.facts["teacher"]]
            runs[at.facts["stage"]] = at.name
        teacher = at.facts["teacher"]
        if teacher:
            runs[0] = teacher
        first = teacher or at.facts["target"]
        found.append(Chain(name.removesuffix(f"-{last}"), first, dict(sorted(runs.items()))))
    return found


@dataclass(frozen=True)
class Stages:
    """Quality on a task by stage. chains: [(chain, {stage: Cell})]; spread: {stage: standard
    deviation of the chains' means}, where two or more of them have that stage.
    """

    stages: list[int]
    chains: list[tuple[Chain, dict[int, Cell]]]
    spread: dict[int, float]


def by_stage(found: list[Chain], cells: Mapping[tuple[str, str], Cell], task: str) -> Stages | None:
    """Quality on a task (its id) by stage; None if no chain has any."""
    lines = []
    for chain in found:
        points = {stage: cells[run, task] for stage, run in chain.runs.items()}
        points = {stage: cell for stage, cell in points.items() if cell.interval}
        if points:
            lines.append((chain, points))
    if not lines:
        return None
    stages = sorted({stage for _, points in lines for stage in points})
    means = {
        stage: [points[stage].interval.mean for _, points in lines if stage in points]
        for stage in stages
    }
    spread = {s: float(np.std(values, ddof=1)) for s, values in means.items() if len(values) > 1}
    return Stages(stages, lines, spread)


def mean(values) -> float | None:
    """Of those that are not None; None if none are left."""
    values = [v for v in values if v is not None]
    return sum(values) / len(values) if values else None

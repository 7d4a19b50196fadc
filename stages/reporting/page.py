"""All that the report's templates show, from the folders of the finished jobs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from stages.reporting import (
    charts,
    claims,
    colours,
    lineage,
    pictures,
    results,
    runs,
    stats,
    tokens,
)
from stages.reporting.results import Cell, Jobs, Row, Task
from stages.reporting.sentence import sentence

TARGETS = 2  # the colour of targets' charts


def gather(params: dict, folders: Mapping[str, Path]) -> dict:
    """What the templates show: `params` are those of the report's job, `folders` by job id."""
    jobs = Jobs(folders)
    rows, tasks = results.rows(params), results.tasks(params, jobs)
    cells = {(name, t.id): results.cell(row, t, jobs) for name, row in rows.items() for t in tasks}
    racing = [name for name, row in rows.items() if row.kind == "ssl"]
    verdicts = {t.id: stats.rank({n: cells[n, t.id].scores for n in racing}) for t in tasks}
    costs = {name: lineage.cost(row, jobs) for name, row in rows.items()}
    chains = lineage.chains(rows)
    stages = {t.id: lineage.by_stage(chains, cells, t.id) for t in tasks}
    targets = [id for id in jobs.folders if id.startswith("target/")]
    drawn = {
        **score_charts(rows, tasks, cells, costs),
        **stage_charts(rows, tasks, stages),
        **loss_charts(rows, jobs),
        **{name: svg for id in targets for name, svg in target_charts(id, jobs).items()},
    }
    count = max(len(rows), len(colours.LIGHT))
    encoders = {name: results.encoder(row, jobs) for name, row in rows.items()}
    return {
        "experiment": params["experiment"],
        "rows": rows,
        "tasks": tasks,
        "cells": cells,
        "verdicts": verdicts,
        "costs": costs,
        "encoders": encoders,
        "sentence": sentence(rows, tasks, cells, encoders),
        "headline": claims.headline(tasks, verdicts),
        "racing": racing,
        "contrasted": params["contrasts"],
        "contrasts": contrasts(params["contrasts"], tasks, cells),
        "targets": {id.removeprefix("target/"): target(id, jobs) for id in targets},
        "stages": {id: found for id, found in stages.items() if found},
        "data": jobs.data,
        "pretrained_on": {n: jobs.data_of(f"pretrain/{r.jobs[0]}") for n, r in rows.items()},
        "samples": {name: samples(name, jobs) for name in jobs.data},
        "charts": {name: svg for name, svg in drawn.items() if svg},
        "details": details(rows, tasks, cells),
        "pictures": {
            name: pictures.pictures(jobs.folders[f"pretrain/{row.jobs[0]}"])
            for name, row in rows.items()
        },
        "warnings": claims.warnings(rows, tasks, cells, costs, jobs),
        "notes": claims.notes(rows, tasks, costs, jobs),
        "trail": trail(tasks, rows, cells, jobs),
        "pages": runs.pages(rows, tasks, cells, jobs),
        "prints": {id: manifest.fingerprint for id, manifest in jobs.manifests.items()},
        "level": stats.LEVEL,
        "minimum": stats.MIN_SEEDS,
        "colours": count,
        "css": colours.style(count),
        "light": colours.palette(count, dark=False),
        "dark": colours.palette(count, dark=True),
    }


def contrasts(declared: dict, tasks: list[Task], cells: Mapping) -> dict:
    """{(contrast, task id): Contrast or None} of the declared ones."""

    def scores(names: list[str], task: Task) -> list[stats.Scores]:
        return [cells[name, task.id].scores for name in names]

    return {
        (name, task.id): stats.contrast(scores(sides["of"], task), scores(sides["against"], task))
        for name, sides in declared.items()
        for task in tasks
    }


def samples(name: str, jobs: Jobs) -> dict | None:
    """Training images of a data set."""
    id = next(id for id in jobs.folders if id.startswith("data") and jobs.data_of(id) == name)
    return pictures.samples(jobs.folders[id], jobs.data[name])


# --------------------------------------------------------------------------------------- charts


def score_charts(rows: Mapping[str, Row], tasks: list[Task], cells: Mapping, costs: Mapping):
    """{name: SVG} of each task: its scores, and its scores against the time of the pretraining."""
    found = {}
    for task in tasks:
        known = {name: cells[name, task.id] for name in rows if cells[name, task.id].interval}
        value = {name: cell.interval.mean * task.scale for name, cell in known.items()}
        flat = [mark(rows[n], task, cell, value[n]) for n, cell in known.items()]
        found[f"scores-{task.id}"] = charts.intervals(
            flat, f"{task.title}: {task.label} by run", task.axis
        )
        over_cost = [
            mark(rows[n], task, cell, costs[n].all_seconds, value[n]) for n, cell in known.items()
        ]
        found[f"cost-{task.id}"] = charts.scatter(
            over_cost,
            f"{task.title}: {task.label} against cost",
            "seconds, with all before",
            task.axis,
        )
    return found


def stage_charts(rows: Mapping[str, Row], tasks: list[Task], stages: Mapping) -> dict[str, str]:
    """{name: SVG} of each task that chains of stages were tested on: its scores by stage."""
    found = {}
    for task in tasks:
        if not stages[task.id]:
            continue
        lines = []
        for chain, points in stages[task.id].chains:
            last = rows[chain.runs[max(chain.runs)]]
            marks = [
                mark(rows[chain.runs[stage]], task, cell, stage, cell.interval.mean * task.scale)
                for stage, cell in points.items()
            ]
            lines.append((chain.name, last.colour, marks))
        found[f"stages-{task.id}"] = charts.stages(
            lines, f"{task.title}: {task.label} by stage", "stage", task.axis
        )
    return found


def loss_charts(rows: Mapping[str, Row], jobs: Jobs) -> dict[str, str]:
    """{name: SVG} of each run: its training loss, a line per seed."""
    found = {}
    for name, row in rows.items():
        lines = [results.losses(jobs.folders[f"pretrain/{job}"], job) for job in row.jobs]
        title = f"{name}: training loss"
        found[f"loss-{name}"] = charts.curves(lines, title, "epoch", "loss", row.colour)
    return found


def target_charts(id: str, jobs: Jobs) -> dict[str, str]:
    """{name: SVG} of a target: every long list of numbers in its health, and its training loss."""
    name, found = id.removeprefix("target/"), {}
    for key, value in long_lists(id, jobs).items():
        found[f"target-{name}-{key}"] = charts.bars(
            value, f"{name}: {key}", "code, by falling use", "patches", TARGETS
        )
    lines = [results.losses(jobs.folders[id], name)]
    title = f"{name}: training loss"
    found[f"target-{name}-loss"] = charts.curves(lines, title, "epoch", "loss", TARGETS)
    return found


def long_lists(id: str, jobs: Jobs) -> dict[str, list[float]]:
    """What is drawn of a target's health: how often each code is used."""
    health = results.read(jobs.folders[id] / "health.json")
    return {
        key: value
        for key, value in health.items()
        if isinstance(value, list) and len(value) > 8 and all(map(is_number, value))
    }


def mark(row: Row, task: Task, cell: Cell, x: float, y: float = 0.0) -> charts.Point:
    """A run in a chart, with its interval on the axis of scores: over seeds if it has one, else
    over test images.
    """
    span = cell.interval if cell.interval.low is not None else cell.images
    text = f"{row.name}: {task.show(cell.interval.mean)} {task.unit}".rstrip()
    low = high = None
    if span:
        low, high = max(0.0, span.low), min(1.0, span.high)
        text += f", {task.show(low)} to {task.show(high)}"
        low, high = low * task.scale, high * task.scale
    reference = row.kind == "reference"
    return charts.Point(row.name, x, y, low, high, row.colour, reference, text)


# --------------------------------------------------------------------------------------- tables


def details(rows: Mapping[str, Row], tasks: list[Task], cells: Mapping) -> dict:
    """Scores by probed feature ("cls", "patch", ...), mean over seeds, of the tasks that give more
    than one: metrics named <feature>_<headline's key>.

    {"columns": [(task, feature)], "values": {run: {(task id, feature): score}}, "chosen": {run:
    {(task id, feature)}}}
    """
    values: dict[str, dict] = {name: {} for name in rows}
    chosen: dict[str, set] = {name: set() for name in rows}
    columns = []
    for task in tasks:
        end = f"_{task.key}"
        seeds = {name: list(cells[name, task.id].metrics.values()) for name in rows}
        keys = [
            key
            for name in rows
            for metrics in seeds[name]
            for key, value in metrics.items()
            if key.endswith(end) and is_number(value)
        ]
        features = [key.removesuffix(end) for key in dict.fromkeys(keys)]
        if len(features) > 1:
            columns += [(task, feature) for feature in features]
        for name in rows:
            for feature in features:
                found = lineage.mean([metrics.get(feature + end) for metrics in seeds[name]])
                values[name][task.id, feature] = found
            chosen[name] |= {(task.id, m["feature"]) for m in seeds[name] if m.get("feature")}
    return {"columns": columns, "values": values, "chosen": chosen}


def target(id: str, jobs: Jobs) -> dict:
    """A tokenizer or teacher: its kind, health, cost and pictures."""
    folder, manifest = jobs.folders[id], jobs.manifests[id]
    health, about = (results.read(folder / f"{name}.json") for name in ("health", "target"))
    why = tokens.LABELLED if about.get("labels") else tokens.FEATURES
    probes = health.get("probes", {})
    return {
        "kind": about.get("kind", manifest.params["target"]["kind"]),
        "labels": bool(about.get("labels")),
        "numbers": {key: value for key, value in health.items() if is_number(value)},
        "tokens": tokens.said(health.get("tokens", {})) or tokens.probed(probes, "features", why),
        "probe": (health.get("tokens", {}) | probes).get("probe"),
        "problems": health.get("problems", []),
        "notes": health.get("notes", []),
        "seconds": manifest.seconds,
        "images": manifest.summary.get("images_seen"),
        "pictures": pictures.pictures(folder),
    }


def trail(tasks: list[Task], rows: Mapping[str, Row], cells: Mapping, jobs: Jobs) -> list[dict]:
    """One entry per job: what it takes to make its number again."""
    scores = {}
    for task in tasks:
        for name, row in rows.items():
            for seed, score in cells[name, task.id].scores.scores.items():
                job = row.jobs[row.seeds.index(seed)]
                shown = f"{task.show(score)} {task.unit}".rstrip()
                scores[f"transfer/{job}/{task.name}"] = shown
    return [
        {
            "id": id,
            "anchor": anchor(id),
            "score": scores.get(id),
            "fingerprint": m.fingerprint,
            "data": None if id == "report" else jobs.data[jobs.data_of(id)]["hash"],
            "git": m.git or {},
            "code": hashlib.sha256(json.dumps(m.code, sort_keys=True).encode()).hexdigest()[:12],
            "seconds": m.seconds,
            "device": m.device,
            "created": m.created,
            "files": m.code,
            "params": json.dumps(m.params, indent=1, sort_keys=True),
        }
        for id, m in jobs.manifests.items()
    ]


def anchor(id: str) -> str:
    """Where on the page a job is described."""
    return "job-" + id.replace("/", "-")


def is_number(value) -> bool:
    """Whether a value of JSON is a number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)

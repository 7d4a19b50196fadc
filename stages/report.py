"""Stage report: everything that the experiment found, on one page that needs nothing else.

    python -m stages.report [--params params.yaml] [--results results]

Writes results/report/: index.html (self-contained: no script, no network), summary.md, summary.csv,
figures/*.svg. Equal inputs give equal bytes. Trained without labels, runs compete; the untrained
encoder, those trained on labels and those whose teacher was are shown for reference and never
ranked. What may be called best is decided in reporting/stats.py.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import json
from pathlib import Path

import jinja2
import numpy as np

from stages.kit.job.job import running, write_atomic
from stages.reporting import figures, lineage, stats
from workflow.plan import load
from workflow.plan.manifests import seconds

PRIMARY = ("top1", "miou", "ap", "auc")  # a task's headline: the first of these in its metrics.json
TEMPLATES = Path(__file__).parent / "reporting" / "templates"


def main(argv: list[str] | None = None) -> int:
    """Writes the report of one plan; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m stages.report", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--params", default="params.yaml")
    parser.add_argument("--results", default="results")
    args = parser.parse_args(argv)
    plan = load(args.params, args.results)
    with running(plan.jobs["report"], plan) as run:
        write(run)
    return 0


def write(run) -> None:
    """The work of the stage, for a job.Run."""
    folders = {id: run.input(id) for id in run.job.inputs}
    page = gather(run.job.params, folders)
    (run.out / "figures").mkdir(exist_ok=True)
    for name, svg in page["charts"].items():
        write_atomic(run.out / "figures" / f"{name}.svg", figures.standalone(svg))
    env = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=jinja2.select_autoescape(("html.j2",)),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    env.filters |= {
        "pct": figures.percent,
        "short": figures.short,
        "seconds": figures.seconds,
        "p": figures.p_value,
        "points": figures.points,
    }
    write_atomic(run.out / "index.html", env.get_template("index.html.j2").render(page))
    write_atomic(run.out / "summary.md", env.get_template("summary.md.j2").render(page))
    write_atomic(run.out / "summary.csv", table(page))
    run.summary.update(
        {"runs": len(page["rows"]), "tasks": len(page["tasks"]), "warnings": len(page["warnings"])}
    )


# --------------------------------------------------------------------------------------------------
# gathering


def gather(params: dict, folders: dict[str, Path]) -> dict:
    """Everything that the templates show, from the folders of the finished jobs ({job id: folder})."""
    manifests = {id: read(folder / "manifest.json") for id, folder in folders.items()}
    data = read(folders["data"] / "data.json")
    rows: dict[str, stats.Row] = {}
    for job, facts in params["runs"].items():
        row = rows.setdefault(facts["run"], stats.Row(facts["run"], facts, len(rows) % 8))
        row.seeds.append(facts["seed"])
        row.jobs.append(job)
    tasks = params["tasks"]
    cells = {(name, task): cell(row, task, folders) for name, row in rows.items() for task in tasks}
    racing = [n for n, r in rows.items() if r.kind == "ssl"]
    verdicts = {task: stats.rank({n: cells[n, task].scores for n in racing}) for task in tasks}
    contrasts = {
        (name, task): stats.contrast(
            *([cells[run, task].scores for run in sides[key]] for key in ("of", "against"))
        )
        for name, sides in params["contrasts"].items()
        for task in tasks
    }
    costs = {name: lineage.cost(row, manifests, data) for name, row in rows.items()}
    chains, charts, stages = lineage.chains(rows), {}, {}
    for task in tasks:
        known = [n for n in rows if cells[n, task].interval]
        accuracy = {n: cells[n, task].interval.mean * 100 for n in known}
        marks = [mark(rows[n], cells[n, task], accuracy[n]) for n in known]
        charts[f"scores-{task}"] = figures.intervals(
            marks, f"{task}: accuracy by run", "accuracy, %"
        )
        marks = [mark(rows[n], cells[n, task], costs[n]["all_seconds"], accuracy[n]) for n in known]
        charts[f"cost-{task}"] = figures.scatter(
            marks, f"{task}: accuracy against cost", "seconds, with all before", "accuracy, %"
        )
        if found := lineage.by_stage(chains, cells, task):
            stages[task] = found
            lines = [
                (
                    chain.name,
                    rows[chain.runs[max(chain.runs)]].colour,
                    [
                        mark(rows[chain.runs[n]], c, n, c.interval.mean * 100)
                        for n, c in points.items()
                    ],
                )
                for chain, points in found["chains"]
            ]
            charts[f"stages-{task}"] = figures.stages(
                lines, f"{task}: accuracy by stage", "stage", "accuracy, %"
            )
    for name, row in rows.items():
        lines = [figures.losses(folders[f"pretrain/{job}"], job) for job in row.jobs]
        charts[f"loss-{name}"] = figures.curves(
            lines, f"{name}: training loss", "epoch", "loss", row.colour
        )
    targets = {
        id.partition("/")[2]: target(folders[id], manifests[id], charts)
        for id in folders
        if id.startswith("target/")
    }
    return {
        "experiment": params["experiment"],
        "rows": rows,
        "tasks": tasks,
        "cells": cells,
        "verdicts": verdicts,
        "costs": costs,
        "headline": stats.headline(tasks, verdicts),
        "racing": racing,
        "contrasts": contrasts,
        "contrasted": params["contrasts"],
        "targets": targets,
        "stages": stages,
        "data": data,
        "samples": figures.samples(folders["data"], data),
        "charts": {name: svg for name, svg in charts.items() if svg},
        "details": details(rows, tasks, cells),
        "pictures": {
            n: figures.pictures(folders[f"pretrain/{r.jobs[0]}"]) for n, r in rows.items()
        },
        "warnings": stats.warnings(rows, tasks, cells, costs, data, manifests),
        "notes": stats.notes(rows, costs, data, manifests),
        "trail": trail(manifests, rows, cells),
        "level": stats.LEVEL,
        "minimum": stats.MIN_SEEDS,
        "css": figures.style(),
        "light": figures.palette(False),
        "dark": figures.palette(True),
    }


def cell(row: stats.Row, task: str, folders: dict[str, Path]) -> stats.Cell:
    """The scores of a run on a task; empty where there are none."""
    scores, hits, metrics = {}, {}, {}
    for seed, job in zip(row.seeds, row.jobs, strict=True):
        folder = folders.get(f"transfer/{job}/{task}")
        found = read(folder / "metrics.json") if folder else {}
        key = next((k for k in PRIMARY if isinstance(found.get(k), (int, float))), None)
        if key is None:
            continue
        metrics[seed], scores[seed] = found | {"metric": key}, float(found[key])
        if key == "top1" and (folder / "predictions.npz").is_file():
            with np.load(folder / "predictions.npz") as arrays:
                right = (
                    arrays["correct"]
                    if "correct" in arrays
                    else arrays["prediction"] == arrays["label"]
                )
                hits[seed] = right[np.argsort(arrays["index"], kind="stable")].astype(np.float64)
    interval = stats.t_interval(list(scores.values())) if scores else None
    single = next(iter(hits.values())) if len(scores) == 1 and hits else None
    images = stats.wilson(round(float(single.sum())), len(single)) if single is not None else None
    return stats.Cell(
        stats.Scores(scores, hits), metrics, interval, images, row.jobs[0] if scores else None
    )


def mark(row: stats.Row, found: stats.Cell, x: float, y: float | None = None) -> figures.Point:
    """A run in a chart, with its interval over seeds (one seed: over test images) on the axis of
    accuracy.
    """
    span = found.interval if found.interval.low is not None else found.images
    low, high = (max(0.0, span.low * 100), min(100.0, span.high * 100)) if span else (None, None)
    text = f"{row.name}: {figures.percent(found.interval.mean)} %" + (
        f", {low:.1f} to {high:.1f}" if span else ""
    )
    return figures.Point(
        row.name,
        x,
        y if y is not None else 0.0,
        low,
        high,
        row.colour,
        row.kind == "reference",
        text,
    )


def details(rows: dict, tasks: list, cells: dict) -> dict:
    """Accuracy by probed feature ("cls", "patch", ...), mean over seeds, of the tasks that tell
    more than one.

    {"columns": [(task, feature)], "values": {run: {(task, feature): accuracy}}, "chosen": {run:
    {(task, feature)}}}
    """
    values: dict[str, dict] = {name: {} for name in rows}
    chosen: dict[str, set] = {name: set() for name in rows}
    for (name, task), each in cells.items():
        keys = [
            k
            for m in each.metrics.values()
            for k in m
            if k.endswith("_top1") and isinstance(m[k], (int, float))
        ]
        for key in dict.fromkeys(keys):
            values[name][task, key[:-5]] = lineage.mean([m.get(key) for m in each.metrics.values()])
        chosen[name] |= {(task, m["feature"]) for m in each.metrics.values() if m.get("feature")}
    found = list(dict.fromkeys(column for by_run in values.values() for column in by_run))
    several = {task for task in tasks if sum(column[0] == task for column in found) > 1}
    columns = sorted((c for c in found if c[0] in several), key=lambda c: tasks.index(c[0]))
    return {"columns": columns, "values": values, "chosen": chosen}


def target(folder: Path, manifest: dict, charts: dict) -> dict:
    """A tokenizer or teacher: its health, a chart for every long list of numbers in it, its
    pictures.
    """
    name, health, described = (
        manifest["name"],
        read(folder / "health.json"),
        read(folder / "target.json"),
    )
    for key, value in health.items():
        if (
            isinstance(value, list)
            and len(value) > 8
            and all(isinstance(v, (int, float)) for v in value)
        ):
            charts[f"target-{name}-{key}"] = figures.bars(
                value, f"{name}: {key}", "code, by falling use", "patches", 2
            )
    charts[f"target-{name}-loss"] = figures.curves(
        [figures.losses(folder, name)], f"{name}: training loss", "epoch", "loss", 2
    )
    return {
        "kind": described.get("kind", manifest["params"]["target"]["kind"]),
        "labels": bool(described.get("labels")),
        "numbers": {k: v for k, v in health.items() if isinstance(v, (int, float))},
        "problems": health.get("problems", []),
        "seconds": seconds(manifest),
        "images": manifest["summary"].get("images_seen"),
        "pictures": figures.pictures(folder),
    }


def trail(manifests: dict, rows: dict, cells: dict) -> list[dict]:
    """One entry per job: what it takes to make its number again."""
    scores = {
        f"transfer/{job}/{task}": c.scores.scores.get(seed)
        for (name, task), c in cells.items()
        for seed, job in zip(rows[name].seeds, rows[name].jobs)
    }
    return [
        {
            "id": id,
            "anchor": "job-" + id.replace("/", "-"),
            "score": scores.get(id),
            "fingerprint": m["fingerprint"],
            "git": m.get("git") or {},
            "code": hashlib.sha256(json.dumps(m["code"], sort_keys=True).encode()).hexdigest()[:12],
            "seconds": seconds(m),
            "device": m.get("device", ""),
            "created": m.get("created", ""),
            "files": m["code"],
            "params": json.dumps(m["params"], indent=1, sort_keys=True),
        }
        for id, m in manifests.items()
    ]


# -----------------------------------------------------------------------------------------------
# small things


def table(page: dict) -> str:
    """summary.csv: one line per run and task, fractions unrounded."""
    stream = io.StringIO()
    out = csv.writer(stream, lineterminator="\n")
    out.writerow(
        [
            "run",
            "method",
            "target",
            "teacher",
            "stage",
            "kind",
            "task",
            "metric",
            "mean",
            "low",
            "high",
            "seeds",
            "scores",
            "verdict",
            "images_seen",
            "own_images_seen",
            "effective_epochs",
            "seconds",
            "own_seconds",
            "target_seconds",
            "peak_memory_mb",
            "flops_per_image",
            "flops",
            "fingerprints",
        ]
    )
    prints = {entry["id"]: entry["fingerprint"][:12] for entry in page["trail"]}
    for (name, task), c in page["cells"].items():
        row, k, verdict = page["rows"][name], page["costs"][name], page["verdicts"][task]
        if c.interval:
            state = "reference" if row.kind != "ssl" else "tie" if name in verdict.ties else ""
            state = verdict.state if verdict and verdict.leader == name else state
            out.writerow(
                [
                    name,
                    *(row.facts[key] for key in ("method", "target", "teacher", "stage")),
                    row.kind,
                    task,
                    next(iter(c.metrics.values()))["metric"],
                    c.interval.mean,
                    c.interval.low,
                    c.interval.high,
                    c.interval.n,
                    " ".join(f"{v!r}" for v in c.scores.scores.values()),
                    state,
                    *(
                        k[key]
                        for key in (
                            "images",
                            "own_images",
                            "epochs",
                            "seconds",
                            "own_seconds",
                            "target_seconds",
                            "memory",
                            "flops",
                            "all_flops",
                        )
                    ),
                    " ".join(
                        prints[f"transfer/{j}/{task}"]
                        for s, j in zip(row.seeds, row.jobs)
                        if s in c.metrics
                    ),
                ]
            )
    return stream.getvalue()


def read(path: Path) -> dict:
    return json.loads(path.read_text()) if path.is_file() else {}


if __name__ == "__main__":
    raise SystemExit(main())

"""What DVC and Snakemake's own report show beside the page: metrics.json, plots/*.csv, pictures/.

Names are short, as each is a column of `dvc exp show`. What costs something starts with a capital,
which no task does.
"""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from stages.reporting import page, results
from stages.reporting.results import Jobs, Row
from workflow.files import write_atomic

POINTS = 200  # of one curve, at most


def write(out: Path, found: dict, jobs: Jobs) -> None:
    """Write and copy all of it into the folder of the report; found: what the page shows."""
    for name, text in files(found, jobs).items():
        (out / name).parent.mkdir(exist_ok=True)
        write_atomic(out / name, text)
    for name, path in pictures(found["rows"].values(), jobs).items():
        (out / name).parent.mkdir(exist_ok=True, parents=True)
        shutil.copyfile(path, out / name)


def files(found: dict, jobs: Jobs) -> dict[str, str]:
    """{path: text}. A table without a line is left out."""
    tables = {
        "losses": [("run", "seed", "epoch", "loss"), *losses(found["rows"].values(), jobs)],
        "scores": [("task", "run", "mean", "low", "high"), *scores(found)],
        "codes": [("target", "health", "code", "value"), *codes(jobs)],
    }
    plots = {f"plots/{name}.csv": table(lines) for name, lines in tables.items() if lines[1:]}
    return {"metrics.json": json.dumps(metrics(found), indent=1) + "\n"} | plots


def metrics(found: dict) -> dict[str, dict[str, float]]:
    """{run: {task: its headline, "TFLOP": ..., "Seconds": ...}}; costs with what came before."""
    told = {}
    for name in found["rows"]:
        cells = {task.id: found["cells"][name, task.id].interval for task in found["tasks"]}
        told[name] = {id: round(span.mean, 4) for id, span in cells.items() if span}
        cost = found["costs"][name]
        if cost.all_flops:
            told[name]["TFLOP"] = float(f"{cost.all_flops / 1e12:.3g}")
        told[name]["Seconds"] = round(cost.all_seconds, 1)
    return told


def losses(rows: Iterable[Row], jobs: Jobs) -> Iterable[tuple]:
    """The training loss of every run and seed, and of every target, which has no seed."""
    curves = [
        (row.name, seed, f"pretrain/{job}")
        for row in rows
        for seed, job in zip(row.seeds, row.jobs, strict=True)
    ]
    curves += [(id, "", id) for id in jobs.folders if id.startswith("target/")]
    for name, seed, id in curves:
        _, epochs, values = results.losses(jobs.folders[id], name)
        for epoch, value in thinned(list(zip(epochs, values, strict=True))):
            yield name, seed, f"{epoch:.5g}", f"{value:.5g}"


def scores(found: dict) -> Iterable[tuple]:
    """The headline of every run on every task; over test images where there is one seed."""
    for task in found["tasks"]:
        for name in found["rows"]:
            cell = found["cells"][name, task.id]
            if cell.interval:
                span = cell.interval if cell.interval.low is not None else cell.images
                ends = [max(0.0, span.low), min(1.0, span.high)] if span else []
                low, high = [f"{end:.5g}" for end in ends] or ("", "")
                yield task.id, name, f"{cell.interval.mean:.5g}", low, high


def codes(jobs: Jobs) -> Iterable[tuple]:
    """How often each code of a codebook is used, and what else is a long list in health.json."""
    for id in jobs.folders:
        if id.startswith("target/"):
            for key, values in page.long_lists(id, jobs).items():
                for code, value in thinned(list(enumerate(sorted(values, reverse=True)))):
                    yield id.removeprefix("target/"), key, code, value


def pictures(rows: Collection[Row], jobs: Jobs) -> dict[str, Path]:
    """{path: the file to copy}: what the first seed of every run and what every target left."""
    ids = [f"pretrain/{row.jobs[0]}" for row in rows]
    names = {id: f"pretrain/{row.name}" for id, row in zip(ids, rows, strict=True)}
    names |= {id: id for id in jobs.folders if id.startswith("target/")}
    return {
        f"pictures/{name}/{path.name}": path
        for id, name in names.items()
        for path in sorted((jobs.folders[id] / "pictures").glob("*.png"))
    }


def thinned(points: Sequence) -> Sequence:
    """At most POINTS of them, the last among them."""
    step = -(-len(points) // POINTS)
    return points[::-1][::step][::-1] if step > 1 else points


def table(lines: Iterable[tuple]) -> str:
    """As CSV."""
    stream = io.StringIO()
    csv.writer(stream, lineterminator="\n").writerows(lines)
    return stream.getvalue()

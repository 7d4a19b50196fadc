"""Stage report: everything that the experiment found, on one page that needs nothing else.

    python -m stages.report [--params params.yaml] [--results results]
    python -m stages.report --against OTHER/results     what changed between two reports, and why

Writes results/report/: index.html (self-contained: no network, and no script but one that sorts
tables), summary.md, summary.csv, figures/*.svg. Equal inputs give equal bytes, but for links to an
MLflow server where there is one. Runs that trained without labels compete; the untrained encoder,
those trained on labels and those whose teacher was are shown for reference and never ranked. What
may be called best is decided in reporting/stats.py; what stands on the page in reporting/page.py;
what DVC and Snakemake's own report show beside it in reporting/ledger.py.
"""

from __future__ import annotations

import csv
import io
import sys
from pathlib import Path

import jinja2

from stages.kit.job import links, track
from stages.kit.job.command import command
from stages.reporting import against, colours, formats, ledger, page
from stages.reporting.results import Cell, Jobs, Row, Task
from workflow.files import write_atomic

COLUMNS = (  # of summary.csv
    *("run", "method", "target", "teacher", "stage", "kind", "encoder", "pretrained_on"),
    *("task", "data", "metric", "mean", "low", "high", "seeds", "scores", "verdict"),
    *("images_seen", "own_images_seen", "effective_epochs"),
    *("seconds", "own_seconds", "target_seconds", "all_seconds"),
    *("peak_memory_mb", "flops_per_image", "flops", "fingerprints"),
)
TEMPLATES = Path(__file__).parent / "reporting" / "templates"


def main(argv: list[str] | None = None) -> int:
    """Writes the report of one plan, or compares two; returns the exit status."""
    words = sys.argv[1:] if argv is None else argv
    if any(word.partition("=")[0] == "--against" for word in words):
        return against.main(words)
    return command("report", __doc__, write, argv)


def write(run) -> None:
    """The work of the stage, for a job.Run."""
    folders = {id: run.input(id) for id in run.job.inputs}
    found = page.gather(run.job.params, folders) | {"mlflow": track.page(run)}
    (run.out / "figures").mkdir(exist_ok=True)
    for name, svg in found["charts"].items():
        figure = colours.standalone(svg, found["colours"])
        write_atomic(run.out / "figures" / f"{name}.svg", figure)
    for name in ("index.html", "summary.md"):
        write_atomic(run.out / name, templates().get_template(f"{name}.j2").render(found))
    write_atomic(run.out / "summary.csv", table(found))
    ledger.write(run.out, found, Jobs(folders))
    counted = ("rows", "tasks", "warnings")
    run.summary.update(zip(("runs", "tasks", "warnings"), (len(found[k]) for k in counted)))
    run.summary["headline"] = found["sentence"].text


def templates() -> jinja2.Environment:
    """The folder of templates, with the filters that they use."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=jinja2.select_autoescape(("html.j2",)),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {
        "short": formats.short,
        "seconds": formats.seconds,
        "p": formats.p_value,
        "anchor": page.anchor,
        "job_in_mlflow": links.job,
        "search_in_mlflow": links.search,
    }
    return environment


def table(found: dict) -> str:
    """summary.csv: one line per run and task, fractions unrounded."""
    stream, prints = io.StringIO(), {each["id"]: each["fingerprint"] for each in found["trail"]}
    out = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
    out.writeheader()
    for row in found["rows"].values():
        for task in found["tasks"]:
            cell = found["cells"][row.name, task.id]
            if cell.interval:
                out.writerow(entry(row, task, cell, found, prints))
    return stream.getvalue()


def entry(row: Row, task: Task, cell: Cell, found: dict, prints: dict[str, str]) -> dict:
    """One line of summary.csv."""
    cost, verdict = found["costs"][row.name], found["verdicts"][task.id]
    ids = [
        f"transfer/{job}/{task.name}"
        for seed, job in zip(row.seeds, row.jobs, strict=True)
        if seed in cell.metrics
    ]
    return {
        "run": row.name,
        "method": row.facts["method"],
        "target": row.facts["target"],
        "teacher": row.facts["teacher"],
        "stage": row.facts["stage"],
        "kind": row.kind,
        "encoder": ": ".join(found["encoders"][row.name]),
        "pretrained_on": found["pretrained_on"][row.name],
        "task": task.name,
        "data": task.data,
        "metric": task.key,
        "mean": cell.interval.mean,
        "low": cell.interval.low,
        "high": cell.interval.high,
        "seeds": cell.interval.n,
        "scores": " ".join(f"{value!r}" for value in cell.scores.scores.values()),
        "verdict": state(row, verdict),
        "images_seen": cost.images,
        "own_images_seen": cost.own_images,
        "effective_epochs": cost.epochs,
        "seconds": cost.seconds,
        "own_seconds": cost.own_seconds,
        "target_seconds": cost.target_seconds,
        "all_seconds": cost.all_seconds,
        "peak_memory_mb": cost.memory,
        "flops_per_image": cost.flops,
        "flops": cost.all_flops,
        "fingerprints": " ".join(prints[id][:12] for id in ids),
    }


def state(row: Row, verdict) -> str:
    """What may be said of a run on a task, in a word."""
    if row.kind != "ssl":
        return "reference"
    if verdict.leader == row.name:
        return verdict.state
    return "tie" if row.name in verdict.ties else ""


if __name__ == "__main__":
    raise SystemExit(main())

"""A page for each run: what it got seed by seed, what sets it apart, what it was made from."""

from __future__ import annotations

from collections.abc import Mapping

from stages.kit.settings import differing
from stages.reporting.results import Jobs, Row, Task


def pages(rows: Mapping[str, Row], tasks: list[Task], cells: Mapping, jobs: Jobs) -> dict:
    """{run: {"seeds", "settings", "made_from"}}.

    seeds: [{"seed", "id", "images", "seconds", "scores": {task id: (job id, value)}}]; settings:
    {name: value} of those in which the first seeds of the runs differ; made_from: the jobs above
    the first seed, the nearest first.
    """
    first = {name: f"pretrain/{row.jobs[0]}" for name, row in rows.items()}
    others = [jobs.manifests[id].params for id in first.values()]
    return {
        name: {
            "seeds": [
                _seed(seed, job, tasks, [cells[name, task.id] for task in tasks], jobs)
                for seed, job in zip(row.seeds, row.jobs, strict=True)
            ],
            "settings": differing(jobs.manifests[first[name]].params, others),
            "made_from": jobs.above(first[name]),
        }
        for name, row in rows.items()
    }


def _seed(seed: int, job: str, tasks: list[Task], cells: list, jobs: Jobs) -> dict:
    id = f"pretrain/{job}"
    manifest = jobs.manifests[id]
    return {
        "seed": seed,
        "id": id,
        "images": manifest.summary.get("images_seen") or 0,
        "seconds": manifest.seconds,
        "scores": {
            task.id: (f"transfer/{job}/{task.name}", cell.scores.scores[seed])
            for task, cell in zip(tasks, cells, strict=True)
            if seed in cell.scores.scores
        },
    }

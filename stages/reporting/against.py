"""What changed between two reports, in numbers and why, as text that Markdown shows well.

    python -m stages.report --against OTHER/results [--results results]

Of every run: the change of its scores with the interval over common seeds, the change of its cost,
and what differs in the jobs behind it: parameters, files of code, data. Both results folders are
only read, and nothing is written.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from stages.kit.settings import flat
from stages.reporting import lineage, results, stats
from stages.reporting.formats import seconds, short, signed
from stages.reporting.results import Jobs, Row, Task
from workflow.manifest import Manifest

SHOWN = 12  # causes of one run


class Side:
    """A finished report and the jobs behind it. OSError if there is none in `folder`."""

    def __init__(self, folder: Path):
        report = Manifest.read(folder / "report" / "manifest.json")
        if report is None:
            raise FileNotFoundError(f"{folder} has no report: found no report/manifest.json")
        found = {id: folder / id for id in report.inputs}
        gone = [id for id in found if Manifest.read(found[id] / "manifest.json") is None]
        if gone:
            raise FileNotFoundError(f"{folder} lacks {gone[0]}, which its report is made from")
        self.folder, self.jobs = folder, Jobs(found)
        self.rows = results.rows(report.params)
        self.tasks = {task.id: task for task in results.tasks(report.params, self.jobs)}
        self.newer = [
            id
            for id, given in report.inputs.items()
            if given["fingerprint"] != self.jobs.manifests[id].fingerprint
        ]

    def above(self, row: Row, seed: int) -> list[str]:
        """All jobs behind a run's numbers of one seed: its tasks, itself, what it is made from."""
        name = row.jobs[row.seeds.index(seed)]
        tasks = [id for id in self.jobs.folders if id.startswith(f"transfer/{name}/")]
        own = f"pretrain/{name}"
        return list(dict.fromkeys([own, *tasks, *(i for t in tasks for i in self.jobs.above(t))]))


def main(argv: list[str]) -> int:
    """Prints the comparison; returns the exit status."""
    parser = argparse.ArgumentParser("python -m stages.report", description=__doc__.splitlines()[0])
    parser.add_argument("--against", type=Path, required=True, help="another results folder")
    parser.add_argument("--results", type=Path, default="results", help="(default: results)")
    parser.add_argument("--params", help="not needed: both reports say what they are made from")
    args = parser.parse_args(argv)
    try:
        print(compare(Side(args.results), Side(args.against)))
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def compare(new: Side, old: Side) -> str:
    """The comparison as text."""
    lines = [f"# {new.folder} against {old.folder}", ""]
    for side in (new, old):
        if side.newer:
            what = ", ".join(side.newer)
            lines += [f"The report of {side.folder} is older than its {what}.", ""]
    both = [name for name in new.rows if name in old.rows]
    told = {name: run(name, new, old) for name in both}
    for name in both:
        if told[name]:
            lines += [f"## {name}", "", *told[name], ""]
    same = [name for name in both if not told[name]]
    for title, names in (
        ("The same in both", same),
        (f"Only in {new.folder}", [name for name in new.rows if name not in old.rows]),
        (f"Only in {old.folder}", [name for name in old.rows if name not in new.rows]),
    ):
        if names:
            lines += [f"{title}: {', '.join(names)}.", ""]
    return "\n".join(lines).rstrip()


def run(name: str, new: Side, old: Side) -> list[str]:
    """What is to be said of a run that both reports have; nothing if nothing has changed."""
    rows = new.rows[name], old.rows[name]
    numbers = [
        line
        for id, task in new.tasks.items()
        if id in old.tasks and (line := score(task, old.tasks[id], rows, new, old))
    ]
    numbers += [f"- not tested on {id} before" for id in new.tasks if id not in old.tasks]
    numbers += [f"- no longer tested on {id}" for id in old.tasks if id not in new.tasks]
    numbers += spent(rows, new, old)
    why = reasons(rows, new, old)
    more = len(why) - SHOWN
    if numbers and not why:
        why = ["nothing that a fingerprint holds: a GPU, or another machine, sums in another order"]
    why = [f"  - {text}" for text in why[:SHOWN]] + [f"  - and {more} more"] * (more > 0)
    return [*numbers, *(["- because of"] if why else []), *why]


def score(task: Task, before: Task, rows: tuple[Row, Row], new: Side, old: Side) -> str | None:
    """The change on a task; None if there is none."""
    now, then = results.cell(rows[0], task, new.jobs), results.cell(rows[1], before, old.jobs)
    if not (now.interval or then.interval) or now.scores.scores == then.scores.scores:
        return None
    values = [task.show(cell.interval.mean if cell.interval else None) for cell in (then, now)]
    text = f"- {task.title}, {task.axis}: {values[0]} → {values[1]}"
    change = stats.contrast([now.scores], [then.scores]) if task.key == before.key else None
    if change is None:
        return text
    text += f" ({task.change(change.seeds.mean)}"
    if change.seeds.low is not None:
        text += f", seeds {task.change(change.seeds.low)} to {task.change(change.seeds.high)}"
    hashes = [
        side.jobs.data[task.data]["hash"] for side in (new, old) if task.data in side.jobs.data
    ]
    if change.images and len(set(hashes)) == 1:
        text += f", images {task.change(change.images.low)} to {task.change(change.images.high)}"
    return text + ")"


def spent(rows: tuple[Row, Row], new: Side, old: Side) -> list[str]:
    """Seeds, images seen and, where anything was trained anew, time."""
    now, then = lineage.cost(rows[0], new.jobs), lineage.cost(rows[1], old.jobs)
    found = []
    if sorted(rows[0].seeds) != sorted(rows[1].seeds):
        seeds = [", ".join(map(str, row.seeds)) for row in reversed(rows)]
        found.append(f"- seeds: {seeds[0]} → {seeds[1]}")
    if now.images != then.images:
        found.append(f"- images seen: {short(then.images)} → {short(now.images)}")
    if now.all_seconds != then.all_seconds:
        times = f"{seconds(then.all_seconds)} → {seconds(now.all_seconds)}"
        share = signed(f"{100 * (now.all_seconds / then.all_seconds - 1):+.0f}")
        found.append(f"- time, with all before: {times} ({share} %)")
    return found


def reasons(rows: tuple[Row, Row], new: Side, old: Side) -> list[str]:
    """What differs in the jobs behind a run, on the first seed of both; each thing once."""
    common = [seed for seed in rows[0].seeds if seed in rows[1].seeds]
    if not common:
        return []
    ids = [side.above(row, common[0]) for side, row in zip((new, old), rows, strict=True)]
    found: dict[str, None] = {}
    for id in ids[0]:
        if id not in ids[1]:
            found[f"{id}, which was not there before"] = None
        elif new.jobs.manifests[id].fingerprint != old.jobs.manifests[id].fingerprint:
            found |= dict.fromkeys(causes(id, new.jobs, old.jobs))
    return [*found, *(f"{id}, which is gone" for id in ids[1] if id not in ids[0])]


def causes(id: str, new: Jobs, old: Jobs) -> list[str]:
    """What differs between two jobs of one name, but for what they are made from."""
    now, then = new.manifests[id], old.manifests[id]
    params = [flat(manifest.params) for manifest in (now, then)]
    keys = [key for key in dict.fromkeys([*params[1], *params[0]]) if not key.startswith("source_")]
    found = [
        f"{key}: {shown(params[1], key)} → {shown(params[0], key)} ({id})"
        for key in keys
        if shown(params[0], key) != shown(params[1], key)
    ]
    files = sorted({*now.code, *then.code})
    edited = [path for path in files if now.code.get(path) != then.code.get(path)]
    commits = [(manifest.git or {}).get("commit", "no commit")[:12] for manifest in (then, now)]
    if edited:
        found.append(f"code: {', '.join(edited)} (commits {commits[0]} → {commits[1]})")
    if id.startswith("data/"):
        name = id.removeprefix("data/")
        hashes = [jobs.data[name]["hash"][:12] for jobs in (old, new)]
        counts = [jobs.data[name]["splits"]["train"]["count"] for jobs in (old, new)]
        if hashes[0] != hashes[1]:
            images = f"{counts[0]} → {counts[1]} training images"
            found.append(f"data: the images of {name} ({hashes[0]} → {hashes[1]}, {images})")
    return found


def shown(params: dict, key: str) -> str:
    """A value as text."""
    return str(params.get(key, "nothing"))

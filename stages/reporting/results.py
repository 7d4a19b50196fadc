"""The finished jobs as the report's tables take them: jobs, runs, tasks, scores."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from stages.reporting import stats
from stages.reporting.formats import NOTHING, signed
from workflow.manifest import Manifest


class Jobs:
    """The finished jobs of an experiment: `folders` and `manifests` by job id."""

    def __init__(self, folders: Mapping[str, Path]):
        self.folders = dict(folders)
        self.manifests = {
            id: Manifest.read(folder / "manifest.json") for id, folder in self.folders.items()
        }

    @cached_property
    def data(self) -> dict[str, dict]:
        """{name of a data set: what its data.json says}."""
        found = [id for id in self.folders if id.split("/")[0] == "data"]
        return {id.removeprefix("data/"): read(self.folders[id] / "data.json") for id in found}

    def inputs(self, id: str) -> dict[str, str]:
        """{role: job} of what a job was made from."""
        return {role: each["job"] for role, each in self.manifests[id].inputs.items()}

    def data_of(self, id: str) -> str:
        """The name of the data set that a job works on."""
        return self.inputs(id).get("data", id).removeprefix("data/")

    def above(self, id: str) -> list[str]:
        """Every job that a job was made from, directly or not; the nearest first, each once."""
        found, waiting = [], [id]
        while waiting:
            new = [i for i in self.inputs(waiting.pop(0)).values() if i not in found]
            found += new
            waiting += new
        return found


@dataclass(frozen=True)
class Task:
    """A task on one data set: a column of the tables.

    id: as part of file names; title: for readers; name: in params.yaml; data: its data set's name;
    key, label, unit: its headline. Values are fractions, shown in per cent where that is the unit.
    """

    id: str
    title: str
    name: str
    data: str
    key: str
    label: str
    unit: str

    @property
    def axis(self) -> str:
        """What an axis of it says."""
        return f"{self.label}, {self.unit}" if self.unit else self.label

    @property
    def scale(self) -> int:
        """What a fraction is multiplied by to be shown."""
        return 100 if self.unit == "%" else 1

    def show(self, value: float | None) -> str:
        """A value without its unit."""
        return NOTHING if value is None else f"{value * self.scale:.{self._digits}f}"

    def change(self, value: float) -> str:
        """A difference, with its sign."""
        return signed(f"{value * self.scale:+.{self._digits}f}")

    @property
    def _digits(self) -> int:
        return 1 if self.unit == "%" else 3


@dataclass
class Row:
    """One run over all its seeds, a row of every table."""

    name: str
    facts: dict
    colour: int
    seeds: list[int] = field(default_factory=list)
    jobs: list[str] = field(default_factory=list)

    @property
    def kind(self) -> str:
        """ "ssl" competes; "reference" is untrained or trained on labels; "taught" had a teacher
        that was.
        """
        if self.facts["labels"] or not self.facts["trains"]:
            return "reference"
        return "taught" if self.facts["label_targets"] else "ssl"

    @property
    def note(self) -> str:
        """What a reader of the table must know, in a few words."""
        f = self.facts
        notes = [
            "trained on labels" if f["labels"] else "untrained" if not f["trains"] else "",
            f"target {f['target']}" if f["target"] else "",
            f"teacher {f['teacher']}" if f["teacher"] else "",
            f"labels in {', '.join(f['label_targets'])}" if f["label_targets"] else "",
        ]
        return ", ".join(note for note in notes if note)


@dataclass
class Cell:
    """One run on one task. `images`: for a single seed, the interval over test images."""

    scores: stats.Scores
    metrics: dict[int, dict]
    interval: stats.Interval | None
    images: stats.Interval | None
    job: str | None  # the first seed's


def rows(params: dict) -> dict[str, Row]:
    """{run: Row} of the report's parameters, in their order."""
    found: dict[str, Row] = {}
    for job, facts in params["runs"].items():
        row = found.setdefault(facts["run"], Row(facts["run"], facts, len(found)))
        row.seeds.append(facts["seed"])
        row.jobs.append(job)
    return found


def tasks(params: dict, jobs: Jobs) -> list[Task]:
    """The columns: each task, and once for each data set that it tests on.

    A task without a data set of its own tests on the one of each run, and scores on different
    images cannot be compared.
    """
    columns = []
    for name, about in params["tasks"].items():
        ids = [id for id in jobs.folders if id.startswith("transfer/") and task_of(id) == name]
        sets = list(dict.fromkeys(jobs.data_of(id) for id in ids))
        for data in sets:
            several = len(sets) > 1
            columns.append(
                Task(
                    id=f"{name}-{data}" if several else name,
                    title=f"{name} on {data}" if several else name,
                    name=name,
                    data=data,
                    **{key: about[key] for key in ("key", "label", "unit")},
                )
            )
    return columns


def task_of(id: str) -> str:
    """transfer/<run>-s<seed>/<task> -> <task>."""
    return id.split("/", 2)[2]


def cell(row: Row, task: Task, jobs: Jobs) -> Cell:
    """The scores of a run on a task; empty where there are none."""
    values, images, metrics, ids = {}, {}, {}, []
    for seed, job in zip(row.seeds, row.jobs, strict=True):
        id = f"transfer/{job}/{task.name}"
        if id not in jobs.folders or jobs.data_of(id) != task.data:
            continue
        ids.append(id)
        metrics[seed] = read(jobs.folders[id] / "metrics.json")
        values[seed] = float(metrics[seed][task.key])
        with np.load(jobs.folders[id] / "scores.npz") as arrays:
            order = np.argsort(arrays["index"], kind="stable")
            images[seed] = arrays["score"][order].astype(np.float64)
    return Cell(
        scores=stats.Scores(values, images),
        metrics=metrics,
        interval=stats.t_interval(list(values.values())) if values else None,
        images=_over_images(values, images),
        job=ids[0] if ids else None,
    )


def _over_images(values: dict, images: dict) -> stats.Interval | None:
    """The interval over test images of a single seed, if its value is the mean of its scores.

    An mIoU, say, is counted over the whole set: an interval around the mean of the images' IoU
    would be one around another number.
    """
    if len(values) != 1:
        return None
    (value,), (scores,) = values.values(), images.values()
    if not len(scores) or abs(scores.mean() - value) > 1e-6:
        return None
    return stats.image_interval(scores)


def encoder(row: Row, jobs: Jobs) -> tuple[str, str]:
    """(family, sizes) of a run's encoder, such as ("vit", "192 × 12, patch 4"): width, depth."""
    model = jobs.manifests[f"pretrain/{row.jobs[0]}"].params["model"]
    depth = model["config"]["depth"]
    depth = "+".join(map(str, depth)) if isinstance(depth, list) else depth
    width, patch = model["config"]["embed_dim"], model["config"]["patch_size"]
    return model["kind"], f"{width} × {depth}, patch {patch}"


def losses(folder: Path, name: str) -> tuple[str, list[float], list[float]]:
    """(name, epochs, losses) of a job's history.jsonl, a line of a chart; empty without one."""
    path = folder / "history.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    points = [
        (entry.get("epoch", entry["step"]), entry["loss"])
        for entry in map(json.loads, filter(None, lines))
        if isinstance(entry.get("loss"), (int, float)) and math.isfinite(entry["loss"])
    ]
    return name, [epoch for epoch, _ in points], [loss for _, loss in points]


def read(path: Path) -> dict:
    """A file of JSON; {} if it is not there."""
    return json.loads(path.read_text()) if path.is_file() else {}

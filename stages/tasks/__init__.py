"""Downstream tasks, one file each: what a pretrained encoder is worth.

A task module has
- a docstring: the protocol, its source, every departure;
- a frozen dataclass `Config`;
- `HEADLINE = (key, label, unit)`: the number that the report compares, such as
  ("top1", "top-1 accuracy", "%"). `run` returns it under `key`, as a fraction in [0, 1];
- `NEEDS`: what its data must have, out of {"labels", "masks", "boxes", "points"};
- `AFTER`: the kind of task whose model it tests (its folder is `trial.after`), or None;
- `SPREADS = True` if several processes can share its work;
- `run(trial) -> metrics`, which also calls `save_scores` with a score for every test image.

Whatever a task selects, it selects on the validation split. It reads the test split once, after
that. What classification tasks share is in _classify.py, frozen features in _features.py.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stages.kit.data import store
from stages.kit.data.store import SPLITS
from workflow.files import JobError, write_atomic


@dataclass(frozen=True)
class Trial:
    """One task on one encoder: all that a task may know.

    name: the task's name in params.yaml; encoder: timm folder of the pretrained encoder; data:
    folder of the task's data set; config: the task's Config; spec: of that data set, at its image
    size; run: job.Run (device, out, work, compute, job); after: output folder of the earlier task.
    """

    name: str
    encoder: Path
    data: Path
    config: Any
    spec: Any
    seed: int
    run: Any
    after: Path | None = None

    def open(self, split: str) -> store.Split:
        """A split of the task's data set."""
        return store.Split.open(self.data, split)

    @property
    def info(self) -> dict:
        """The facts of the task's data set (data.json) that its results may depend on."""
        return store.learnt(store.info(self.data))

    def error(self, text: str, key: str = "") -> JobError:
        """An error for the user that names the task, and a setting of it."""
        return JobError(f"tasks.{self.name}{f'.{key}' if key else ''}: {text}")


def require(name: str, needs: set[str], data: str, info: dict) -> None:
    """JobError unless train, val and test have what a task needs.

    name: the task's; data: the data set's name in params.yaml; info: the content of its data.json.
    """
    source = f"data set {data!r} (source {info['source']!r})"
    for need in sorted(needs):
        bare = [split for split in SPLITS if not has(info["splits"].get(split, {}), need)]
        if len(bare) == len(SPLITS):
            give = ", or give them (label_column of the data, or one folder per class)"
            raise JobError(
                f"tasks.{name} needs {need}; {source} has none: name another data set in "
                f"tasks.{name}.data, or remove the task{give if need == 'labels' else ''}"
            )
        for split in bare:
            count = info["splits"].get(split, {}).get("count", 0)
            found = f"{count} images without {need}" if count else "no images"
            hint = f"give them {need}" if count else f"set {split}_fraction of the data above 0"
            raise JobError(
                f"tasks.{name} needs {need} in train, val and test; the {split} split of {source} "
                f"has {found}: {hint}"
            )


def has(split: dict, need: str) -> bool:
    """Whether images of a split have labels, or all of them masks, boxes or points.

    split: its facts.
    """
    if need == "labels":  # of some of its images at least: the others are left out
        return bool(split.get("labels", split.get("labelled")))
    return need in split.get("fields", ())


def save_scores(trial: Trial, index, score, **arrays) -> None:
    """Writes scores.npz, which the report's paired tests read.

    index (n,): rows of the test split; score (n,): how well the task did on each, in [0, 1] (right
    or wrong, the share of head seeds that were right, an IoU, ...); arrays: whatever else is worth
    keeping of each image. ValueError for other shapes, scores outside of [0, 1] or a row twice.
    """
    index, score = np.asarray(index, np.int64), np.asarray(score, np.float64)
    if index.ndim != 1 or index.shape != score.shape:
        raise ValueError(f"scores of {trial.name}: found {score.shape} for {index.shape} images")
    if not ((score >= 0) & (score <= 1)).all():
        raise ValueError(f"scores of {trial.name}: found values outside of [0, 1]")
    if len(np.unique(index)) < len(index):
        raise ValueError(f"scores of {trial.name}: found an image more than once")
    buffer = io.BytesIO()
    np.savez(buffer, index=index, score=score, **{k: np.asarray(v) for k, v in arrays.items()})
    write_atomic(trial.run.out / "scores.npz", buffer.getvalue())

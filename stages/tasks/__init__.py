"""Downstream tasks, one file each; the file's name is the task's name in params.yaml.

A task module has: a docstring (protocol, source, every departure), a frozen dataclass `Config`,
`LABELS` (whether it needs class labels), `SPREADS = True` if several processes can share its work,
and `run(encoder_dir, data_dir, config, run, seed, spec) -> metrics`. Whatever it selects, it
selects on the validation split; the test split is read once, after that. Here: what classification
tasks share.
"""

from __future__ import annotations

import io
from types import ModuleType

import numpy as np
import torch

from stages.kit.job.job import JobError, write_atomic
from stages.kit.plugin import load

SPLITS = ("train", "val", "test")


def find(name: str) -> ModuleType:
    """The module of task `name`; a ValueError with the nearest name if there is no such file."""
    return load("stages.tasks", name)


def require_labels(task: str, info: dict) -> None:
    """JobError unless train, val and test have images with labels; `info` is the content of
    data.json.
    """
    splits = info["splits"]
    bare = [name for name in SPLITS if not splits.get(name, {}).get("labelled")]
    if len(bare) == len(SPLITS) or not info["classes"]:
        raise JobError(
            f"tasks.{task} needs labels; source {info['source']!r} has none: remove the task from "
            "params.yaml, or give the labels (data.label_column, or one folder per class)"
        )
    for name in bare:
        count = splits.get(name, {}).get("count", 0)
        found = f"{count} images and no label" if count else "no images"
        hint = "label some of them" if count else f"set data.{name}_fraction above 0"
        raise JobError(
            f"tasks.{task} needs labels in train, val and test; the {name} split of source "
            f"{info['source']!r} has {found}: {hint}"
        )


def labelled(split) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows, labels), both int64 (n,): where in the split an image has a class label, and which."""
    labels = torch.from_numpy(np.array(split.labels, dtype=np.int64))
    rows = (labels >= 0).nonzero().flatten()
    return rows, labels[rows]


def score(scores: torch.Tensor, labels: torch.Tensor) -> dict:
    """Accuracies as fractions in [0, 1] from class scores (n, K), the higher the likelier, and
    labels (n,).

    top1; top5 (None below 5 classes); per_class_mean: the mean over the classes that occur in
    `labels` of their recall.
    """
    prediction = scores.argmax(1)
    right = (prediction == labels).double()
    count = torch.bincount(labels, minlength=scores.shape[1])
    hits = torch.bincount(labels, weights=right, minlength=scores.shape[1])
    top5 = (scores.topk(5, 1).indices == labels[:, None]).any(1) if scores.shape[1] >= 5 else None
    return {
        "top1": right.mean().item(),
        "top5": None if top5 is None else top5.double().mean().item(),
        "per_class_mean": (hits / count)[count > 0].mean().item(),
    }


def average(results: list[dict]) -> dict:
    """The mean of several `score`s, entry by entry; None stays None."""
    return {
        key: None if first is None else sum(result[key] for result in results) / len(results)
        for key, first in results[0].items()
    }


def unseen(train: torch.Tensor, test: torch.Tensor, info: dict) -> list[str]:
    """Names of the classes that the test split has and the train split lacks: no task can get those
    right.
    """
    return [info["classes"][i] for i in sorted(set(test.tolist()) - set(train.tolist()))]


def save_predictions(
    run, rows: torch.Tensor, labels: torch.Tensor, predictions: torch.Tensor
) -> None:
    """predictions.npz: index (n,) into the test split, label (n,), prediction (n,), correct (n,)
    fraction of seeds right.

    `predictions` is (n,), or (seeds, n) for a task that repeats its head: `prediction` is then the
    first seed's, all of them are kept as `predictions`, and the mean of `correct` is the reported
    top1.
    """
    every = predictions.reshape(-1, len(labels)).numpy()
    arrays = {
        "index": rows.numpy(),
        "label": labels.numpy(),
        "prediction": every[0],
        "correct": (every == labels.numpy()).mean(0),
    }
    if len(every) > 1:
        arrays["predictions"] = every
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    write_atomic(run.out / "predictions.npz", buffer.getvalue())

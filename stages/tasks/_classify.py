"""What classification tasks share: labelled images, accuracies, the scores that they save."""

from __future__ import annotations

import numpy as np
import torch

from stages.kit.data.store import SPLITS
from stages.tasks import Trial, save_scores


class Labelled:
    """The labelled images of every split: `rows[split]` and `labels[split]`, int64 (n,)."""

    def __init__(self, trial: Trial):
        self.rows, self.labels = {}, {}
        for split in SPLITS:
            self.rows[split], self.labels[split] = labelled(trial.open(split))


def labelled(split) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows, labels), both int64 (n,): where in the split an image has a class label, and which."""
    labels = torch.from_numpy(np.array(split.labels, dtype=np.int64))
    rows = (labels >= 0).nonzero().flatten()
    return rows, labels[rows]


def accuracy(scores: torch.Tensor, labels: torch.Tensor, least: float | None = None) -> dict:
    """Accuracies as fractions in [0, 1]; scores (n, K), higher = likelier, labels (n,).

    top1; top5 (None below 5 classes); per_class_mean: the mean over the classes that occur in
    `labels` of their recall. least: a class is among an image's first five only with a higher score
    than this; fewer than five may be.
    """
    right = (scores.argmax(1) == labels).double()
    count = torch.bincount(labels, minlength=scores.shape[1])
    hits = torch.bincount(labels, weights=right, minlength=scores.shape[1])
    top5 = None
    if scores.shape[1] >= 5:
        five = scores.topk(5, 1)
        hit = five.indices == labels[:, None]
        top5 = (hit if least is None else hit & (five.values > least)).any(1)
    return {
        "top1": right.mean().item(),
        "top5": None if top5 is None else top5.double().mean().item(),
        "per_class_mean": (hits / count)[count > 0].mean().item(),
    }


def average(results: list[dict]) -> dict:
    """The mean of several `accuracy`s, entry by entry; None stays None."""
    return {
        key: None if first is None else sum(result[key] for result in results) / len(results)
        for key, first in results[0].items()
    }


def unseen(trial: Trial, images: Labelled) -> list[str]:
    """Classes that the test split has and the train split lacks: no task can get those right."""
    missing = set(images.labels["test"].tolist()) - set(images.labels["train"].tolist())
    return [trial.info["classes"][number] for number in sorted(missing)]


def save(trial: Trial, images: Labelled, predictions: torch.Tensor) -> None:
    """scores.npz with label (n,) and prediction (n,) of every labelled test image.

    `predictions` is (n,), or (seeds, n) for a task that repeats its head: an image's score is then
    the share of seeds that were right, `prediction` is the first seed's, and all are kept as
    `predictions`. The mean of the scores is the reported top1.
    """
    labels = images.labels["test"].numpy()
    every = predictions.reshape(-1, len(labels)).numpy()
    more = {"predictions": every} if len(every) > 1 else {}
    score = (every == labels).mean(0)
    save_scores(trial, images.rows["test"], score, label=labels, prediction=every[0], **more)

"""Weighted k-nearest-neighbour classification of frozen features: what the geometry is worth
without training anything.

DINO's protocol (arXiv:2104.14294, facebookresearch/dino, eval_knn.py; the same in iBOT and
AttMask): features of the last block after the final norm, l2-normalised; each of the k nearest
training images votes exp(similarity / T) for its label.

Departures. Mean patch tokens stand beside the class token, which methods without an instance-level
loss leave untrained. The headline's feature and k are chosen on the validation split (the papers
report the best k on the test set); the usual k = 20 is reported for each feature besides. `centred`
adds variants from which the training mean is subtracted before the normalisation, named
"cls-centred" and "patch-centred" because they are another protocol. Votes are scaled by the nearest
neighbour's, which changes no ranking and lets T go to 0. The top-5 accuracy counts classes that got
votes, which may be fewer than five; the official one fills up with classes that got none. The whole
centre square is seen; official evaluations resize to 256 and crop 224 (`eval_crop: 0.875`, which
PUBLISHED has).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

from stages.kit import dist
from stages.tasks import Trial
from stages.tasks._classify import Labelled, accuracy, save, unseen
from stages.tasks._features import probed
from workflow import checks

HEADLINE = ("top1", "top-1 accuracy", "%")
NEEDS = {"labels"}
PUBLISHED = {"k": [10, 20, 100, 200], "temperature": 0.07, "eval_crop": 0.875, "positions": "dino"}
BLOCK = 65536  # training images compared at once


@dataclass(frozen=True)
class Config(checks.Evaluation):
    """k: candidates for the number of neighbours, those not below the number of training images are
    left out (and listed); temperature: T of the vote; centred: also try features less the training
    mean; precision: of the feature extraction; block: whose raw states are compared, 1 is the
    first; null: the last one's, after the final norm.
    """

    k: tuple[int, ...] = (10, 20, 100, 200)
    temperature: float = 0.07
    centred: bool = False
    block: int | None = None
    precision: Literal["fp32", "bf16"] = "fp32"

    def __post_init__(self):
        super().__post_init__()
        if not self.k:
            raise ValueError("k: found [], expected at least one number of neighbours")
        checks.within(self, "[1, inf)", "k", "block")
        checks.within(self, "(0, inf)", "temperature")


def vote(
    queries: torch.Tensor,
    blocks: Iterable[tuple[torch.Tensor, torch.Tensor]],
    ks: list[int],
    temperature: float,
    classes: int,
    chunk: int = 512,
) -> dict[int, torch.Tensor]:
    """{k: class scores (M, classes)} for queries (M, D) among training images; all rows are unit
    vectors. A class that got a vote has a score above 0.

    The training images come in blocks of (vectors (n, D), labels (n,)), so that memory does not
    grow with their number. Of equally near images any may be taken. `ks` must not exceed the number
    of training images.
    """
    most = max(ks)
    near = torch.empty(len(queries), 0, device=queries.device)
    owner = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    for vectors, labels in blocks:
        found = []
        for part in queries.split(chunk):
            value, where = (part @ vectors.T).topk(min(most, len(vectors)), 1)
            found.append((value, labels[where]))
        near = torch.cat((near, torch.cat([value for value, _ in found])), 1)
        owner = torch.cat((owner, torch.cat([label for _, label in found])), 1)
        near, order = near.topk(min(most, near.shape[1]), 1)
        owner = owner.gather(1, order)
    weight = ((near - near[:, :1]) / temperature).exp().clamp(min=torch.finfo(near.dtype).tiny)
    votes = {k: weight.new_zeros(len(queries), classes) for k in ks}
    return {k: vote.scatter_add_(1, owner[:, :k], weight[:, :k]).cpu() for k, vote in votes.items()}


def run(trial: Trial) -> dict:
    """Metrics on test of the chosen (feature, k) and of k = 20, accuracies on val.

    Writes scores.npz. Under torchrun the first process does it all; the others return {}.
    """
    if not dist.is_main():
        return {}
    config, device, images = trial.config, trial.run.device, Labelled(trial)
    rows, labels = images.rows, images.labels
    ks = sorted({k for k in config.k if k < len(labels["train"])})
    if not ks:
        raise trial.error(
            f"every k of {list(config.k)} must be below the number of labelled training images, "
            f"found {len(labels['train'])}: use a smaller k or more images",
            "k",
        )
    how = {"crop": config.eval_crop, "positions": config.positions, "precision": config.precision}
    train = probed(trial, "train", config.block, **how)
    centres = {name: (name, torch.zeros(())) for name in train}
    if config.centred:
        for name, values in train.items():
            centres[f"{name}-centred"] = (name, values[rows["train"]].mean(0))

    def scores(split: str, ks: list[int]) -> dict[str, dict[int, torch.Tensor]]:
        """{feature: {k: class scores}} of a split's labelled images."""
        result, queries = {}, probed(trial, split, config.block, **how)
        for name, (kind, centre) in centres.items():
            parts = zip(
                rows["train"].split(BLOCK), labels["train"].to(device).split(BLOCK), strict=True
            )
            blocks = ((unit(train[kind][part], centre, device), owner) for part, owner in parts)
            mine = unit(queries[kind][rows[split]], centre, device)
            result[name] = vote(mine, blocks, ks, config.temperature, trial.spec.num_classes)
        return result

    val = {
        (name, k): accuracy(each, labels["val"])["top1"]
        for name, by_k in scores("val", ks).items()
        for k, each in by_k.items()
    }
    best = {name: max(ks, key=lambda k: val[name, k]) for name in centres}
    feature = max(best, key=lambda name: val[name, best[name]])

    # the one reading of the test split: every choice is made
    test = scores("test", sorted({*best.values(), *({20} & set(ks))}))
    headline = test[feature][best[feature]]
    save(trial, images, headline.argmax(1))
    metrics = {
        **accuracy(headline, labels["test"], least=0.0),
        "n_test": len(labels["test"]),
        "protocol": "weighted k-NN",
        "split": "test",
        "feature": feature,
        "block": config.block,
        "norm": "l2",
        "k": best[feature],
        "temperature": config.temperature,
        "epochs": 0,
        "seed": trial.seed,
        "precision": config.precision,
        "k_tried": ks,
        "k_left_out": sorted(set(config.k) - set(ks)),
        "classes_unseen": unseen(trial, images),
        "val": {f"{name}/k={k}": value for (name, k), value in val.items()},
    }
    for name, k in best.items():
        metrics |= {f"{name}_top1": accuracy(test[name][k], labels["test"])["top1"], f"{name}_k": k}
        if 20 in ks:
            metrics[f"{name}_k20_top1"] = accuracy(test[name][20], labels["test"])["top1"]
    return metrics


def unit(values: torch.Tensor, centre: torch.Tensor, device) -> torch.Tensor:
    """values (n, D) less the centre, each row divided by its length, on the device."""
    return F.normalize((values - centre).to(device), dim=1)

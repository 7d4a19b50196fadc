"""What a linear classifier makes of what a target gives, where there are labels.

Top-1 accuracy, on validation images, of a linear classifier of one vector for each image: the
histogram of a tokenizer's codes, the class feature of a teacher, or its mean patch feature if it
has no class token. Beside it stand the same classifier of mean patch features of the student's
encoder before any training, drawn from the job's seed, and of the target's own teacher. Chance is
the share of the largest class among these validation images. The classifier is ridge regression on
standardised inputs; its penalty is chosen among ALPHAS by leaving one out on the training images.
The labels judge; nothing is trained on them that anybody uses, so a target is not one that saw
labels for that.

At most TRAIN training and HELD_OUT validation images are looked at, never the test split.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor

from stages.kit import keyed
from stages.kit.data import store
from stages.kit.data.batches import MOST, Subset
from stages.kit.data.loader import evaluation
from stages.kit.nets import encoders
from stages.kit.nets.target import EncoderTarget, Frozen
from stages.kit.spec import Spec

TRAIN, HELD_OUT = 2000, 1000  # images
LEVEL = 0.95
ALPHAS = tuple(10.0**power for power in range(-1, 6))
Described = Callable[[Tensor], Tensor]  # images (B,3,H,W) in [0,1] -> a vector of each (B,D)


def of_codes(
    target, upstream: Frozen | None, data: Path, spec: Spec, seed: int, device, batch_size: int
) -> dict:
    """`measured` of the histogram of a tokenizer's codes, of its teacher, and of the untrained."""

    def histogram(images: Tensor) -> Tensor:
        ids = target(images, "ids")["ids"].cpu()
        hits = torch.zeros(len(ids), target.sizes["ids"])
        return hits.scatter_add_(1, ids, torch.ones(ids.shape))

    ways = {"": histogram, "untrained": mean_patch(untrained(spec, seed, device))}
    if upstream is not None and "patch" in upstream.sizes:
        ways["teacher"] = mean_patch(upstream)
    return measured(ways, data, spec, seed, device, batch_size)


def of_features(target, data: Path, spec: Spec, seed: int, device, batch_size: int) -> dict:
    """`measured` of a teacher's class feature, without one of its mean patch feature, and of the
    untrained encoder.
    """

    def cls(images: Tensor) -> Tensor:
        return target(images, "cls")["cls"].float()

    way = cls if "cls" in target.sizes else mean_patch(target)
    ways = {"": way, "untrained": mean_patch(untrained(spec, seed, device))}
    return measured(ways, data, spec, seed, device, batch_size)


def mean_patch(teacher: Frozen) -> Described:
    return lambda images: teacher(images, "patch")["patch"].float().mean(dim=1)


def untrained(spec: Spec, seed: int, device) -> Frozen:
    """The student's encoder before any training, drawn from `seed`; as MAE's, if it can be so."""
    style = "sincos" if "sincos" in spec.model.styles and spec.model.embed_dim % 4 == 0 else "timm"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(keyed.key(seed, "untrained"))
        encoder = encoders.create(spec, style)
    return Frozen(EncoderTarget(encoder, spec).to(device))


@torch.no_grad()
def measured(
    ways: dict[str, Described], data: Path, spec: Spec, seed: int, device, batch_size: int
) -> dict:
    """ "probe" of the way without a name, its interval, chance, the counts of images, and
    probe_<name> of each other way to describe images; {} without two classes among labelled
    training images, or without a labelled validation image.
    """
    from scipy.stats import binomtest  # here, as it is slow to import

    splits = store.info(data)["splits"]
    if not {"train", "val"} <= set(splits):
        return {}
    inputs, labels = {}, {}
    for name, most in (("train", TRAIN), ("val", HELD_OUT)):
        split = store.Split.open(data, name)
        rows = (torch.from_numpy(split.labels) >= 0).nonzero()[:, 0]
        rows = rows[keyed.permutation(len(rows), seed, "probe", name)[:most]].sort().values
        if not len(rows):
            return {}
        part, labels[name] = Subset(split, rows), split.labels[rows.numpy()]
        inputs[name] = described(ways, part, spec.image_size, device, batch_size)
    if len(np.unique(labels["train"])) < 2:
        return {}
    right = {
        name: probe(inputs["train"][name], labels["train"], inputs["val"][name], labels["val"])
        for name in ways
    }
    count = len(labels["val"])
    interval = binomtest(right[""], count).proportion_ci(LEVEL, method="wilson")
    return {
        "probe": right.pop("") / count,
        "probe_low": float(interval.low),
        "probe_high": float(interval.high),
        **{f"probe_{name}": each / count for name, each in right.items()},
        "probe_chance": float(np.bincount(labels["val"]).max() / count),
        "probe_train": len(labels["train"]),
        "probe_val": count,
    }


def described(
    ways: dict[str, Described], split, size: int, device, batch_size: int
) -> dict[str, np.ndarray]:
    """{way: vectors (n,D)} of the whole centre squares of a split's images."""
    found = {name: [] for name in ways}
    for images, _, _ in evaluation(split, size, min(batch_size, MOST)):
        images = images.to(device)
        for name, way in ways.items():
            found[name].append(way(images).cpu())
    return {name: torch.cat(parts).double().numpy() for name, parts in found.items()}


def probe(train: np.ndarray, labels: np.ndarray, test: np.ndarray, wanted: np.ndarray) -> int:
    """How many of the rows `test` a linear classifier gets right that was fitted to `train`."""
    from sklearn.linear_model import RidgeClassifierCV  # here, as they are slow to import
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    with threadpool_limits(1):
        model = make_pipeline(StandardScaler(), RidgeClassifierCV(ALPHAS)).fit(train, labels)
        return int((model.predict(test) == wanted).sum())

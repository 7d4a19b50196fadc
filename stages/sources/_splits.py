"""Which split each image goes to: the same rules for every source.

Splits that the source gives are kept, missing ones are carved from train: stratified by class,
chosen by a hash of seed and name, the same every time.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass

import numpy as np

from stages.kit.data.store import SPLITS
from stages.sources import Found, Listing, SourceError


@dataclass
class Assignment:
    """Where each row of each given split goes: number in SPLITS, or -1 = not used."""

    parts: dict[str, np.ndarray]
    warnings: list[str]


def assign(found: Found, data: dict) -> Assignment:
    """Keep given splits, carve missing ones from train, then cut train to `max_train`."""
    warnings = []
    train = found.splits["train"]
    parts = {
        split: np.full(len(s), SPLITS.index(split), np.int8) for split, s in found.splits.items()
    }
    if (train.labels >= 0).any() and (train.labels < 0).any():
        warnings.append(
            f"train: {int((train.labels < 0).sum())} of {len(train)} images have no label"
        )
    for split in [s for s in ("val", "test") if s in parts]:
        if (train.labels >= 0).any() and not (found.splits[split].labels >= 0).any():
            warnings.append(
                f"the given split {split} has no labels: not used, another one is carved from train"
            )
            parts[split][:] = -1
    order = _order(train, data["seed"])
    for split, fraction in (("test", data["test_fraction"]), ("val", data["val_fraction"])):
        if split not in parts or (parts[split] < 0).all():
            rows = order[parts["train"][order] == 0]
            parts["train"][_share(rows, train.labels, fraction)] = SPLITS.index(split)
    rows = order[parts["train"][order] == 0]
    if not len(rows):
        raise SourceError(
            "data.test_fraction, data.val_fraction: no image of train remains; lower them"
        )
    if data["max_train"] and data["max_train"] < len(rows):
        by_class = rows[np.argsort(train.labels[rows], kind="stable")]
        rank = _rank(train.labels[by_class])  # all firsts of their class, then all seconds ...
        parts["train"][by_class[np.argsort(rank, kind="stable")][data["max_train"] :]] = -1
    return Assignment(parts, warnings)


def _order(listing: Listing, seed: int) -> np.ndarray:
    """All rows in a random order that depends on the seed and each row's name alone."""
    names = listing.names if listing.names is not None else range(len(listing))
    digests = (hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest() for name in names)
    numbers = (int.from_bytes(digest, "big") for digest in digests)
    return np.argsort(np.fromiter(numbers, np.uint64, len(listing)), kind="stable")


def _share(rows: np.ndarray, labels: np.ndarray, fraction: float) -> np.ndarray:
    """round(fraction * n) of the n rows, spread evenly over the classes: each is within one row of
    its share. At least one row when there are two or more, and never the only row of a class.
    """
    if fraction <= 0:
        return rows[:0]
    counts = Counter(labels[rows].tolist())
    if len(counts) > 1:
        rows = rows[[counts[k] > 1 for k in labels[rows].tolist()]]
    rows = rows[np.argsort(labels[rows], kind="stable")]
    if len(rows) < 2:
        return rows[:0]
    count = min(max(1, int(fraction * len(rows) + 0.5)), len(rows) - 1)
    steps = np.arange(len(rows) + 1) * count // len(rows)
    return rows[np.diff(steps) > 0]


def _rank(labels: np.ndarray) -> np.ndarray:
    """Place of each row among those of its class; labels must be sorted."""
    return np.arange(len(labels)) - np.searchsorted(labels, labels)

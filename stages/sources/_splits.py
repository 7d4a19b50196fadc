"""Which split each image goes to: the same rules for every source.

Splits that the source gives are kept, missing ones are carved from train: stratified by class,
chosen by a hash of seed and name, the same every time. Of a partly labelled train, they are carved
from its labelled images. Groups (`data.group`) go to one split as a whole.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

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
    labelled = train.labels >= 0
    for split, listing in found.splits.items():
        bare = int((listing.labels < 0).sum())
        if labelled.any() and 0 < bare < len(listing):
            warnings.append(f"{split}: {bare} of {len(listing)} images have no label")
    for split in [s for s in ("val", "test") if s in parts]:
        if (train.labels >= 0).any() and not (found.splits[split].labels >= 0).any():
            warnings.append(
                f"the given split {split} has no labels: its {len(parts[split])} images are not "
                "used, another one is carved from train"
            )
            parts[split][:] = -1
    order = _order(train, data["seed"])
    units = _units(found, data["seed"], warnings)
    if labelled.any() and not labelled.all():
        order = order[labelled[order]]  # val and test are for tasks, which need labels
    for split, fraction in (("test", data["test_fraction"]), ("val", data["val_fraction"])):
        if split not in parts or (parts[split] < 0).all():
            rows = order[parts["train"][order] == 0]
            share = _share if units is None else partial(_share_groups, units)
            parts["train"][share(rows, train.labels, fraction)] = SPLITS.index(split)
    order = _order(train, data["seed"])
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
    return np.argsort(_numbers(names, seed, len(listing)), kind="stable")


def _numbers(names: Iterable, seed: int, count: int) -> np.ndarray:
    digests = (hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest() for name in names)
    return np.fromiter((int.from_bytes(digest, "big") for digest in digests), np.uint64, count)


def _units(found: Found, seed: int, warnings: list[str]) -> np.ndarray | None:
    """The group of each row of train as a number, in a random order of groups; None without any.

    A row without a group is one of its own. Groups that given splits share are a warning.
    """
    train = found.splits["train"]
    if train.groups is None:
        return None
    bare = sum(group is None for group in train.groups)
    if bare:
        warnings.append(f"data.group: {bare} of {len(train)} images of train have no group")
    held = {s: set(g.groups or ()) - {None} for s, g in found.splits.items()}
    for one, other in (("train", "val"), ("train", "test"), ("val", "test")):
        if both := len(held.get(one, set()) & held.get(other, set())):
            warnings.append(
                f"data.group: {both} groups of the given split {other} are in {one} too; "
                "given splits are kept as they are"
            )
    names = [f"row {row}" if g is None else f"group {g}" for row, g in enumerate(train.groups)]
    known = sorted(set(names))
    rank = np.empty(len(known), np.int64)
    rank[np.argsort(_numbers(known, seed, len(known)), kind="stable")] = np.arange(len(known))
    place = {name: rank[k] for k, name in enumerate(known)}
    return np.array([place[name] for name in names], np.int64)


def _share_groups(
    units: np.ndarray, rows: np.ndarray, labels: np.ndarray, fraction: float
) -> np.ndarray:
    """Whole groups with about a `fraction` of the rows: each is of the class that most of its rows
    have, and of every class groups are taken as long as that brings the number nearer to its share.
    At least one group when there are two or more, never all.
    """
    members: dict[int, list[int]] = {}
    for row in rows.tolist():
        members.setdefault(int(units[row]), []).append(row)
    if fraction <= 0 or len(members) < 2:
        return rows[:0]
    kinds: dict[int, list[int]] = {}
    for unit in sorted(members):
        kind = Counter(labels[members[unit]].tolist()).most_common(1)[0][0]
        kinds.setdefault(kind, []).append(unit)
    taken: list[int] = []
    due = have = 0.0
    for kind in sorted(kinds):
        due += fraction * sum(len(members[unit]) for unit in kinds[kind])
        for unit in kinds[kind][: len(kinds[kind]) - (len(kinds[kind]) > 1 or len(kinds) == 1)]:
            size = len(members[unit])
            if abs(have + size - due) < abs(have - due):
                taken.append(unit)
                have += size
    if not taken:
        taken = [min(members, key=lambda unit: len(members[unit]))]
    if len(taken) == len(members):
        taken.pop()
    return np.array([row for unit in taken for row in members[unit]], np.int64)


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

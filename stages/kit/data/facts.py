"""What data.json says of a data set: counts, statistics, repeats, and what a user should know."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path

import numpy as np

from stages.kit.data.store import SPLITS, Split
from stages.kit.data.tally import Tally, duplicates

IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


def gather(
    about: dict,
    labels: dict[str, np.ndarray],
    tallies: dict[str, Tally],
    fields: dict[str, list[str]],
    broken: list[dict],
    normalise: str,
) -> dict:
    """The facts of the images that were written; `labels`, `tallies`, `fields`: of each split.

    about: what is known of the set already, its classes among it; broken: the rows of
    quarantine.jsonl; normalise: "dataset" or "imagenet", whose mean and std encoders use.
    """
    classes, statistics = about["classes"], tallies["train"].statistics()
    hashes = {split: tally.hasher.hexdigest() for split, tally in tallies.items()}
    reasons = Counter(row["reason"] for row in broken)
    return {
        "hash": hashlib.sha256(json.dumps([classes, hashes], sort_keys=True).encode()).hexdigest(),
        "fields": sorted(set().union(*fields.values())),
        **(IMAGENET if normalise == "imagenet" else statistics),
        "statistics": statistics,
        "splits": {s: _of_split(part, classes, fields[s]) for s, part in labels.items()},
        "duplicates": duplicates({s: tally.digests for s, tally in tallies.items()}),
        "quarantine": {"count": len(broken), "reasons": _sorted(reasons)},
        "converted": _sorted(sum((tally.converted for tally in tallies.values()), Counter())),
        "upscaled": sum(tally.upscaled for tally in tallies.values()),
    }


def _of_split(labels: np.ndarray, classes: list[str], fields: list[str]) -> dict:
    """The facts of one split. `fields`: "masks" and "boxes", where all of its images have them."""
    counts = np.bincount(labels[labels >= 0], minlength=len(classes))
    return {
        "count": len(labels),
        "class_counts": counts.tolist(),
        "labels": int((labels >= 0).sum()),
        "labelled": bool(len(labels) and (labels >= 0).all()),
        "fields": fields,
    }


def _sorted(counts: Counter) -> dict[str, int]:
    return dict(sorted(counts.items()))


def name_duplicates(facts: dict, out: Path) -> None:
    """Puts names of images, such as "train/cats/1.jpg", in the place of their rows."""
    groups = facts["duplicates"]["groups"]
    if not groups:
        return
    names = {split: Split(out, split, facts).names() for split in facts["splits"]}
    facts["duplicates"]["groups"] = [
        [f"{split}/{names[split][row].removeprefix(split + '/')}" for split, row in group]
        for group in groups
    ]


def complaints(facts: dict) -> list[str]:
    """What a user should know before trusting numbers made from this data set."""
    texts, splits = [], facts["splits"]
    for pair, n in facts["duplicates"]["across"].items():
        if n:
            one, other = pair.split("-")
            texts.append(
                f"{n} of {splits[other]['count']} images of {other} are also in {one} "
                "(exactly equal pixels)"
            )
    for split in SPLITS:
        if split not in splits:
            texts.append(f"there is no split {split}")
            continue
        counts = splits[split]["class_counts"]
        missing = [name for name, n in zip(facts["classes"], counts, strict=True) if not n]
        if missing:
            texts.append(
                f"{split} has no image of {len(missing)} of {len(counts)} classes "
                f"({', '.join(missing[:5])})"
            )
    if facts["upscaled"]:
        texts.append(
            f"{facts['upscaled']} images are smaller than {facts['store_size']} px and were "
            "enlarged"
        )
    return texts


def summary(facts: dict, images_per_s: float) -> dict:
    """The few numbers that the manifest and the line printed at the end show."""
    repeats = facts["duplicates"]
    across = {f"in_{pair.replace('-', '_and_')}": n for pair, n in repeats["across"].items() if n}
    return {
        **{split: about["count"] for split, about in facts["splits"].items()},
        "classes": len(facts["classes"]),
        "mode": facts["mode"],
        "hash": facts["hash"][:12],
        "quarantined": facts["quarantine"]["count"],
        "duplicates": sum(repeats["within"].values()),
        **across,
        "warnings": len(facts["warnings"]),
        "images_per_s": round(images_per_s, 1),
    }

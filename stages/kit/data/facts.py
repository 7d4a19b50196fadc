"""What data.json says of a data set: counts, statistics, repeats, and what a user should know."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from stages.kit.data.near import confirmed, near_duplicates
from stages.kit.data.store import SPLITS, Split, info, learnt
from stages.kit.data.tally import Tally, duplicates

EMPTY = 0.5  # a range of which less is used is said to be empty
DIM = 0.15  # of all grey levels
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
        "near_duplicates": near_duplicates(
            {s: tally.looks for s, tally in tallies.items()},
            {s: tally.digests for s, tally in tallies.items()},
        ),
        "levels": _levels(tallies.values()),
        "darkest": min(tally.darkest for tally in tallies.values()),
        "brightest": max(tally.brightest for tally in tallies.values()),
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


def _levels(tallies: Iterable[Tally]) -> dict[str, list[float]]:
    """{"16-bit" or "float": the smallest and largest of the images' 0.1 and 99.9 percentiles}."""
    found: dict[str, list[float]] = {}
    for tally in tallies:
        for kind, (low, high) in tally.levels.items():
            before = found.get(kind, [low, high])
            found[kind] = [min(before[0], low), max(before[1], high)]
    return dict(sorted(found.items()))


def _sorted(counts: Counter) -> dict[str, int]:
    return dict(sorted(counts.items()))


def name_duplicates(facts: dict, out: Path) -> None:
    """Puts names of images, such as "train/cats/1.jpg", in the place of their rows; of those that
    may look alike, the ones that do.
    """
    groups, near = facts["duplicates"]["groups"], facts["near_duplicates"]
    if not groups and not near["pairs"]:
        return
    splits = {split: Split(out, split, facts) for split in facts["splits"]}
    size = facts["store_size"]
    near = confirmed(near, lambda split, row: splits[split].square([row], size)[0].numpy())
    names = {split: splits[split].names() for split in splits}

    def named(lists: list) -> list[list[str]]:
        return [
            [f"{split}/{names[split][row].removeprefix(split + '/')}" for split, row in group]
            for group in lists
        ]

    facts["duplicates"]["groups"] = named(groups)
    facts["near_duplicates"] = near | {"pairs": named(near["pairs"])}


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
    for pair, n in facts["near_duplicates"]["across"].items():
        if n:
            one, other = pair.split("-")
            texts.append(
                f"{n} of {splits[other]['count']} images of {other} look much like one of {one} "
                "(near_duplicates in data.json names pairs; a hint, no proof)"
            )
    texts += _about_levels(facts)
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


def spoken(facts: dict) -> list[str]:
    """What the terminal shows: the warnings, and how many images were put aside."""
    aside = facts["quarantine"]
    if not aside["count"]:
        return facts["warnings"]
    reasons = ", ".join(f"{n} {why}" for why, n in aside["reasons"].items())
    text = f"{aside['count']} images cannot be used ({reasons}); quarantine.jsonl names them"
    return [*facts["warnings"], text]


def _about_levels(facts: dict) -> list[str]:
    """What to say of ranges that are mostly empty, or cut off."""
    texts, asked = [], facts.get("range")
    for kind, (low, high) in facts["levels"].items():
        first, last = asked or ((0, 1) if kind == "float" else (0, 65535))
        used = (min(high, last) - max(low, first)) / (last - first)
        values = f"{kind} images have values from {low:g} to {high:g} (0.1 and 99.9 percentiles)"
        if used < EMPTY:
            levels = max(1, round(255 * used) + 1)
            texts.append(
                f"{values}, of a range from {first:g} to {last:g}: {levels} of 256 grey levels "
                f"remain; set data.range, such as {_proposed(kind, low, high)}, or auto"
            )
        if asked and (low < first or high > last) and not facts.get("auto_range"):
            texts.append(f"{values}: what is outside of data.range {asked} is black or white")
    if asked and not facts["levels"]:
        texts.append(f"data.range: found {asked}, but no 16-bit or float image that it applies to")
    if facts.get("auto_range") and not asked:
        texts.append("data.range: auto has found no two values of 16-bit or float images in train")
    elif facts.get("auto_range"):
        texts.append(
            f"data.range: auto has found {_short(asked)} in train, which become black and white"
        )
    deep = facts["converted"].get("16-bit colour", 0)
    if deep and asked and "16-bit colour" not in facts["levels"]:
        texts.append(f"data.range does not apply to {deep} images with 16 bits in each colour")
    if facts["brightest"] - facts["darkest"] < 255 * DIM and not texts:
        texts.append(
            f"all pixels lie between {facts['darkest']} and {facts['brightest']} of 255"
            + (
                f"; of {deep} images with 16-bit colours the upper 8 bits are kept: data.range, "
                "such as [0, 4095] or auto, says which values to use"
                if deep
                else ""
            )
        )
    return texts


def _short(span: list[float]) -> str:
    return f"[{span[0]:g}, {span[1]:g}]"


def _proposed(kind: str, low: float, high: float) -> str:
    """A range for these values: of integers the next number of bits."""
    if kind.startswith("16-bit") and low >= 0:
        return f"[0, {2 ** max(1, int(high).bit_length()) - 1}]"
    return f"[{low:g}, {high:g}]"


def content(out: Path, outputs: dict[str, str]) -> list:
    """What later stages may read of the data set in `out`: facts, and hashes of its files.

    Not what the facts only tell, such as the images put aside. Where the images are mapped, nobody
    reads the parquet files, which hold their names and original bytes.
    """
    facts = info(out)
    passed = (".json", ".jsonl", *((".parquet",) if facts["mode"] == "memmap" else ()))
    files = {path: hash for path, hash in outputs.items() if not path.endswith(passed)}
    return [learnt(facts), files]


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

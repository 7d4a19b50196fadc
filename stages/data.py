"""Stage data: a source becomes splits on disk that every later stage reads.

    python -m stages.data --name main [--params params.yaml] [--results results]

Writes results/data/<name>/ (layout: stages/kit/data/store.py). In one pass over the source every image is
decoded once, in threads: broken ones go to quarantine.jsonl with their reason, the others are
hashed, counted, and written. Memory does not grow with the data but for about 50 bytes per image
(label, split and pixel hash).

* Splits the source gives are kept. A missing test split is `test_fraction` of train, a missing val
  split `val_fraction` of what then remains: stratified by class, chosen by a hash of (seed, name),
  the same every time. val is always there to select on, so that test is read once. A val or test
  split without labels beside a labelled train is not used.
* `max_train` keeps so many of train, equally many per class as far as they reach; a smaller one is
  a subset of a larger one. It is applied before decoding, so broken images make it smaller.
* `hash` covers classes, splits, labels, masks, boxes and all decoded pixels in order: what can be
  learnt from, not how it was packed. Duplicates are images whose decoded pixels are exactly equal;
  they are reported, never removed.
* mean and std are those of the stored squares of train alone.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from stages.kit.data.decode import Broken, Pixels, cores, ordered_map, prepare, square
from stages.kit.data.store import Split, SplitWriter, Tally, duplicates
from stages.kit.job import process
from stages.kit.job.command import command
from stages.sources import SPLITS, Found, Sample, SourceError, assign
from workflow import plugins
from workflow.files import write_atomic, write_json

IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


def main(argv: list[str] | None = None) -> int:
    """Runs one data job; returns the exit status."""
    return command("data", __doc__, make, argv)


def make(run) -> None:
    """The work of the stage, for a job.Run."""
    if process.rank():
        return  # under torchrun one process reads and writes
    params, threads = run.job.params, run.compute["threads"]
    run.summary |= build(params["data"], params["source"], run.out, run.work, threads)


def build(data: dict, source: dict, out: Path, work: Path, threads: int | None = None) -> dict:
    """Source -> data set in `out`; returns the summary. SourceError when the source is not fit for
    use.
    """
    began = time.monotonic()
    found = find(data, source)
    size = data["store_size"] or data["image_size"]
    chosen = assign(found, data)
    warnings = [*found.warnings, *chosen.warnings]
    total = sum(int((part >= 0).sum()) for part in chosen.parts.values())
    mode = "memmap" if total * size * size * 3 <= data["memory_map_gb"] * 1e9 else "shards"

    kinds = {
        kind: any(getattr(s, kind) for s in found.splits.values()) for kind in ("masks", "boxes")
    }
    names = [
        s for s in SPLITS if any((part == SPLITS.index(s)).any() for part in chosen.parts.values())
    ]
    writers = {
        s: SplitWriter(out, s, size, found.classes, memmap=mode == "memmap", **kinds) for s in names
    }
    tally = {s: Tally() for s in names}
    broken: list[dict] = []
    with tqdm(total=total, desc="data", unit="image", disable=None) as bar:
        for split, label, sample, pixels in _images(
            found, chosen.parts, size, threads or min(cores(), 8)
        ):
            bar.update()
            if isinstance(pixels, Broken):
                why = {"reason": pixels.reason, "detail": pixels.detail}
                broken.append({"split": split, "name": sample.name, **why})
                _check_quarantine(broken, total, data["quarantine_limit"], work)
                continue
            mask = None if sample.mask is None else square(sample.mask, size, nearest=True)
            writers[split].add(
                sample.name, pixels.encoded, label, pixels.square, mask, sample.boxes
            )
            tally[split].add(pixels, label, mask, sample.boxes)
    labels = {s: writer.close() for s, writer in writers.items()}
    write_atomic(out / "quarantine.jsonl", "".join(json.dumps(row) + "\n" for row in broken))
    if not len(labels["train"]):
        raise SourceError(f"data.source: {data['source']} has no usable image in train")

    repeats = duplicates({s: t.digests for s, t in tally.items()})
    statistics = tally["train"].statistics()
    facts = {
        "source": source["name"]
        + (f":{Path(source['argument']).name}" if source["argument"] else ""),
        "hash": _hash(found.classes, {s: t.hasher.hexdigest() for s, t in tally.items()}),
        "mode": mode,
        "image_size": data["image_size"],
        "store_size": size,
        "classes": found.classes,
        **(IMAGENET if data["normalise"] == "imagenet" else statistics),
        "statistics": statistics,
        "splits": {s: _facts(part, found.classes) for s, part in labels.items()},
        "duplicates": repeats,
        "quarantine": {
            "count": len(broken),
            "reasons": _sorted(Counter(r["reason"] for r in broken)),
        },
        "converted": _sorted(sum((t.converted for t in tally.values()), Counter())),
        "upscaled": sum(t.upscaled for t in tally.values()),
        "ignored": found.ignored,
    }
    if repeats["groups"]:
        known = {s: Split(out, s, facts).names() for s in labels}
        name = {
            (s, i): f"{s}/{known[s][i].removeprefix(s + '/')}"
            for group in repeats["groups"]
            for s, i in group
        }
        repeats["groups"] = [[name[place] for place in group] for group in repeats["groups"]]
    facts["warnings"] = warnings + _complaints(facts)
    write_json(out / "data.json", facts)
    for text in facts["warnings"]:
        print(f"warning: {text}", file=sys.stderr)
    return {
        **{s: len(part) for s, part in labels.items()},
        "classes": len(found.classes),
        "mode": mode,
        "hash": facts["hash"][:12],
        "quarantined": len(broken),
        "duplicates": sum(repeats["within"].values()),
        **{f"in_{pair.replace('-', '_and_')}": n for pair, n in repeats["across"].items() if n},
        "warnings": len(facts["warnings"]),
        "images_per_s": round(total / (time.monotonic() - began), 1),
    }


def find(data: dict, source: dict) -> Found:
    """Ask the source what it holds. SourceError when a size or a column makes no sense for it."""
    if data["store_size"] and data["store_size"] < data["image_size"]:
        raise SourceError(
            f"data.store_size: {data['store_size']} is smaller than data.image_size ({data['image_size']})"
        )
    for key in ("image_column", "label_column"):
        if data[key] is not None and source["name"] not in ("parquet", "hub"):
            raise SourceError(
                f"data.{key}: found {data[key]!r}, but the source {source['name']} has no columns"
            )
    module = plugins.module("source", source["name"])
    return module.read(source["argument"], module.Config(**source["config"]), data)


def _images(found: Found, parts: dict[str, np.ndarray], size: int, threads: int) -> Iterator[tuple]:
    """(split, label, Sample, Pixels or Broken) of every assigned row, in the source's order."""

    def work(item: tuple[int, Sample]) -> tuple[int, Sample, Pixels | Broken]:
        row, sample = item
        try:
            if sample.problem:
                raise Broken("unreadable", sample.problem)
            return row, sample, prepare(sample.image, size)
        except Broken as error:
            return row, sample, error

    for given, listing in found.splits.items():
        rows = np.flatnonzero(parts[given] >= 0)
        samples = zip(rows.tolist(), listing.read(rows), strict=True)
        for row, sample, pixels in ordered_map(work, samples, threads):
            yield SPLITS[parts[given][row]], int(listing.labels[row]), sample, pixels


def _check_quarantine(broken: list[dict], total: int, limit: float, work: Path) -> None:
    """Stop as soon as it is certain that more than the limit of all images is broken."""
    if len(broken) <= limit * total:
        return
    write_atomic(work / "quarantine.jsonl", "".join(json.dumps(row) + "\n" for row in broken))
    reasons = ", ".join(
        f"{n} {reason}" for reason, n in Counter(row["reason"] for row in broken).most_common()
    )
    first = "; ".join(f"{row['name']} ({row['reason']}: {row['detail']})" for row in broken[:3])
    raise SourceError(
        f"data.quarantine_limit: {len(broken)} of {total} images cannot be used ({reasons}), "
        f"allowed are {limit:.1%}. First: {first}. The list is in {work / 'quarantine.jsonl'}. "
        "Repair or remove them, or raise the limit."
    )


def _facts(labels: np.ndarray, classes: list[str]) -> dict:
    counts = np.bincount(labels[labels >= 0], minlength=len(classes))
    return {
        "count": len(labels),
        "class_counts": counts.tolist(),
        "labelled": bool(len(labels) and (labels >= 0).all()),
    }


def _sorted(counts: Counter) -> dict[str, int]:
    return dict(sorted(counts.items()))


def _hash(classes: list[str], splits: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps([classes, splits], sort_keys=True).encode()).hexdigest()


def _complaints(facts: dict) -> list[str]:
    """What a user should know before trusting numbers made from this data set."""
    texts, splits = [], facts["splits"]
    for pair, n in facts["duplicates"]["across"].items():
        if n:
            one, other = pair.split("-")
            texts.append(
                f"{n} of {splits[other]['count']} images of {other} are also in {one} (exactly equal pixels)"
            )
    for split in SPLITS:
        if split not in splits:
            texts.append(f"there is no split {split}")
            continue
        counts = splits[split]["class_counts"]
        missing = [name for name, n in zip(facts["classes"], counts, strict=True) if not n]
        if missing:
            texts.append(
                f"{split} has no image of {len(missing)} of {len(counts)} classes ({', '.join(missing[:5])})"
            )
    if facts["upscaled"]:
        texts.append(
            f"{facts['upscaled']} images are smaller than {facts['store_size']} px and were enlarged"
        )
    return texts


if __name__ == "__main__":
    raise SystemExit(main())

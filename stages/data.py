"""Stage data: a source becomes splits on disk that every later stage reads.

    python -m stages.data [--name main] [--params params.yaml] [--results results]

Writes results/data/<name>/ (layout: stages/kit/data/store.py). In one pass over the source every
image is decoded once, in threads. Broken ones go to quarantine.jsonl with their reason, the others
are hashed, counted and written. Memory does not grow with the data but for about 70 bytes per image
(label, split, hashes of pixels and of looks), and 20 per box.

* Splits that the source gives are kept; `data.splits` says what their names do not, and groups
  (`data.group`) are never torn apart. A missing test split is `test_fraction` of train, a missing
  val split `val_fraction` of what then remains: stratified by class, chosen by a hash of (seed,
  name), the same every time. So there is always a val split to select on, and test is read once. A
  val or test split without labels beside a labelled train is not used.
* `max_train` keeps so many of train, equally many per class as far as they reach. A smaller one is
  a subset of a larger one. It is applied before decoding, so broken images make it smaller.
* `hash` covers classes, splits, labels, masks, boxes and all decoded pixels in order: what can be
  learnt from, not how it was packed. Duplicates are images whose decoded pixels are exactly equal.
  They are reported, never removed, and so are images of two splits that look alike.
* mean and std are those of the stored squares of train alone.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from stages.kit.data import store
from stages.kit.data.decode import MAX_PIXELS, Broken, Pixels, Range, prepare, raw_levels
from stages.kit.data.facts import (
    complaints,
    content,
    gather,
    name_duplicates,
    spoken,
    summary,
)
from stages.kit.data.store import SPLITS
from stages.kit.data.tally import Tally
from stages.kit.data.threads import ordered_map
from stages.kit.data.writer import SplitWriter
from stages.kit.job import process
from stages.kit.job.command import command
from stages.sources import Found, Listing, Sample, SourceError
from stages.sources._names import printable
from stages.sources._splits import assign
from workflow import plugins
from workflow.files import write_atomic, write_json
from workflow.machine import cores

FIELDS = ("masks", "boxes")
SAMPLED = 1000  # images, and values of each, that data.range: auto looks at


def main(argv: list[str] | None = None) -> int:
    """Runs one data job; returns the exit status."""
    return command("data", __doc__, make, argv)


def make(run) -> None:
    """The work of the stage, for a job.Run."""
    if process.rank():
        return  # under torchrun one process reads and writes
    params, threads = run.job.params, run.compute["threads"]
    run.content = partial(content, run.out)
    run.summary |= build(params["data"], params["source"], run.out, run.work, threads)
    run.refused = lacking(run)
    doubts = run.plan.doubts({run.job.name: run.out})
    for text in doubts:
        print(f"warning: {text}", file=sys.stderr)
    if apart(sys.stdout, sys.stderr):  # the rules send stderr into a log that few people read
        for text in [*spoken(store.info(run.out)), *doubts]:
            code = sys.stdout.encoding or "utf-8"
            line = f"{run.job.id}: warning: {text}".encode(code, "backslashreplace").decode(code)
            print(line, flush=True)


def lacking(run) -> str:
    """What of the plan will fail for want of labels, masks or boxes in the new data set, or ""."""
    problems = run.plan.lacks({run.job.name: run.out})
    if not problems:
        return ""
    facts = store.info(run.out)
    counts = ", ".join(
        f"{about['count']} in {split}, {about['labels']} of them labelled"
        + "".join(f", with {field}" for field in about["fields"])
        for split, about in facts["splits"].items()
    )
    return "\n".join(
        [
            f"{run.job.id}: {facts['source']} was read ({counts}), and then the plan fails:",
            *(f"  - {problem}" for problem in problems),
            f"Its images are not read again once {run.plan.params_file} asks for what they have. "
            "Labels come from one folder per class or a column (data.label_column).",
        ]
    )


def apart(one, other) -> bool:
    """Whether two streams lead to different places, as far as that can be known."""
    try:
        places = [os.fstat(stream.fileno()) for stream in (one, other)]
    except (OSError, ValueError, AttributeError):  # closed, or not a file
        return True
    return len({(place.st_dev, place.st_ino) for place in places}) == 2


def build(
    data: dict,
    source: dict,
    out: Path,
    work: Path,
    threads: int | None = None,
    limits: dict[str, int] | None = None,
) -> dict:
    """Source -> data set in `out`; returns the summary. SourceError when the source is not fit for
    use.

    `limits`: at most so many images of each split, the first ones, for a trial of the real thing.
    """
    began = time.monotonic()
    found = find(data, source)
    size = data["store_size"] or data["image_size"]
    chosen = assign(found, data)
    total = sum(int((part >= 0).sum()) for part in chosen.parts.values())
    mode = "memmap" if total * size * size * 3 <= data["memory_map_gb"] * 1e9 else "shards"
    for k, split in enumerate(SPLITS if limits else ()):
        for part in chosen.parts.values():
            part[np.flatnonzero(part == k)[limits.get(split, 0) :]] = -1

    fields = _fields(found, chosen.parts)
    writers = {
        split: SplitWriter(
            out, split, size, found.classes, memmap=mode == "memmap", **dict.fromkeys(kinds, True)
        )
        for split, kinds in fields.items()
    }
    tallies = {split: Tally() for split in writers}
    broken: list[dict] = []
    threads = threads or min(cores(), 8)
    span, asked = data.get("range"), data.get("range") == "auto"
    if asked:
        span = auto_range(found.splits["train"], chosen.parts["train"], data.get("max_pixels"))
    how = Range.of({**data, "range": span})
    complained: list[str] = []
    images = _images(found, chosen.parts, size, threads, how)
    for split, label, sample, pixels in tqdm(images, "data", total, unit="image", disable=None):
        if isinstance(pixels, Broken):
            why = {"reason": pixels.reason, "detail": pixels.detail}
            broken.append({"split": split, "name": sample.name, **why})
            _check_quarantine(broken, total, data["quarantine_limit"], work)
            continue
        for text in pixels.said:
            complained.append(f"{printable(sample.name)}: {text}")
            print(complained[-1], file=sys.stderr)
        mask = sample.mask if "masks" in fields[split] else None
        boxes = sample.boxes if "boxes" in fields[split] else ()
        writers[split].add(
            sample.name, pixels.encoded, label, pixels.square, mask, boxes, pixels.shape
        )
        tallies[split].add(pixels, label, mask, boxes)
    labels = {split: writer.close() for split, writer in writers.items()}
    write_atomic(out / "quarantine.jsonl", "".join(json.dumps(row) + "\n" for row in broken))
    if not len(labels["train"]):
        why = f" ({len(broken)} cannot be used, first {_shown(broken[0])})" if broken else ""
        raise SourceError(f"data.source: {_name(source)} has no usable image in train{why}")

    facts = {
        "source": _name(source),
        "mode": mode,
        "image_size": data["image_size"],
        "store_size": size,
        "classes": found.classes,
        "ignored": found.ignored,
        "range": span,
        "auto_range": asked,
        "max_pixels": how.max_pixels,
    }
    facts |= gather(facts, labels, tallies, fields, broken, data["normalise"])
    name_duplicates(facts, out)
    told = [_without_place(text, source) for text in found.warnings]
    facts["warnings"] = [*told, *chosen.warnings, *complaints(facts)]
    if complained:
        facts["warnings"].append(
            f"Pillow or libtiff complained {len(complained)} times, first: {complained[0]}"
        )
    write_json(out / "data.json", facts)
    for text in spoken(facts):
        print(f"warning: {text}", file=sys.stderr)
    return summary(facts, total / (time.monotonic() - began))


def _name(source: dict) -> str:
    """The source as the report shows it: without the folders above."""
    argument = source["argument"]
    return source["name"] + (f":{Path(argument).name}" if argument else "")


def _without_place(text: str, source: dict) -> str:
    """A warning as it is kept: without the folders above the source's."""
    argument = source["argument"] or ""
    name = Path(argument).name
    if not name or plugins.module("source", source["name"]).ARGUMENT != "PATH":
        return text
    if text.startswith(f"{argument}: "):
        return name + text.removeprefix(argument)
    return text.replace(argument, name) if "/" in argument.strip("/") else text


def find(data: dict, source: dict) -> Found:
    """Ask the source what it holds. SourceError when a size or a column makes no sense for it."""
    module = plugins.module("source", source["name"])
    if data["store_size"] and data["store_size"] < data["image_size"]:
        raise SourceError(
            f"data.store_size: {data['store_size']} is smaller than data.image_size "
            f"({data['image_size']})"
        )
    for key in ("image_column", "label_column"):
        if data[key] is not None and not getattr(module, "COLUMNS", False):
            raise SourceError(
                f"data.{key}: found {data[key]!r}, but the source {source['name']} has no columns"
            )
    if any((data.get("splits") or {}).values()) and not getattr(module, "NAMED_SPLITS", False):
        raise SourceError(
            f"data.splits: found {data['splits']}, but the source {source['name']} has no names of "
            "splits"
        )
    found = module.read(source["argument"], module.Config(**source["config"]), data)
    if data.get("group") is not None and any(s.groups is None for s in found.splits.values()):
        raise SourceError(
            f"data.group: found {data['group']!r}, but the source {source['name']} has no groups"
        )
    return _without_one_class(found)


def _without_one_class(found: Found) -> Found:
    """A source whose labels are all the same has none: any encoder would get all of them right."""
    used = {label for split in found.splits.values() for label in set(split.labels.tolist())} - {-1}
    if len(used) != 1 or any(split.masks or split.boxes for split in found.splits.values()):
        return found
    (label,) = used
    splits = {
        name: dataclasses.replace(split, labels=np.full_like(split.labels, -1))
        for name, split in found.splits.items()
    }
    text = (
        f"found one class alone ({printable(found.classes[label])!r}), which no task can tell from "
        "another: all images are taken as unlabelled. Where folders below it or another column "
        "have the classes, say so: data.options.class_level, data.label_column"
    )
    return dataclasses.replace(found, splits=splits, classes=[], warnings=[*found.warnings, text])


def _fields(found: Found, parts: dict[str, np.ndarray]) -> dict[str, list[str]]:
    """Split -> those of FIELDS that all images have which go to it; no entry for an empty split."""
    fields = {}
    for k, split in enumerate(SPLITS):
        given = [found.splits[name] for name, part in parts.items() if (part == k).any()]
        if given:
            fields[split] = [field for field in FIELDS if all(getattr(g, field) for g in given)]
    return fields


def auto_range(
    train: Listing, part: np.ndarray, max_pixels: int | None = None
) -> list[float] | None:
    """The 0.1 and 99.9 percentiles of 16-bit or float images of train, by some of their values."""
    rows = np.flatnonzero(part == 0)
    rows = rows[:: max(1, len(rows) // SAMPLED)]
    found: dict[str, list[np.ndarray]] = {}
    for sample in train.read(rows):
        try:
            drawn = isinstance(sample.image, np.ndarray)
            raw = None if drawn else raw_levels(sample.image, max_pixels or MAX_PIXELS)
        except Broken:
            continue
        if raw:
            values = raw[1][np.isfinite(raw[1])]
            found.setdefault(raw[0], []).append(values[:: max(1, values.size // SAMPLED)])
    if len(found) > 1:
        raise SourceError("data.range: auto found 16-bit and float images, expected one kind")
    values = np.concatenate([np.zeros(0), *(v for kind in found.values() for v in kind)])
    if not len(values):
        return None
    low, high = (float(v) for v in np.percentile(values, (0.1, 99.9)))
    return [low, high] if low < high else None


def _images(
    found: Found, parts: dict[str, np.ndarray], size: int, threads: int, how: Range
) -> Iterator[tuple]:
    """(split, label, Sample, Pixels or Broken) of every assigned row, in the source's order."""
    for given, listing in found.splits.items():
        rows = np.flatnonzero(parts[given] >= 0)
        samples = zip(rows.tolist(), listing.read(rows), strict=True)

        def work(item: tuple[int, Sample], listing: Listing = listing) -> tuple:
            row, sample = item
            return row, sample, _prepared(sample, listing, size, how)

        for row, sample, pixels in ordered_map(work, samples, threads if threads > 1 else 0):
            yield SPLITS[parts[given][row]], int(listing.labels[row]), sample, pixels


def _prepared(sample: Sample, listing: Listing, size: int, how: Range) -> Pixels | Broken:
    """The image ready to be stored, or what is wrong with it or its mask."""
    try:
        if sample.problem:
            raise Broken("unreadable", sample.problem)
        pixels = prepare(sample.image, size, how)
        if listing.masks and (sample.mask is None or sample.mask.shape != pixels.shape):
            found = "no mask" if sample.mask is None else f"a mask of shape {sample.mask.shape}"
            raise Broken("wrong mask", f"found {found}, expected shape {pixels.shape}")
        return pixels
    except Broken as error:
        return error


def _shown(row: dict) -> str:
    return f"{printable(row['name'])} ({row['reason']}: {row['detail']})"


def _check_quarantine(broken: list[dict], total: int, limit: float, work: Path) -> None:
    """Stop as soon as it is certain that more than the limit of all images is broken."""
    if len(broken) <= limit * total:
        return
    write_atomic(work / "quarantine.jsonl", "".join(json.dumps(row) + "\n" for row in broken))
    counts = Counter(row["reason"] for row in broken).most_common()
    reasons = ", ".join(f"{n} {reason}" for reason, n in counts)
    first = "; ".join(_shown(row) for row in broken[:3])
    raise SourceError(
        f"data.quarantine_limit: {len(broken)} of {total} images cannot be used ({reasons}), "
        f"allowed are {limit:.1%}. First: {first}. The list is in {work / 'quarantine.jsonl'}. "
        "Repair or remove them, or raise the limit."
    )


if __name__ == "__main__":
    raise SystemExit(main())

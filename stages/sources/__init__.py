"""Sources: where images come from. One file per kind; its name is what `data.source` says before
the colon.

A source has a dataclass `Config` (its own options, `data.options`) and one function:

    read(argument, config, data) -> Found

`argument` is what follows the colon, `data` the data section of the parameters. `read` only lists:
how many images each given split has, their labels and names. Images come one after the other from
`Listing.read(rows)`, so that no source holds more than a few in memory. `assign` then decides, for
all sources alike, which split each image goes to.
"""

from __future__ import annotations

import difflib
import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

SPLITS = ("train", "val", "test")
ALIASES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev", "eval"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}


class SourceError(ValueError):
    """A source that cannot be read as asked; the message names the place, what was found and what
    was expected.
    """

    plain = True  # shown without a traceback


@dataclass(frozen=True)
class Sample:
    """One image as its source has it. `problem` is set instead of `image` when there is nothing to
    decode.
    """

    name: str  # unique inside its source, e.g. "cats/7.jpg": never an absolute path
    image: bytes | np.ndarray  # an encoded file, or (H, W, 3) uint8
    mask: np.ndarray | None = None  # (H, W) uint8, 0 = background, class + 1
    boxes: tuple = ()  # (x, y, w, h, class) in pixels
    problem: str = ""


@dataclass(frozen=True)
class Listing:
    """One split as given: labels (N,) int64 (-1 = none), names for a stable order, and how to read
    chosen rows.
    """

    labels: np.ndarray
    read: Callable[
        [np.ndarray], Iterator[Sample]
    ]  # ascending row numbers -> their samples, in that order
    names: Sequence[str] | None = None
    masks: bool = False
    boxes: bool = False

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Found:
    """What a source holds: its splits among train, val and test, class names, and what was passed
    over.
    """

    splits: dict[str, Listing]
    classes: list[str]
    ignored: dict[str, int] = field(
        default_factory=dict
    )  # kind of file -> how many were not looked at
    warnings: list[str] = field(default_factory=list)


def nearest(word: str, known: Iterable[str]) -> str:
    """'; did you mean ...?' for the most similar known word, or nothing."""
    near = difflib.get_close_matches(str(word), [str(k) for k in known], 1)
    return f"; did you mean {near[0]!r}?" if near else ""


def split_name(text: str) -> str | None:
    """The split that a file or folder name begins with ("validation-00000-of-00001" -> "val"), or
    None.
    """
    head = text.lower().replace("_", "-").replace(".", "-").split("-")[0]
    return ALIASES.get(head)


# Splits: the same rules for every source.


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
        rank = _rank(
            train.labels[by_class]
        )  # first all firsts of their class, then all seconds ...
        parts["train"][by_class[np.argsort(rank, kind="stable")][data["max_train"] :]] = -1
    return Assignment(parts, warnings)


def _order(listing: Listing, seed: int) -> np.ndarray:
    """All rows in a random order that depends on the seed and each row's name alone."""
    names = listing.names if listing.names is not None else range(len(listing))
    digests = (hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest() for name in names)
    return np.argsort(
        np.fromiter((int.from_bytes(d, "big") for d in digests), np.uint64, len(listing)),
        kind="stable",
    )


def _share(rows: np.ndarray, labels: np.ndarray, fraction: float) -> np.ndarray:
    """round(fraction * n) of the n rows, spread evenly over the classes (each within one of its
    share).

    At least one row when there are two or more, and never the only row of a class.
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


# What a table (parquet, hub) needs beyond that: which columns are image and label, and what the
# labels mean.

IMAGE_NAMES = ("image", "img", "images", "picture", "pixel_values", "jpg", "png")
LABEL_NAMES = ("label", "labels", "class", "target", "category", "fine_label", "y")


def find_columns(
    where: str, kinds: dict[str, str], image: str | None, label: str | None
) -> tuple[str, str | None]:
    """Names of the image column and the label column (None = unlabelled).

    kinds: column -> "image" (declared as one), "bytes" (could be one), "class", "int", "string" or
    "other". Named columns must exist; otherwise declared ones are taken, the usual names first.
    Raises SourceError.
    """
    for key, name in (("image_column", image), ("label_column", label)):
        if name is not None and name not in kinds:
            raise SourceError(
                f"data.{key}: {where} has no column {name!r}, found {', '.join(kinds)}{nearest(name, kinds)}"
            )
    if image is None:
        image = _choose(
            where, "image_column", kinds, (("image", None), ("bytes", None)), IMAGE_NAMES
        )
        if image is None:
            listed = ", ".join(f"{name} ({kind})" for name, kind in kinds.items())
            raise SourceError(
                f"{where}: no image column, found {listed or 'no columns'}; name one with data.image_column"
            )
    elif kinds[image] not in ("image", "bytes"):
        raise SourceError(
            f"data.image_column: column {image!r} of {where} holds {kinds[image]}, expected encoded images"
        )
    if label is None:
        wanted = (("class", None), ("int", LABEL_NAMES), ("string", LABEL_NAMES))
        label = _choose(where, "label_column", kinds, wanted, LABEL_NAMES)
    elif kinds[label] not in ("class", "int", "string"):
        raise SourceError(
            f"data.label_column: column {label!r} of {where} holds {kinds[label]}, "
            "expected class names or numbers"
        )
    return image, label


def _choose(where: str, key: str, kinds: dict, wanted: tuple, usual: tuple[str, ...]) -> str | None:
    """The one column of the first wanted kind that occurs; several are an error unless one has a
    usual name.
    """
    for kind, only in wanted:
        found = [
            name
            for name, k in kinds.items()
            if k == kind and (only is None or name.lower() in only)
        ]
        named = sorted(
            (n for n in found if n.lower() in usual), key=lambda n: usual.index(n.lower())
        )
        if named or len(found) == 1:
            return (named or found)[0]
        if found:
            raise SourceError(
                f"{where}: several columns could be meant ({', '.join(found)}); choose one with data.{key}"
            )
    return None


def number_labels(
    where: str, values: dict[str, Sequence], names: Sequence[str] | None
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Raw label values of every split -> (labels (N,) int64 of every split, class names).

    With `names` (HF ClassLabel) values are numbers into them. Otherwise classes are the sorted
    distinct values of train. None and negative numbers mean "no label". Raises SourceError for a
    value that train does not know.
    """
    if names is None:
        distinct = {v for v in values["train"] if _known(v)}
        order = sorted(distinct, key=lambda v: (isinstance(v, str), v))
        names, number = [str(v) for v in order], {v: k for k, v in enumerate(order)}
    else:
        number = {k: k for k in range(len(names))}
    labels = {}
    for split, column in values.items():
        unknown = next((v for v in column if _known(v) and v not in number), None)
        if unknown is not None:
            some = ", ".join(map(str, names[:8])) + (", ..." if len(names) > 8 else "")
            raise SourceError(
                f"{where}: {split} has the label {unknown!r}, which is not among the {len(names)} classes "
                f"of train ({some}){nearest(unknown, names)}"
            )
        labels[split] = np.array([number[v] if _known(v) else -1 for v in column], np.int64)
    return labels, list(names)


def _known(value: object) -> bool:
    return value is not None and (value != "" if isinstance(value, str) else value >= 0)

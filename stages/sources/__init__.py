"""Sources: where images come from. One file per kind; its name is what `data.source` says before
the colon.

A source has a dataclass `Config` (its own options, `data.options`), a function

    read(argument, config, data) -> Found

and literals that say what it is:

    ARGUMENT = "PATH"   what follows the colon: "PATH", a file or folder of the user's; "NAME", a
                        name; None, nothing
    PATHS = ()          settings of Config that name further files of the user's
    NAMED_SPLITS = True where data.splits says which of its names are which split
    COLUMNS = True      where it is a table, in which data.image_column and data.label_column choose

`data` is the entry of the parameters. `read` only lists: how many images each given split has,
their labels and names. Images come one after the other from `Listing.read(rows)`, so that no source
holds more than a few in memory. _splits.py then decides, for all sources alike, which split each
image goes to; _names.py reads the names of splits, _tables.py is for sources that are tables.
What a source finds and does not use is in its warnings, with a number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

ALIASES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev", "eval"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}


class SourceError(ValueError):
    """A source that cannot be read as asked. The message names the place, what was found and what
    was expected.
    """

    plain = True  # shown without a traceback


@dataclass(frozen=True)
class Sample:
    """One image as its source has it.

    name: unique inside its source, such as "cats/7.jpg"; never an absolute path
    image: an encoded file, or (H, W, 3) uint8
    mask: (H, W) uint8 of the image's size: 0 = background, class + 1
    boxes: each (x, y, width, height, class), in the image's pixels
    problem: why there is nothing to decode; "" if there is
    """

    name: str
    image: bytes | np.ndarray
    mask: np.ndarray | None = None
    boxes: tuple = ()
    problem: str = ""


@dataclass(frozen=True)
class Listing:
    """One split as given.

    labels: (N,) int64, -1 = none
    read: ascending row numbers -> their samples, in that order
    names: of all rows, from which a stable order is made; None: the row numbers
    masks, boxes: whether its samples have any
    groups: of all rows, what must not be torn apart (a patient, a camera), None = a group of its
        own; None: no groups
    """

    labels: np.ndarray
    read: Callable[[np.ndarray], Iterator[Sample]]
    names: Sequence[str] | None = None
    masks: bool = False
    boxes: bool = False
    groups: Sequence | None = None

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Found:
    """What a source holds: its splits among train, val and test, and the names of its classes.

    ignored: kind of file -> how many were not looked at
    """

    splits: dict[str, Listing]
    classes: list[str]
    ignored: dict[str, int] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def split_name(text: str) -> str | None:
    """The split that a file or folder name begins with ("validation-00000-of-00001" -> "val"), or
    None.
    """
    head = text.lower().replace("_", "-").replace(".", "-").split("-")[0]
    return ALIASES.get(head)

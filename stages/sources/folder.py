"""`folder:PATH`: images in folders, the layout of torchvision's ImageFolder and of `datasets`'
imagefolder.

    PATH/cats/1.jpg                classes are the folders; splits are made by the data stage
    PATH/train/cats/1.jpg          the folders train, val (valid, validation, dev) and test are the
                                   splits
    PATH/1.jpg, PATH/train/1.jpg   flat: unlabelled

Folders inside a class folder belong to that class. Links may point anywhere. Hidden files and files
that are not images by their extension are passed over and counted; archives are never opened.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from stages.kit.data.decode import EXTENSIONS
from stages.sources import ALIASES, Found, Listing, Sample, SourceError
from workflow.plugins import did_you_mean

ARGUMENT = "PATH"
GIVES = {"labels"}
# A change of any other file makes nothing stale. As EXTENSIONS and _hidden say.
READS = (
    "*.jpg", "*.jpeg", "*.jpe", "*.jfif", "*.png", "*.gif", "*.bmp", "*.dib", "*.tif", "*.tiff",
    "*.webp", "*.ppm", "*.pgm", "*.pbm", "*.pnm", "*.jp2", "*.j2k", "*.avif", "*.mpo",
)  # fmt: skip
SKIPS = (".*", "__MACOSX")


@dataclass(frozen=True)
class Config:
    labels: bool = True  # False: folders mean nothing, every image is unlabelled


def read(argument: str, config: Config, data: dict) -> Found:
    """List the images below `argument`. Raises SourceError for a missing, empty or contradictory
    folder.
    """
    root = Path(argument).expanduser()
    if not argument:
        raise SourceError("data.source: 'folder:' needs a path, e.g. folder:photos")
    if not root.exists():
        siblings = [p.name for p in root.parent.iterdir()] if root.parent.is_dir() else []
        raise SourceError(f"data.source: no folder {argument}{did_you_mean(root.name, siblings)}")
    if not root.is_dir():
        raise SourceError(
            f"data.source: {argument} is a file, expected a folder of images "
            "(archives: unpack them first)"
        )
    ignored: Counter = Counter()
    tops = sorted(p.name for p in root.iterdir() if p.is_dir() and not _hidden(p.name))
    given: dict[str, str] = {}
    for name in tops:
        split = ALIASES.get(name.lower())
        if split in given:
            raise SourceError(
                f"{argument}: folders {given[split]!r} and {name!r} both mean the split {split!r}"
            )
        if split:
            given[split] = name
    if given and "train" not in given:
        raise SourceError(f"{argument}: found {', '.join(given.values())} but no folder 'train'")
    if given:
        others = [name for name in tops if name not in given.values()]
        warnings = (
            [f"{argument}: folders beside the splits are passed over: {', '.join(others)}"]
            if others
            else []
        )
        files = {split: _images(root / name, ignored) for split, name in sorted(given.items())}
        bases = {split: root / name for split, name in given.items()}
    else:
        warnings, files, bases = [], {"train": _images(root, ignored)}, {"train": root}
    if not files["train"]:
        found = ", ".join(f"{n} {kind}" for kind, n in sorted(ignored.items())) or "nothing"
        raise SourceError(
            f"{argument}: no images{' in train' if given else ''}, found {found}; "
            f"expected files like {', '.join(sorted(EXTENSIONS)[:6])} ..."
        )

    labelled = config.labels and any("/" in name for name in files["train"])
    classes = (
        sorted({name.split("/")[0] for name in files["train"] if "/" in name}) if labelled else []
    )
    splits = {}
    for split, names in files.items():
        if labelled and (split == "train" or any("/" in name for name in names)):
            loose = [name for name in names if "/" not in name]
            ignored["image outside a class folder"] += len(loose)
            names = [name for name in names if "/" in name]
            number = {name: k for k, name in enumerate(classes)}
            unknown = sorted({name.split("/")[0] for name in names} - set(classes))
            if unknown:
                raise SourceError(
                    f"{argument}: {split} has the class {unknown[0]!r}, which train has not"
                    + did_you_mean(unknown[0], classes)
                )
            labels = np.array([number[name.split("/")[0]] for name in names], np.int64)
        else:
            labels = np.full(len(names), -1, np.int64)
        if names:
            splits[split] = Listing(labels, _reader(bases[split], names), names)
        else:
            warnings.append(f"{argument}: the folder of split {split!r} has no images")
    return Found(splits, classes, {kind: n for kind, n in sorted(ignored.items()) if n}, warnings)


def _images(base: Path, ignored: Counter) -> list[str]:
    """Relative names (with /) of all images below `base`, sorted. Every folder is entered once, so
    that loops of links end.
    """
    names, seen = [], set()
    for folder, folders, files in os.walk(base, followlinks=True):
        here = os.stat(folder)
        if (here.st_dev, here.st_ino) in seen:
            folders.clear()
            continue
        seen.add((here.st_dev, here.st_ino))
        folders[:] = sorted(name for name in folders if not _hidden(name))
        relative = os.path.relpath(folder, base).replace(os.sep, "/")
        for name in sorted(files):
            suffix = os.path.splitext(name)[1].lower()
            if _hidden(name):
                ignored["hidden"] += 1
            elif suffix not in EXTENSIONS:
                ignored[suffix or "no extension"] += 1
            else:
                names.append(name if relative == "." else f"{relative}/{name}")
    return sorted(names)


def _hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _reader(base: Path, names: list[str]):
    def samples(rows: np.ndarray) -> Iterator[Sample]:
        for row in rows:
            try:
                yield Sample(names[row], (base / names[row]).read_bytes())
            except OSError as error:  # a dead link, no permission
                yield Sample(names[row], b"", problem=error.strerror or type(error).__name__)

    return samples

"""`folder:PATH`: images in folders, the layout of torchvision's ImageFolder and of `datasets`'
imagefolder.

    PATH/cats/1.jpg                classes are the folders; splits are made by the data stage
    PATH/train/cats/1.jpg          the folders train, val (valid, validation, dev) and test are the
                                   splits; _names.py reads other spellings
    PATH/1.jpg, PATH/train/1.jpg   flat: unlabelled

Folders inside a class folder belong to that class. Links may point anywhere. Hidden files, folders
that systems and photo managers make, and files that are not images by their extension are passed
over and counted; archives are never opened. A warning says what was left out.
"""

from __future__ import annotations

import os
import re
import stat
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import translate
from pathlib import Path

import numpy as np

from stages.kit.data.decode import EXTENSIONS
from stages.sources import ALIASES, Found, Listing, Sample, SourceError
from stages.sources._names import folders, numbered, printable, some, stored
from stages.sources._tables import one_form
from workflow.plugins import did_you_mean

ARGUMENT = "PATH"
GIVES = {"labels"}
NAMED_SPLITS = True
# A change of any other file makes nothing stale: the patterns of EXTENSIONS.
READS = (
    "*.jpg", "*.jpeg", "*.jpe", "*.jfif", "*.png", "*.gif", "*.bmp", "*.dib", "*.tif", "*.tiff",
    "*.webp", "*.ppm", "*.pgm", "*.pbm", "*.pnm", "*.jp2", "*.j2k", "*.avif", "*.mpo",
)  # fmt: skip
# What is no data, whatever its case: bins, thumbnails and metadata of other systems.
SKIPS = (
    ".*", "__MACOSX", "@eaDir", "#recycle", "@Recycle", "$RECYCLE.BIN", "RECYCLER", "RECYCLED",
    "System Volume Information", "lost+found", "#snapshot", "~snapshot", "@tmp", "@sharebin",
    "__pycache__", "found.000", "$Extend", "Network Trash Folder", "Temporary Items", "*.lrdata",
    "*.lrcat-data", "*.photoslibrary", "*.photolibrary", "*.migratedphotolibrary", "*.aplibrary",
    "*.cocatalogdb", "@__thumb", "@SynoEAStream", "@SynoResource", "#SynoRecycle", "@sharesnap",
    "@Recently-Snapshot", "_gsdata_", "$WINDOWS.~BT", "WindowsImageBackup", "THMBNL",
)  # fmt: skip
SKIPPED = re.compile("|".join(map(translate, SKIPS)), re.IGNORECASE)
# What programs call their small copies and people their classes: read, with a warning.
COPIES = re.compile(r"(eh)?thumb(nail)?s?|previews?|trash|cache|backup", re.IGNORECASE)
# Files that nobody takes for images; of all others that are not read there is a warning.
LISTS = {".csv", ".tsv", ".jsonl"}  # where images have no labels, these may be meant to give them
PLAIN = {".txt", ".md", ".rst", ".json", ".xml", ".yaml", ".yml", ".html"}
PLAIN |= {".log", ".py", ".ini", ".db", ".xmp", ".pdf", ".toml", ".sh", ".ipynb", ".cfg", ".url"}
HIDDEN, OUTSIDE = "hidden", "image outside a class folder"


@dataclass(frozen=True)
class Config:
    labels: bool = True  # False: folders mean nothing, every image is unlabelled
    class_level: int = 1  # which folders are the classes: 2 for PATH/PATIENT/CLASS/1.jpg
    splits: bool = True  # False: folders called train or test are classes like any other


@dataclass
class _Part:
    """The images of one split. names: below `base`; top: which part of a name is the first folder
    below the split; depth: which one is its class.
    """

    base: Path
    top: int
    depth: int
    names: list[str]
    bare: tuple[str, ...] = ()  # beginnings of names that are unlabelled whatever their folders

    def label(self, name: str) -> str | None:
        """The name of an image's class; None for one outside of a class folder."""
        parts = name.split("/")
        return parts[self.depth] if len(parts) > self.depth + 1 else None


def read(argument: str, config: Config, data: dict) -> Found:
    """List the images below `argument`. Raises SourceError for a missing, empty or contradictory
    folder.
    """
    root = _root(argument)
    if config.class_level < 1:
        raise SourceError(
            f"data.options.class_level: found {config.class_level}, expected the level of a folder "
            "from 1"
        )
    ignored: Counter = Counter()
    wanted, warnings = data.get("splits"), []
    roles: dict[str, list[str]] = {}
    others: list[str] = []
    if config.splits:
        tops = _tops(root)
        roles, others, warnings = folders(argument, tops, lambda top: _holds(root / top), wanted)
    elif wanted:
        raise SourceError("data.splits: found beside data.options.splits: false, expected one")
    skipped, bare = roles.get("ignore", []), roles.get("unlabelled", [])
    if "train" in roles:
        parts = _given(argument, root, roles, ignored, config.class_level - 1)
        warnings += _beside(argument, root, others)
    else:
        if config.splits and config.labels:
            _look_below(argument, root)
        names = _images(argument, root, root, ignored, warnings)
        out = tuple(f"{top}/" for top in skipped)
        names = [name for name in names if not (out and name.startswith(out))]
        depth = config.class_level - 1
        parts = {"train": _Part(root, 0, depth, names, tuple(f"{top}/" for top in bare))}
    if skipped:
        listed = _counted(argument, root, skipped)
        warnings.append(f"{argument}: left out by data.splits.ignore: {listed}")
    if not parts["train"].names:
        found = ", ".join(f"{n} {kind}" for kind, n in sorted(ignored.items())) or "nothing"
        raise SourceError(
            f"{argument}: no images{' in train' if 'train' in roles else ''}, found {found}; "
            f"expected files like {', '.join(sorted(EXTENSIONS)[:6])} ..."
        )
    splits, classes = _labelled(argument, parts, config, data.get("group"), ignored, warnings)
    known = PLAIN | {HIDDEN, OUTSIDE} | (LISTS if classes or not config.labels else set())
    kinds = {kind: n for kind, n in ignored.items() if kind not in known and n}
    if kinds:
        listed = ", ".join(f"{n} {printable(kind)}" for kind, n in sorted(kinds.items()))
        warnings.append(f"{argument}: files that are not read as images: {listed}")
    return Found(splits, classes, {kind: n for kind, n in sorted(ignored.items()) if n}, warnings)


def _root(argument: str) -> Path:
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
    return root


def _tops(root: Path) -> list[str]:
    try:
        with os.scandir(root) as entries:
            return sorted(e.name for e in entries if not _hidden(e.name) and _is_folder(e))
    except OSError as error:
        raise _unreadable(root, error) from None


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a loop of links
        return False


def _unreadable(root: Path, error: OSError) -> SourceError:
    return SourceError(
        f"data.source: the folder {printable(str(error.filename or root))} cannot be read "
        f"({error.strerror}); make it readable, or take it away"
    )


def _given(
    argument: str, root: Path, roles: dict, ignored: Counter, depth: int
) -> dict[str, _Part]:
    """The images of each given split; `depth`: of class folders below it."""
    parts: dict[str, _Part] = {}
    for split in [role for role in sorted(roles) if role in ALIASES.values()]:
        tops = roles[split] + (roles.get("unlabelled", []) if split == "train" else [])
        lists = {top: _images(argument, root / top, root / top, ignored, []) for top in tops}
        if len(tops) == 1:
            parts[split] = _Part(root / tops[0], 0, depth, lists[tops[0]])
        else:
            names = sorted(f"{top}/{name}" for top, found in lists.items() for name in found)
            bare = tuple(f"{top}/" for top in tops if top not in roles[split])
            parts[split] = _Part(root, 1, 1 + depth, names, bare)
    return parts


def _beside(argument: str, root: Path, others: list[str]) -> list[str]:
    """Warnings about images that are in no split."""
    warnings = []
    with os.scandir(root) as entries:
        loose = sum(_image_name(entry.name) and not _is_folder(entry) for entry in entries)
    if loose:
        warnings.append(f"{argument}: {loose} images beside the folders of the splits are not used")
    if others:
        listed = _counted(argument, root, others)
        warnings.append(
            f"{argument}: folders beside the splits are passed over: {listed}; data.splits can "
            "name them"
        )
    return warnings


def _counted(argument: str, root: Path, tops: list[str]) -> str:
    found = [len(_images(argument, root / top, root / top, Counter(), [])) for top in tops]
    return some(f"{top} ({n} images)" for top, n in zip(tops, found, strict=True))


def _look_below(argument: str, root: Path) -> None:
    """SourceError where splits lie one level below the top, inside classes or a single folder."""
    tops = _tops(root)
    for top in tops[:1000]:
        below = {ALIASES[n.lower()]: n for n in _tops(root / top) if n.lower() in ALIASES}
        if "train" in below and len(below) > 1 and _holds(root / top / below["train"]):
            found = (
                f"{argument}: folders {some(below.values())} in {printable(top)} look like splits"
            )
            if len([t for t in tops if _holds(root / t)]) == 1:
                raise SourceError(
                    f"{found}, expected them at the top: data.source: "
                    f"folder:{argument.rstrip('/')}/{printable(top)}"
                )
            raise SourceError(
                f"{found}, expected them above the classes, as in train/{printable(top)}; or "
                "data.options.splits: false where they are none"
            )


def _labelled(
    argument: str, parts: dict[str, _Part], config: Config, group, ignored: Counter, warnings: list
) -> tuple[dict[str, Listing], list[str]]:
    """The splits with labels, and the classes; what has no label is counted."""
    train = parts["train"]
    inside = Counter(
        label for name in train.names if (label := train.label(name)) and not _bare(train, name)
    )
    labelled = config.labels and bool(inside)
    loose = sum(train.label(name) is None and not _bare(train, name) for name in train.names)
    if labelled and loose and len(inside) == 1:
        warnings.append(
            f"{argument}: {loose} images lie beside the one folder {printable(next(iter(inside)))} "
            f"with {inside.total()}, which makes no classes: all are taken as unlabelled"
        )
        labelled = False
    if labelled and loose >= inside.total():
        raise SourceError(
            f"{argument}: found {loose} images outside of class folders and {inside.total()} in "
            f"{len(inside)} folders ({some(sorted(inside))}); expected all in class folders, or "
            "data.options.labels: false, which takes all as unlabelled"
        )
    form, notes = one_form(
        sorted(inside) if labelled else [],
        [label for part in parts.values() for name in part.names if (label := part.label(name))],
    )
    warnings += [f"{argument}: {note}" for note in notes]
    classes = sorted({form[name] for name in inside}) if labelled else []
    if labelled and train.top == train.depth == 0:
        empty = [top for top in _tops(train.base) if top not in inside and not _skipped(train, top)]
        if empty:
            warnings.append(f"{argument}: folders without an image are no classes: {some(empty)}")
    if numbered(classes):
        warnings.append(
            f"{argument}: the folders {some(classes)} are read as classes; "
            "data.options.labels: false takes all images as unlabelled"
        )
    if copies := [name for name in classes if COPIES.fullmatch(name)]:
        warnings.append(
            f"{argument}: the folders {some(copies)} are read as classes, although programs make "
            f"such; data.splits: {{ignore: [{copies[0]}]}} leaves them out"
        )
    number = {raw: classes.index(name) for raw, name in form.items() if name in set(classes)}
    if labelled and group == config.class_level:
        raise SourceError(
            f"data.group: found {group}, the level of the classes, expected that of other folders, "
            "such as 2 for PATH/CLASS/GROUP/1.jpg, or data.options.class_level: 2 for "
            "PATH/GROUP/CLASS/1.jpg"
        )
    splits, out = {}, 0
    for split, part in parts.items():
        names = part.names
        if labelled and (split == "train" or any(part.label(name) for name in names)):
            names = [name for name in names if part.label(name) or _bare(part, name)]
            ignored[OUTSIDE] += len(part.names) - len(names)
            out += len(part.names) - len(names)
            unknown = sorted({part.label(n) for n in names if not _bare(part, n)} - set(number))
            if unknown:
                raise SourceError(
                    f"{argument}: {split} has the class {printable(unknown[0])!r}, which train has "
                    f"not{did_you_mean(unknown[0], classes)}"
                )
            labels = np.array(
                [-1 if _bare(part, name) else number[part.label(name)] for name in names], np.int64
            )
        else:
            labels = np.full(len(names), -1, np.int64)
        if names:
            shown = [stored(name) for name in names]
            groups = _groups(argument, part, names, group) if group is not None else None
            splits[split] = Listing(labels, _reader(part.base, names), shown, groups=groups)
        else:
            warnings.append(f"{argument}: the folder of split {split!r} has no images")
    if out:
        warnings.append(
            f"{argument}: {out} images outside of class folders are not used "
            "(data.options.labels: false takes all images as unlabelled)"
        )
    return splits, [stored(name) for name in classes]


def _skipped(part: _Part, top: str) -> bool:
    """Whether a folder at the top of a split holds images after all, which `inside` does not."""
    return _holds(part.base / top)


def _bare(part: _Part, name: str) -> bool:
    return bool(part.bare) and name.startswith(part.bare)


def _groups(argument: str, part: _Part, names: list[str], level) -> list[str]:
    """The folder at `level` of each image: 1 is the class folder, or the first below the split."""
    if not isinstance(level, int):
        raise SourceError(
            f"data.group: found {level!r}, expected the level of a folder, such as 2 for "
            "PATH/CLASS/GROUP/1.jpg (a column is for tables)"
        )
    at = part.top + level - 1
    shallow = [name for name in names if name.count("/") <= at]
    if shallow:
        raise SourceError(
            f"data.group: {argument} has {len(shallow)} images without a folder at level {level}, "
            f"found {some(shallow[:1])}"
        )
    return [stored(name.split("/")[at]) for name in names]


def _images(
    argument: str, base: Path, top: Path, ignored: Counter, warnings: list[str]
) -> list[str]:
    """Relative names (with /) of all images below `base`, sorted. Every folder is entered once, so
    that loops of links end; `warnings` get those that two links show.
    """

    def failed(error: OSError) -> None:
        raise _unreadable(base, error)

    names, seen = [], {}
    for folder, below, files in os.walk(base, onerror=failed, followlinks=True):
        here = os.stat(folder)
        relative = os.path.relpath(folder, base).replace(os.sep, "/")
        first = seen.setdefault((here.st_dev, here.st_ino), relative)
        if first != relative:
            below.clear()
            if first != "." and not relative.startswith(f"{first}/"):
                warnings.append(
                    f"{argument}: {printable(relative)} is the folder {printable(first)} again, "
                    "through a link: read once"
                )
            continue
        below[:] = sorted(name for name in below if not _hidden(name))
        for name in sorted(files):
            suffix = os.path.splitext(name)[1].lower()
            if _hidden(name):
                ignored[HIDDEN] += 1
            elif suffix not in EXTENSIONS:
                ignored[stored(suffix) or "no extension"] += 1
            else:
                names.append(name if relative == "." else f"{relative}/{name}")
    return sorted(names)


def _holds(base: Path) -> bool:
    """Whether there is an image below a folder."""
    seen = set()
    for folder, below, files in os.walk(base, followlinks=True):
        here = os.stat(folder)
        if (here.st_dev, here.st_ino) in seen:
            below.clear()
            continue
        seen.add((here.st_dev, here.st_ino))
        below[:] = [name for name in below if not _hidden(name)]
        if any(_image_name(name) for name in files):
            return True
    return False


def _image_name(name: str) -> bool:
    return not _hidden(name) and os.path.splitext(name)[1].lower() in EXTENSIONS


def _hidden(name: str) -> bool:
    return SKIPPED.match(name) is not None


def _reader(base: Path, names: list[str]):
    def samples(rows: np.ndarray) -> Iterator[Sample]:
        for row in rows:
            path, name = base / names[row], stored(names[row])
            try:
                if not stat.S_ISREG(path.stat().st_mode):  # a pipe would be waited for
                    yield Sample(name, b"", problem="no regular file")
                else:
                    yield Sample(name, path.read_bytes())
            except OSError as error:  # a dead link, no permission
                yield Sample(name, b"", problem=error.strerror or type(error).__name__)

    return samples

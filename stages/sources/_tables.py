"""What sources that are tables need: which columns are image and label, and what labels mean."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from stages.kit.data.store import SPLITS
from stages.sources import ALIASES, Found, Listing, SourceError
from stages.sources._names import mapped, printable, some
from workflow.plugins import did_you_mean

IMAGE_NAMES = ("image", "img", "images", "picture", "pixel_values", "jpg", "png")
LABEL_NAMES = ("label", "labels", "class", "target", "category", "fine_label", "y")
LABEL_KINDS = ("class", "int", "string", "bool", "float", "bytes")  # the likeliest first
SPLIT_NAMES = ("split", "splits", "subset", "partition", "set", "fold", "usage")
# Columns that nobody takes for labels.
NO_LABELS = ("id", "ids", "idx", "index", "path", "file", "file_name", "filename", "name", "width")
NO_LABELS += ("height", "url", "caption", "text", "md5", "sha1", "sha256", "key", "__key__")


def find_columns(
    where: str, kinds: dict[str, str], image: str | None, label: str | None
) -> tuple[str, str | None]:
    """Names of the image column and the label column (None = unlabelled).

    kinds: column -> "image" (declared as one), "bytes" or "list of bytes" (could be one), "class",
    "int", "string", "bool", "float", or the name of a type that is neither. Named columns must
    exist; otherwise declared ones are taken, the usual names first. Raises SourceError.
    """
    for key, name in (("image_column", image), ("label_column", label)):
        if name is not None and name not in kinds:
            raise SourceError(
                f"data.{key}: {where} has no column {name!r}, found {', '.join(kinds)}"
                f"{did_you_mean(name, kinds)}"
            )
    if image is None:
        wanted = (("image", None), ("bytes", None), ("list of bytes", IMAGE_NAMES))
        image = _choose(where, "image_column", kinds, wanted, IMAGE_NAMES)
        if image is None:
            listed = ", ".join(f"{name} ({kind})" for name, kind in kinds.items())
            raise SourceError(
                f"{where}: no image column, found {listed or 'no columns'}; "
                "name one with data.image_column"
            )
    elif kinds[image] not in ("image", "bytes", "list of bytes"):
        raise SourceError(
            f"data.image_column: column {image!r} of {where} holds {kinds[image]}, "
            "expected encoded images"
        )
    if label is None:
        wanted = (("class", None), *((kind, LABEL_NAMES) for kind in LABEL_KINDS[1:]))
        others = {name: kind for name, kind in kinds.items() if name != image}
        label = _choose(where, "label_column", others, wanted, LABEL_NAMES)
    elif kinds[label] not in LABEL_KINDS:
        raise SourceError(
            f"data.label_column: column {label!r} of {where} holds {kinds[label]}, "
            "expected class names or numbers"
        )
    return image, label


def _choose(where: str, key: str, kinds: dict, wanted: tuple, usual: tuple[str, ...]) -> str | None:
    """The one column of the first wanted kind that occurs. Several are an error unless one has a
    usual name.
    """
    for kind, only in wanted:
        found = [n for n, k in kinds.items() if k == kind and (only is None or n.lower() in only)]
        named = [n for n in found if n.lower() in usual]
        if named:
            return min(named, key=lambda n: usual.index(n.lower()))
        if len(found) == 1:
            return found[0]
        if found:
            raise SourceError(
                f"{where}: several columns could be meant ({', '.join(found)}); "
                f"choose one with data.{key}"
            )
    return None


def split_column(
    where: str, kinds: dict[str, str], asked: str | None, given: list[str], taken: tuple
) -> str | None:
    """The column that says of each row which split it is: the one asked for, or a string column
    with a usual name in a table that has no other splits. None if there is none.
    """
    if asked is None:
        usual = [n for n, k in kinds.items() if k == "string" and n.lower() in SPLIT_NAMES]
        usual = [name for name in usual if name not in taken]
        return usual[0] if usual and given == ["train"] else None
    if asked not in kinds:
        raise SourceError(
            f"data.options.split_column: {where} has no column {asked!r}, found "
            f"{', '.join(kinds)}{did_you_mean(asked, kinds)}"
        )
    if given != ["train"]:
        raise SourceError(
            f"data.options.split_column: found {asked!r}, but {where} gives splits by names "
            f"({', '.join(given)}), expected one of the two"
        )
    return asked


def by_column(
    where: str, found: Found, column: str, said: list, wanted: dict | None, asked: str | None
) -> Found:
    """The rows of train in the splits that a column says. Where nobody asked for the column, only
    if its values are known names of splits, train among them.
    """
    values = sorted({str(v) for v in said if v is not None})
    roles = {v: ALIASES[v.lower()] for v in values if v.lower() in ALIASES}
    if asked is None:
        if len(roles) < len(values) or "train" not in roles.values() or len(values) < 2:
            return found
        text = f"{where}: column {column!r} says which split a row is: {some(values)}"
        found.warnings.append(text)
    else:
        roles |= mapped(where, f"value of {column!r}", {v: {v} for v in values}, wanted)
    unknown = [value for value in values if value not in roles]
    if unknown or any(value is None for value in said):
        raise SourceError(
            f"{where}: column {column!r} says {some(unknown) or 'null'} for some rows, expected "
            "train, val or test; data.splits says what others are, such as {ignore: [...]}"
        )
    whole, part = found.splits["train"], np.array([roles[str(value)] for value in said])
    splits, warnings = {}, list(found.warnings)
    for split in SPLITS:
        rows = np.flatnonzero((part == split) | ((part == "unlabelled") & (split == "train")))
        if len(rows):
            splits[split] = _rows(whole, rows, part[rows] == "unlabelled")
    if "train" not in splits:
        raise SourceError(f"{where}: column {column!r} says {some(values)}, expected train too")
    if left := int((part == "ignore").sum()):
        warnings.append(f"{where}: {left} rows are left out by data.splits.ignore")
    return Found(splits, found.classes, found.ignored, warnings)


def _rows(whole: Listing, rows: np.ndarray, bare: np.ndarray) -> Listing:
    """Some rows of a listing; `bare`: those that lose their labels."""
    return Listing(
        np.where(bare, -1, whole.labels[rows]),
        lambda chosen: whole.read(rows[chosen]),
        groups=None if whole.groups is None else [whole.groups[row] for row in rows.tolist()],
    )


def unused_labels(where: str, kinds: dict[str, str], image: str) -> list[str]:
    """What to say of a table that is read without labels: columns that could be meant."""
    odd = {n: k for n, k in kinds.items() if n != image and n.lower() in LABEL_NAMES}
    if odd:
        listed = ", ".join(f"{name!r} holds {kind}" for name, kind in odd.items())
        return [
            f"{where}: column {listed}, expected class names or numbers: all images are taken as "
            "unlabelled (data.label_column names another)"
        ]
    could = [
        n
        for n, k in kinds.items()
        if n != image and k in LABEL_KINDS[:4] and n.lower() not in NO_LABELS and n[:2] != "__"
    ]
    if could:
        return [
            f"{where}: no column is taken for labels, found {some(could)}: all images are "
            "unlabelled (data.label_column names one)"
        ]
    return []


def no_labels(where: str, column: str | None, labels: dict[str, np.ndarray]) -> list[str]:
    """What to say of a label column that gives no image a label."""
    if column is None or any((part >= 0).any() for part in labels.values()):
        return []
    return [f"{where}: column {column!r} gives no image a label: all are taken as unlabelled"]


def plain_labels(
    where: str, column: str, values: dict[str, Sequence], asked: bool
) -> tuple[dict[str, Sequence], list[str]]:
    """Values as names or whole numbers, None for none; and a warning where they are no classes.

    Fractions are no classes: an error if the column was `asked` for, otherwise all are None.
    """
    found: dict[str, list] = {}
    for split, raw in values.items():
        memo: dict = {}
        found[split] = []
        for value in raw:
            if value not in memo:
                memo[value] = _plain(value)
            found[split].append(memo[value])
    fraction = next((v for c in found.values() for v in c if isinstance(v, float)), None)
    if fraction is None:
        return found, []
    text = (
        f"column {column!r} of {where} holds numbers such as {fraction:g}, expected class names or "
        "whole numbers"
    )
    if asked:
        raise SourceError(f"data.label_column: {text}")
    bare = {split: [None] * len(column) for split, column in found.items()}
    return bare, [f"{text}: all images are taken as unlabelled"]


def _plain(value: object) -> object:
    if isinstance(value, bytes):
        return value.decode("utf-8", "backslashreplace")
    if value is None or isinstance(value, (int, str)):
        return value
    number = float(value)  # a float or a decimal; NaN is how pandas writes none
    if number != number:
        return None
    return int(number) if number.is_integer() else number


def number_labels(
    where: str,
    values: dict[str, Sequence],
    names: Sequence[str] | None,
    warnings: list[str] | None = None,
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Raw label values of every split -> (labels (N,) int64 of every split, class names).

    With `names` (HF ClassLabel) values are numbers into them. Otherwise classes are the sorted
    distinct values of train; `warnings` get what is odd about them. None and negative numbers mean
    "no label". Raises SourceError for a value that train does not know.
    """
    if names is None:
        distinct = {v for v in values["train"] if _known(v)}
        kinds = {isinstance(v, str) for v in distinct}
        if len(kinds) > 1:
            raise SourceError(
                f"{where}: found labels that are numbers and labels that are words "
                f"({some(sorted(map(str, distinct)))}), expected one of the two in all files"
            )
        form = {v: v for column in values.values() for v in column if _known(v)}
        if True in kinds:
            form, notes = one_form(distinct, form)
            if warnings is not None:
                warnings += [f"{where}: {note}" for note in notes]
        order = sorted({form[v] for v in distinct})
        names, place = [str(v) for v in order], {v: k for k, v in enumerate(order)}
        number = {raw: place[name] for raw, name in form.items() if name in place}
    else:
        number = {k: k for k in range(len(names))}
    labels: dict[str, np.ndarray] = {}
    for split, column in values.items():
        unknown = next((v for v in column if _known(v) and v not in number), None)
        if unknown is not None:
            few = ", ".join(map(str, names[:8])) + (", ..." if len(names) > 8 else "")
            raise SourceError(
                f"{where}: {split} has the label {unknown!r}, which is not among the {len(names)} "
                f"classes of train ({few}){did_you_mean(unknown, names)}"
            )
        labels[split] = np.array([number[v] if _known(v) else -1 for v in column], np.int64)
    return labels, list(names)


def _known(value: object) -> bool:
    return value is not None and (value != "" if isinstance(value, str) else value >= 0)


def one_form(train: Iterable[str], every: Iterable[str]) -> tuple[dict[str, str], list[str]]:
    """({name: the form it gets}, what to say of it): names that differ only in their Unicode form
    become one, in form NFC. A name that has one form keeps it.
    """
    forms: dict[str, set[str]] = {}
    for name in {*train, *every}:
        forms.setdefault(unicodedata.normalize("NFC", name), set()).add(name)
    notes = [
        f"{len(raw)} spellings of the class {printable(name)!r} differ only in their Unicode form: "
        "read as one"
        for name, raw in sorted(forms.items())
        if len(raw) > 1
    ]
    alike = Counter(" ".join(name.casefold().split()) for name in forms)
    for word in sorted(word for word, n in alike.items() if n > 1):
        names = [n for n in sorted(forms) if " ".join(n.casefold().split()) == word]
        notes.append(f"the classes {some(names)} differ only in case or spaces: read as several")
    return {n: (nfc if len(raw) > 1 else n) for nfc, raw in forms.items() for n in raw}, notes

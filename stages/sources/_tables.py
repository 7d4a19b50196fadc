"""What sources that are tables need: which columns are image and label, and what labels mean."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from stages.sources import SourceError
from stages.sources._names import printable, some
from workflow.plugins import did_you_mean

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
                f"data.{key}: {where} has no column {name!r}, found {', '.join(kinds)}"
                f"{did_you_mean(name, kinds)}"
            )
    if image is None:
        image = _choose(
            where, "image_column", kinds, (("image", None), ("bytes", None)), IMAGE_NAMES
        )
        if image is None:
            listed = ", ".join(f"{name} ({kind})" for name, kind in kinds.items())
            raise SourceError(
                f"{where}: no image column, found {listed or 'no columns'}; "
                "name one with data.image_column"
            )
    elif kinds[image] not in ("image", "bytes"):
        raise SourceError(
            f"data.image_column: column {image!r} of {where} holds {kinds[image]}, "
            "expected encoded images"
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
                f"{where}: {split} has the label {unknown!r}, which is not among the {len(names)} "
                f"classes of train ({some}){did_you_mean(unknown, names)}"
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

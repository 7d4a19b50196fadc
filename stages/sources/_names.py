"""What names of folders, files and given splits say: which split each is, however it is spelt.

A split's name may stand alone (train, valid, testing), with a suffix (train2017, val.X), at the end
or in the middle (birds_train, birds-test-00000-of-00001). `data.splits` says it for names that mean
something else. Where names can be read in two ways, nothing is guessed: that is a SourceError.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase

from stages.sources import ALIASES, SourceError, split_name
from workflow.messages import did_you_mean

ROLES = ("train", "val", "test", "unlabelled", "ignore")
UNCLEAR = "?"  # the role of a name that holds two splits, such as trainval
LOOSE = ALIASES | {"evaluation": "val", "development": "val", "tests": "test"}
MEDICAL = {"imagestr": "train", "imagests": "test"}  # of the Medical Segmentation Decathlon
SUFFIXES = ("set", "sets", "data", "split", "images", "imgs", "img")
# Words that count folders rather than name what is in them; `canon` is of cameras.
PARTS = ("part", "fold", "batch", "chunk", "shard", "folder", "dir", "subset", "canon", "split")
SHOWN = 8  # names in a message


def printable(name: str) -> str:
    """A name as it can be shown and stored as UTF-8: other bytes and control characters escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in stored(name))


def stored(name: str) -> str:
    """A name of the file system as text: bytes that are no UTF-8 are escaped, such as k\\xe4fer."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def some(names: Iterable[str]) -> str:
    """The first few of the names, and how many more there are."""
    names = [printable(name) for name in names]
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def guess(name: str) -> str | None:
    """The split that stands anywhere in a name, UNCLEAR for several, None for none."""
    found = {MEDICAL[name.lower()]} if name.lower() in MEDICAL else set()
    for word in _words(name):
        split = LOOSE.get(word) or next(
            (LOOSE[word.removesuffix(s)] for s in SUFFIXES if word.removesuffix(s) in LOOSE), None
        )
        if split:
            found.add(split)
        elif _two(word):
            found.add(UNCLEAR)
    return None if not found else found.pop() if len(found) == 1 else UNCLEAR


def _words(name: str) -> list[str]:
    """Its words and numbers in lower case: "birdsTrain2017" -> birds, train, 2017."""
    apart = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)
    return [word.lower() for word in re.findall(r"[^\W\d_]+|\d+", apart)]


def _two(word: str) -> bool:
    """Whether a word is made of two splits, such as trainval."""
    return any(word[:k] in ALIASES and word[k:] in ALIASES for k in range(3, len(word) - 2))


def mapped(where: str, what: str, names: dict[str, set[str]], wanted: dict | None) -> dict:
    """{name: role} by `data.splits`. names: each with all that it may be called there.

    SourceError for a name that there is not, or that has two roles.
    """
    found: dict[str, str] = {}
    for role in ROLES:
        given = (wanted or {}).get(role) or []
        for pattern in [given] if isinstance(given, str) else given:
            hits = [
                n for n, called in names.items() if any(fnmatchcase(c, pattern) for c in called)
            ]
            if not hits:
                raise SourceError(
                    f"data.splits.{role}: {where} has no {what} {pattern!r}, found {some(names)}"
                    f"{did_you_mean(pattern, set().union(*names.values()))}"
                )
            for name in hits:
                if found.setdefault(name, role) != role:
                    raise SourceError(
                        f"data.splits: found {printable(name)!r} as {found[name]} and as {role}, "
                        "expected one of the two"
                    )
    return found


def folders(
    where: str, tops: list[str], holds: Callable[[str], bool], wanted: dict | None
) -> tuple[dict[str, list[str]], list[str], list[str]]:
    """({role: folders}, folders that are none of them, warnings). Without the role train
    the folders are no splits.

    tops: the folders at the top; holds: whether there is an image in one; wanted: `data.splits`.
    """
    chosen = mapped(where, "folder", {top: {top, stored(top)} for top in tops}, wanted)
    rest = [top for top in tops if top not in chosen]
    exact = {top: ALIASES[top.lower()] for top in rest if top.lower() in ALIASES}
    guesses = {top: guess(top) for top in rest if top not in exact}
    like = {top: split for top, split in guesses.items() if split and holds(top)}
    other = [top for top, split in guesses.items() if not split and holds(top)]
    splits = set(exact.values()) | set(chosen.values()) - {"unlabelled", "ignore"}
    said = set(like.values())
    if not splits:
        if not _are_splits(like, other):
            if "train" in said and len(said) > 1 or not other and len(said) > 1:
                raise SourceError(_unclear(where, like, other))
            return _by_role(tops, chosen), [], []
        exact = like
    elif "train" in splits and not chosen:
        if like:
            raise SourceError(_unclear(where, exact | like, other))
        if splits == {"train"} and other:
            raise SourceError(
                f"{where}: found a folder 'train' beside {some(other)}, which may be a split or a "
                "class; expected data.options.splits: false where it is a class, or "
                "data.splits: {ignore: [...]} with the folders to leave out"
            )
    else:
        exact = exact | like
        if UNCLEAR in said:
            raise SourceError(_unclear(where, exact, other))
    roles = _by_role(tops, exact | chosen)
    auto = {role: [n for n in names if n not in chosen] for role, names in roles.items()}
    warnings = joined(where, "folders", auto)
    if "train" not in roles:
        found = some(name for names in roles.values() for name in names)
        hint = some(other[:1]) or "NAME"
        raise SourceError(
            f"{where}: found {found} but no folder 'train'; expected one, or "
            f"data.splits: {{train: {hint}}}, or data.options.splits: false where the folders are "
            "classes"
        )
    return roles, other, warnings


def _by_role(tops: list[str], role: dict[str, str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for top in tops:
        if top in role:
            found.setdefault(role[top], []).append(top)
    return found


def _are_splits(like: dict[str, str], other: list[str]) -> bool:
    """Whether folders that only look like splits are taken as such: all of them do, train is one
    of them, and there is another, or nothing but parts of train.
    """
    said = set(like.values())
    if other or "train" not in said or UNCLEAR in said:
        return False
    return len(said) > 1 or len(like) == 1 or _parts(list(like))


def _unclear(where: str, like: dict[str, str], other: list[str]) -> str:
    beside = f", beside {some(other)}" if other else ""
    return (
        f"{where}: the folders {some(like)} look like splits{beside}; expected data.splits to say "
        "which is which, such as data.splits: {train: A, val: B, ignore: [C]}, or "
        "data.options.splits: false where they are classes"
    )


def joined(where: str, what: str, roles: dict[str, list[str]]) -> list[str]:
    """Warnings about splits that have several names; SourceError unless those are parts of one."""
    warnings = []
    for role, names in roles.items():
        if len(names) < 2 or role == "ignore":
            continue
        if not _parts(names):
            shown = " and ".join(repr(printable(name)) for name in names[:4])
            raise SourceError(
                f"{where}: {what} {shown} both mean the split {role!r}; expected one, or "
                f"data.splits, such as data.splits: {{ignore: [{printable(names[-1])}]}}"
            )
        warnings.append(f"{where}: {some(names)} are read together as {role}")
    return warnings


def _parts(names: list[str]) -> bool:
    """Whether names differ in a number or a single letter alone, and that is no year."""
    years = {w for name in names for w in _words(name) if re.fullmatch(r"(19|20)\d\d", w)}
    shapes = {
        tuple("#" if w.isdigit() or len(w) == 1 else w for w in _words(name)) for name in names
    }
    same = len({tuple(_words(name)) for name in names}) < len(names)
    return len(shapes) == 1 and len(years) < 2 and not same


def numbered(names: list[str]) -> bool:
    """Whether names are one word such as part or fold and a number: no classes, by their looks."""
    words = {tuple(w for w in _words(name) if not w.isdigit()) for name in names}
    return len(names) > 1 and len(words) == 1 and words < {(part,) for part in PARTS}


def tables(
    where: str, what: str, names: dict[str, set[str]], wanted: dict | None
) -> dict[str, list[str]]:
    """{role: names} of tables, "" for those whose names say nothing. The beginning counts first.

    names: each with all that it may be called, the most telling first as read by `split_name`.
    """
    chosen = mapped(where, what, names, wanted)
    roles: dict[str, list[str]] = {}
    for name in names:
        *above, last = name.split("/")
        role = chosen.get(name) or split_name(last)
        for text in [last, *reversed(above)] if not role else ():
            role = role or (split_name(text) or guess(text))
        if role == UNCLEAR:
            raise SourceError(
                f"{where}: {what} {printable(name)!r} names two splits, expected data.splits to "
                f"say which it is, such as data.splits: {{train: {printable(last)!r}}}"
            )
        roles.setdefault(role or "", []).append(name)
    return roles

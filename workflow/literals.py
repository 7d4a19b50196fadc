"""What a plug-in file may declare at module level, as a literal that is read without an import."""

from __future__ import annotations

import ast
from collections.abc import Callable
from typing import Any

from workflow.messages import ParamsError, listed, nearest, shown

REQUIRED = object()
NO_WORDS = frozenset()
PRODUCTS = {"ids", "logits", "patch", "cls", "attention", "layers", "parts"}  # of a target
FIELDS = {"labels", "masks", "boxes", "points"}  # of a data set, besides its images

# What a file of each kind may declare, and what it means not to declare it.
DEFAULTS: dict[str, dict[str, Any]] = {
    "source": {
        "ARGUMENT": REQUIRED,
        "PATHS": (),
        "READS": ("*",),
        "SKIPS": (),
        "GIVES": frozenset(FIELDS),
        "INPUT": "images",
    },
    "encoder": {"CAN": REQUIRED, "NAMES": None, "INPUT": "images"},
    "target": {
        "PRODUCES": REQUIRED,
        "UPSTREAM": None,
        "NEEDS": NO_WORDS,
        "LABELS": False,
        "PATHS": (),
        "READS": ("*",),
        "SKIPS": (),
        "PUBLISHED": {},
        "INPUT": "images",
    },
    "method": {
        "TARGET": None,
        "NEEDS": NO_WORDS,
        "LABELS": False,
        "TRAINS": True,
        "PUBLISHED": {},
        "INPUT": "images",
    },
    "task": {
        "HEADLINE": REQUIRED,
        "NEEDS": NO_WORDS,
        "AFTER": None,
        "SPREADS": False,
        "PUBLISHED": {},
    },
}


def words(value) -> bool:
    """A set of words, perhaps empty."""
    return isinstance(value, frozenset) and all(isinstance(word, str) for word in value)


def text(value) -> bool:
    return isinstance(value, str)


def texts(value) -> bool:
    return isinstance(value, tuple) and all(map(text, value))


def switch(value) -> bool:
    return isinstance(value, bool)


def settings(value) -> bool:
    return isinstance(value, dict) and all(map(text, value))


RULES: dict[str, tuple[str, Callable[[Any], bool]]] = {  # what is expected, in words and as a check
    "ARGUMENT": (
        '"PATH", "NAME" or None: what follows the colon in data.source',
        lambda v: v in ("PATH", "NAME", None),
    ),
    "PATHS": ("a tuple of settings that name files of the user's", texts),
    "READS": ('a tuple of patterns of the files that count in a folder, such as ("*.csv",)', texts),
    "SKIPS": ('a tuple of patterns of names that are passed over, such as (".*",)', texts),
    "INPUT": ('"images", another word, or a set of them', lambda v: text(v) or words(v) and v),
    "GIVES": (f"a set out of {listed(FIELDS)}", words),
    "CAN": ('a set of words such as {"drop", "mask"}', words),
    "NAMES": ("a regular expression of timm's names", text),
    "PRODUCES": (f"a set out of {listed(PRODUCTS)}", lambda v: words(v) and v),
    "UPSTREAM": (f"None or a set out of {listed(PRODUCTS)}", lambda v: v is None or words(v) and v),
    "TARGET": (f"None or a set out of {listed(PRODUCTS)}", lambda v: v is None or words(v) and v),
    "NEEDS": ("a set of words", words),
    "LABELS": ("True or False", switch),
    "TRAINS": ("True or False", switch),
    "SPREADS": ("True or False", switch),
    "PUBLISHED": ("a dict of settings", settings),
    "HEADLINE": (
        '(key, label, unit), such as ("top1", "top-1 accuracy", "%")',
        lambda v: texts(v) and len(v) == 3,
    ),
    "AFTER": ("None or a kind of task", lambda v: v is None or text(v)),
}
VOCABULARY = {"GIVES": FIELDS, "PRODUCES": PRODUCTS, "UPSTREAM": PRODUCTS, "TARGET": PRODUCTS}


def literals(kind: str, path: str, tree: ast.Module) -> dict[str, Any]:
    """The literals that a plug-in file declares, completed by the defaults; sets as frozensets.

    ParamsError, naming the line, for one that is no literal or not what is expected.
    """
    found = dict(DEFAULTS[kind])
    for node in tree.body:
        if isinstance(node, ast.Assign):
            targets = node.targets
        elif isinstance(node, ast.AnnAssign) and node.value is not None:
            targets = [node.target]
        else:
            continue
        for target in targets:
            if isinstance(target, ast.Name) and target.id in found:
                found[target.id] = _read(kind, target.id, node, f"{path}, line {node.lineno}")
    for key, value in found.items():
        if value is REQUIRED:
            raise ParamsError(f"{path}: must declare {key}, {RULES[key][0]}")
    return found


def _read(kind: str, key: str, node: ast.Assign | ast.AnnAssign, where: str):
    expected, good = RULES[key]
    try:
        value = ast.literal_eval(node.value)
    except (ValueError, TypeError):
        raise ParamsError(f"{where}: {key} must be a literal, {expected}") from None
    value = frozenset(value) if isinstance(value, set) else value
    if not good(value):
        raise ParamsError(f"{where}: {key}: found {shown(value)}, expected {expected}")
    known = FIELDS if (kind, key) == ("task", "NEEDS") else VOCABULARY.get(key)
    for word in sorted(value) if known and value else ():
        if word not in known:
            raise ParamsError(f"{where}: {key}: unknown word {word!r}{nearest(word, known)}")
    return value

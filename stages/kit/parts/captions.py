"""Captions made of class names by templates, as numbers for a small text tower."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch

PICTURES = ("photo", "picture", "image", "snapshot")
TEMPLATES = (
    "a {picture} of a {name}",
    "a {picture} of the {name}",
    "this {picture} shows a {name}",
    "a {name} in a {picture}",
    "a small {picture} of one {name}",
    "{name}",
)


def captions(name: str) -> list[str]:
    """All captions of a class, none of them twice."""
    words = " ".join(_words(name)) or "thing"
    filled = (t.format(picture=p, name=words) for t in TEMPLATES for p in PICTURES)
    return list(dict.fromkeys(filled))


def table(names: Sequence[str]) -> tuple[torch.Tensor, list[str]]:
    """Class names -> the captions of each as numbers of words, int64 (classes,captions,length),
    0 after their end; and the words, of which the first has number 1.
    """
    texts = [[_words(text) for text in captions(name)] for name in names]
    known = sorted({word for each in texts for text in each for word in text})
    number = {word: n for n, word in enumerate(known, start=1)}
    longest = max(len(text) for each in texts for text in each)
    rows = [
        [[number[word] for word in text] + [0] * (longest - len(text)) for text in each]
        for each in texts
    ]
    return torch.tensor(rows), known


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower().replace("_", " "))

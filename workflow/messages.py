"""Words for messages: the nearest spelling, values as they were found, lists of names."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable

FEW = 12  # names that a message lists beside the nearest one


class ParamsError(ValueError):
    """Something in params.yaml, or in a plug-in that it names, is wrong. The message lists all."""

    plain = True  # the message is for the user: stages print it without a traceback


def did_you_mean(word, words: Iterable[str], cutoff: float = 0.6) -> str:
    """The nearest of `words`, for the end of a message; nothing if none is near."""
    near = difflib.get_close_matches(str(word), list(words), 1, cutoff)
    return f"; did you mean {near[0]!r}?" if near else ""


def nearest(word, words: Iterable[str]) -> str:
    """The nearest of `words`, and all of them if they are few or none is near."""
    words = sorted(words)
    near = did_you_mean(word, words)
    if near and len(words) > FEW:
        return near
    return near + (f" (allowed: {', '.join(words)})" if words else " (none is defined)")


def shown(value) -> str:
    """A value as it was found, cut to what fits into a line."""
    if value is None:
        return "nothing"
    return repr(value) if len(repr(value)) < 80 else f"{repr(value)[:77]}..."


def legible(name: str) -> str:
    """A file name as it can be printed: bytes that are no UTF-8, and line breaks, are escaped."""
    text = os.fsencode(name).decode("utf-8", "backslashreplace")
    return text if text.isprintable() else repr(text)[1:-1]


def shortened(text: str, most: int = 80) -> str:
    """The text, without its middle if it is long."""
    half = most // 2 - 2
    return text if len(text) <= most else f"{text[:half]}...{text[-half:]}"


def listed(words: Iterable[str], last: str = "and") -> str:
    """The words in alphabetical order: "a", "a and b", "a, b and c"."""
    *head, tail = sorted(words)
    return f"{', '.join(head)} {last} {tail}" if head else tail

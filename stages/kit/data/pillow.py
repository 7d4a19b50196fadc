"""What Pillow warns of while it decodes: kept for the file at hand, not printed without a name.

Python prints a warning once per line of code: of a thousand odd files one would be told, and nobody
knows which. Warnings of Pillow in a thread that listens are taken, all others go their way.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

import PIL

LONGEST, MOST = 200, 5  # characters of a warning; warnings of one file
PLACE = str(Path(PIL.__file__).parent)
_here, _lock, _before = threading.local(), threading.Lock(), []


@contextlib.contextmanager
def heard() -> Iterator[list[str]]:
    """A list that gets what Pillow warns of in this thread meanwhile."""
    _attach()
    before, _here.said = getattr(_here, "said", None), []
    try:
        yield _here.said
    finally:
        _here.said = before


def _attach() -> None:
    """Have Python show warnings here. Others, such as pytest, put their own in this place again."""
    if warnings.showwarning is _show:
        return
    with _lock:
        if warnings.showwarning is not _show:
            _before[:] = [warnings.showwarning]
            warnings.filterwarnings("always", module=r"PIL\.")
            warnings.showwarning = _show


def _show(message, category, filename, lineno, file=None, line=None) -> None:
    said = getattr(_here, "said", None)
    if said is None or not str(filename).startswith(PLACE):
        _before[0](message, category, filename, lineno, file, line)
    elif len(said) < MOST:
        said.append(" ".join(str(message).split())[:LONGEST])

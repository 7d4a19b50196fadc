"""What libtiff says while it decodes: kept for the file at hand instead of printed without a name.

libtiff, which Pillow uses for compressed TIFF files, writes its complaints to stderr, where nobody
knows which file they are about. It lets a program take them. Where its library is not found beside
Pillow, nothing changes.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import PIL

HANDLER = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_void_p)
LONGEST, MOST = 200, 5  # characters of a message; messages of one file
_here = threading.local()


@contextlib.contextmanager
def heard() -> Iterator[list[str]]:
    """A list that gets what libtiff says in this thread meanwhile."""
    _attach()
    before, _here.said = getattr(_here, "said", None), []
    try:
        yield _here.said
    finally:
        _here.said = before


@cache
def _attach() -> tuple | None:
    """Make libtiff call `_hear`; what has to live as long as that, None without the library."""
    beside = Path(PIL.__file__).parent.parent
    found = [*beside.glob("pillow.libs/libtiff*.so*"), *beside.glob("PIL/.dylibs/libtiff*.dylib")]
    try:
        library, c = ctypes.CDLL(str(found[0])), ctypes.CDLL(None)
        handler = HANDLER(lambda module, form, values: _hear(c, module, form, values))
        for name in ("TIFFSetErrorHandler", "TIFFSetWarningHandler"):
            setter = getattr(library, name)
            setter.argtypes, setter.restype = [HANDLER], ctypes.c_void_p
            setter(handler)
    except (IndexError, OSError, AttributeError):
        return None
    return library, c, handler


def _hear(c: ctypes.CDLL, module: bytes | None, form: bytes, values: int) -> None:
    said = getattr(_here, "said", None)
    if said is None or len(said) >= MOST:
        return
    text = ctypes.create_string_buffer(LONGEST)
    c.vsnprintf(text, ctypes.c_size_t(LONGEST), form, ctypes.c_void_p(values))
    said.append(text.value.decode("utf-8", "replace"))

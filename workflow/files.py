"""Files that are written whole or not at all, and the error that tells a user what to do."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class JobError(RuntimeError):
    """A job cannot run or cannot finish, for a reason that its user can remove."""

    plain = True  # shown without a traceback


def write_atomic(path: str | Path, content: bytes | str, *, sync: bool = True) -> None:
    """Write a file whole or not at all: a temporary file beside it is synced, then renamed.

    Without `sync` it may be empty after a power failure; so are files that anything can make anew.
    JobError when the disk is full. Neither a half-written nor a temporary file is left behind.
    """
    path = Path(path)
    data = content.encode() if isinstance(content, str) else content
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        if is_full(error):
            raise disk_full(path, error) from error
        raise


def write_changed(path: str | Path, content: str) -> bool:
    """Write a file that can be made anew, if it holds something else. True if it was written."""
    path = Path(path)
    try:
        if path.read_text(encoding="utf-8") == content:
            return False
    except (OSError, UnicodeDecodeError):
        pass
    write_atomic(path, content, sync=False)
    return True


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically; see `json_text`."""
    write_atomic(path, json_text(value))


def json_text(value: Any) -> str:
    """Valid JSON: NaN and infinity become null, tuples lists, paths and keys text."""
    return json.dumps(_finite(value), indent=1) + "\n"


def _finite(value):
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    if hasattr(value, "item") and not isinstance(value, (str, bytes)):  # a numpy or torch scalar
        value = value.item()
    if isinstance(value, float) and not abs(value) < float("inf"):
        return None
    return str(value) if isinstance(value, Path) else value


def _umask() -> int:
    old = os.umask(0o022)
    os.umask(old)
    return old


def is_full(error: BaseException | None) -> bool:
    """Whether an error, or one of its causes, says that the disk has no room.

    Libraries in other languages wrap the system's error in their own; then its text is searched.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            return True
        if isinstance(error, Exception) and any(os.strerror(n) in str(error) for n in NO_ROOM):
            return True
        error = error.__cause__ or error.__context__
    return False


def disk_full(path: Path, error: BaseException) -> JobError:
    """The error for the user: which file, how much is free, what to do."""
    try:
        free = f"{shutil.disk_usage(path.parent).free / 2**20:.0f} MB are free"
    except OSError:
        free = "its free space is unknown"
    reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
    return JobError(
        f"{path}: the disk is full ({reason}; {free}). Make room and start again: finished jobs "
        "are kept."
    )


def sha256(path: str | Path) -> str:
    """SHA-256 of a file's bytes, as 64 hexadecimal digits. OSError if it cannot be read."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

"""Checkpoints that survive a kill at any moment: atomic, verified on reading, with the previous one
kept.

A file is written beside its place, flushed to the disk and renamed to `checkpoint.pt`; the one
before becomes `checkpoint.previous.pt`. Each carries a CRC of every number in it, so that a torn,
truncated or flipped file is noticed and the previous one is taken instead. Several processes take
the same one, or none goes on.
"""

from __future__ import annotations

import os
import warnings
import zlib
from pathlib import Path

import torch

from stages.kit import dist
from workflow.files import JobError

FORMAT = 1
MISSING, BROKEN = -1, -2  # in the place of a checksum


class Checkpoint:
    """The newest two states of the training in a folder."""

    def __init__(self, folder: Path):
        self.path = Path(folder) / "checkpoint.pt"
        self.previous = self.path.with_suffix(".previous.pt")

    def save(self, state: dict) -> None:
        """Writes a nested dict of tensors, numbers and strings. OSError if the disk refuses; the
        old files then still stand.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(f".{os.getpid()}.tmp")
        try:
            with open(temporary, "wb") as file:
                torch.save({"format": FORMAT, "crc": crc(state), "state": state}, file)
                file.flush()
                os.fsync(file.fileno())
            if self.path.exists():
                os.replace(self.path, self.previous)
            os.replace(temporary, self.path)
            _sync_folder(self.path.parent)
        finally:
            temporary.unlink(missing_ok=True)

    def load(self) -> dict | None:
        """The newest state that every rank can read, with its tensors on the CPU; None if there is
        none. Warns about each broken file. JobError, on every rank, if some could go on and others
        could not.
        """
        for stale in self.path.parent.glob(f"{self.path.stem}.*.tmp"):  # a killed writer's
            stale.unlink(missing_ok=True)
        differ = False
        for path in (self.path, self.previous):
            state, mark = self._try(path)
            largest, smallest = dist.agree(mark), -dist.agree(-mark)
            if largest == smallest and state is not None:
                return state
            differ |= largest != smallest
        if differ:
            raise JobError(
                f"{self.path}: not every process can read this checkpoint, or they found different "
                "ones. The folder has to be the same for all of them: put it on a disk that they "
                "share, or delete it to begin anew"
            )
        return None

    def _try(self, path: Path) -> tuple[dict | None, int]:
        """The state and its checksum; None and MISSING or BROKEN."""
        if not path.exists():
            return None, MISSING
        try:
            return read(path)
        except Exception as error:  # any damage may surface as any error of zip, pickle or torch
            reason = str(error).split("\n")[0][:200]
            warnings.warn(
                f"{path}: unreadable checkpoint ignored ({type(error).__name__}: {reason})",
                stacklevel=3,
            )
            return None, BROKEN


def read(path: Path) -> tuple[dict, int]:
    """The state in one file and its checksum, read without executing anything (weights_only);
    ValueError if it is not what was written.
    """
    content = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"not a checkpoint of format {FORMAT}")
    if crc(content["state"]) != content["crc"]:
        raise ValueError("its numbers do not match their checksum")
    return content["state"], content["crc"]


def crc(value, start: int = 0) -> int:
    """CRC-32 over a nested structure of dicts, lists, tensors, numbers and strings, in order."""
    if isinstance(value, dict):
        for key, item in value.items():
            start = crc(item, zlib.crc32(repr(key).encode(), start))
        return start
    if isinstance(value, (list, tuple)):
        for item in value:
            start = crc(item, start)
        return start
    if isinstance(value, torch.Tensor):
        flat = value.detach().cpu().contiguous().flatten()
        return zlib.crc32(flat.view(torch.uint8).numpy() if flat.numel() else b"", start)
    return zlib.crc32(repr(value).encode(), start)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

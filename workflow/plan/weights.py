"""Whether a folder of weights can be what timm's save_for_hf writes, as far as files tell.

A target's setting `local:FOLDER` names one. Whether the weights fit the architecture is known to
timm alone, and said by the stage; what is here needs no torch and is said before anything runs.
"""

from __future__ import annotations

import json
from pathlib import Path

from workflow.messages import legible, listed, shortened

CONFIG, TENSORS = "config.json", "model.safetensors"
WANTED = f"expected {CONFIG} and {TENSORS}, as timm's save_for_hf writes them"
HEADER = 100_000_000  # bytes that the format allows
# How files begin that are taken for others -> what they are.
KINDS = (
    (b"version https://git-lfs", "a pointer of Git LFS, not the file itself (git lfs pull)"),
    (b"/annex/objects", "a pointer of git-annex, not the file itself (git annex get)"),
    (b"<!doctype html", "a web page"),
    (b"<html", "a web page"),
    (b"<?xml", "XML"),
    (b"PK\x03\x04", "a ZIP archive, such as torch.save writes (.pth, .bin)"),
    (b"\x80\x02", "a pickle, such as torch.save wrote long ago (.pth, .bin)"),
    (b"\x80\x03", "a pickle"),
    (b"\x80\x04", "a pickle"),
    (b"\x80\x05", "a pickle"),
    (b"\x89HDF", "an HDF5 file, such as Keras writes"),
    (b"GGUF", "a GGUF file"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"{", "JSON text"),
)


def fault(folder: Path) -> str:
    """What is wrong with a folder of weights that is there, in one line; "" if nothing is known.

    OSError if a file cannot be read.
    """
    if not folder.is_dir():
        return f"{_shown(folder)} is {_kind(folder)}, no folder; {WANTED}"
    for name, check in ((CONFIG, _config), (TENSORS, _tensors)):
        path = folder / name
        if not path.is_file():
            lies = [legible(entry.name) for entry in sorted(folder.iterdir())]
            more = ["..."] if len(lies) > 6 else []
            found = listed(lies[:6] + more) if lies else "nothing"
            if path.is_dir():
                found = f"a folder {name}"
            return f"{_shown(folder)}: found {shortened(found, 200)}; {WANTED}"
        if wrong := check(path):
            return f"{_shown(path)}: {wrong}"
    return ""


def _config(path: Path) -> str:
    wanted = f"expected the {CONFIG} of timm's save_for_hf, with architecture and pretrained_cfg"
    try:
        told = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return f"found {_kind(path)}, {wanted}"
    if not isinstance(told, dict):
        return f"found a {type(told).__name__}, {wanted}"
    classes = told.get("architectures")
    other = isinstance(classes, list) and classes and isinstance(classes[0], str)
    whose = f" (it is that of {shortened(classes[0], 60)} in transformers)" if other else ""
    for key, kind in (("architecture", str), ("pretrained_cfg", dict)):
        if not isinstance(told.get(key), kind):
            return f"found no {key}{whose}, {wanted}"
    return ""


def _tensors(path: Path) -> str:
    """Of a safetensors file: 8 bytes with the header's length, the header in JSON, the tensors."""
    size, wanted = path.stat().st_size, "expected the tensors of a safetensors file"
    with path.open("rb") as file:
        head = file.read(64)
        length = int.from_bytes(head[:8], "little")
        if len(head) < 8 or length > HEADER or head[8:].lstrip()[:1] != b"{":
            return f"found {_kind(path)}, {wanted}"
        if 8 + length > size:
            return f"found {size} bytes and a header of {length}, so it is cut off; copy it again"
        file.seek(8)
        header = file.read(length)
    try:
        tensors = json.loads(header)
        tensors.pop("__metadata__", None)
        ends = [int(about["data_offsets"][1]) for about in tensors.values()]
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        return f"found a header that is none, {wanted}"
    if not ends:
        return f"found no tensor in it, {wanted}"
    there, named = size - 8 - length, max(ends)
    if there < named:
        return f"found {there} bytes of {named}, so it is cut off; copy it again"
    return ""


def _kind(path: Path) -> str:
    """What a file is, as far as its beginning tells."""
    if not path.is_file():
        return "no file"
    with path.open("rb") as file:
        head = file.read(64)
    if not head:
        return "an empty file"
    low = head.lstrip().lower()
    known = (what for start, what in KINDS if low.startswith(start.lower()))
    return next(known, f"a file that starts with {head[:8]!r}")


def _shown(path: Path) -> str:
    return shortened(legible(str(path)), 200)

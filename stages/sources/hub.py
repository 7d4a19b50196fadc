"""`hub:NAME`: a data set of the Hugging Face hub by its id, e.g. `hub:uoft-cs/cifar10`.

Loaded with `datasets`, which downloads once and reads from its cache (memory-mapped) ever after.
When the hub does not answer within seconds, only the caches are used: that of `datasets` first,
then files fetched with `hf download`. No code of the data set is run. A path found in an image
column is followed only because `datasets` itself put the file into its cache.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlparse

import numpy as np

from stages.kit.data.store import SPLITS
from stages.sources import (
    Found,
    Listing,
    Sample,
    SourceError,
    split_name,
)
from stages.sources._tables import find_columns, number_labels

ARGUMENT = "NAME"
GIVES = {"labels"}
COLUMNS = True

PATIENCE = 4.0  # seconds to wait for a first answer of the hub


@dataclass(frozen=True)
class Config:
    subset: str | None = None  # the hub's "config" of a data set that has several
    revision: str | None = None  # branch, tag or commit; a commit keeps the data the same for ever


def read(argument: str, config: Config, data: dict) -> Found:
    """List the rows of the hub's data set. Raises SourceError when neither the hub nor a cache has
    it.
    """
    if not argument or argument.startswith(("/", ".")) or argument.count("/") > 1:
        raise SourceError(
            f"data.source: 'hub:' needs an id like hub:owner/name, found {argument!r} "
            "(a path? use parquet:)"
        )
    tables = _load(argument, config)
    groups: dict[str, object] = {}
    for name in tables:
        groups.setdefault(split_name(name) or "", tables[name])
    if set(groups) == {""} and len(tables) == 1:
        groups = {"train": groups[""]}
    if "train" not in groups:
        raise SourceError(f"hub:{argument}: no split 'train', found {', '.join(tables)}")
    splits = {s: groups[s] for s in SPLITS if s in groups and len(groups[s])}

    features = splits["train"].features
    kinds = {name: _kind(feature) for name, feature in features.items()}
    image, label = find_columns(
        f"hub:{argument}", kinds, data.get("image_column"), data.get("label_column")
    )
    values = {
        s: list(table[label]) if label else [None] * len(table) for s, table in splits.items()
    }
    labels, classes = number_labels(
        f"hub:{argument}", values, getattr(features[label], "names", None) if label else None
    )
    return Found(
        {s: Listing(labels[s], _reader(table, image)) for s, table in splits.items()}, classes
    )


def _load(name: str, config: Config):
    """The data set as a `datasets.DatasetDict`, without ever waiting long for a hub that does not
    answer.
    """
    online = os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("0", "", "false") and reachable()
    for key, seconds in (("HF_HUB_ETAG_TIMEOUT", "10"), ("HF_HUB_DOWNLOAD_TIMEOUT", "30")):
        os.environ.setdefault(key, seconds)
    import datasets
    import huggingface_hub

    if not online:  # these libraries asked the environment when they were imported; now we know
        huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    tried = []
    try:
        return datasets.load_dataset(name, config.subset, revision=config.revision)
    except Exception as error:
        tried.append(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
    try:
        folder = huggingface_hub.snapshot_download(
            name, repo_type="dataset", revision=config.revision, local_files_only=True
        )
        return datasets.load_dataset(folder, config.subset)
    except Exception as error:
        tried.append(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
    state = (
        "the hub answers"
        if online
        else "the hub cannot be reached from here (or HF_HUB_OFFLINE is set)"
    )
    raise SourceError(
        f"hub:{name} cannot be read: {state}, and no cache holds it. Check the id, run once with "
        f"a network, or fetch it elsewhere with `hf download --repo-type dataset {name}` and copy "
        "the cache, or use parquet:PATH. Tried: " + " | ".join(line[:300] for line in tried)
    )


def reachable() -> bool:
    """Whether the hub accepts a connection within PATIENCE seconds. Behind a proxy this cannot be
    asked; then yes.
    """
    if any(os.environ.get(key) for key in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True
    url = urlparse(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    answer = []

    def ask() -> None:
        try:
            socket.create_connection((url.hostname, url.port or 443), timeout=PATIENCE).close()
            answer.append(True)
        except OSError:
            pass

    thread = threading.Thread(target=ask, daemon=True)  # name resolution has no timeout of its own
    thread.start()
    thread.join(PATIENCE)
    return bool(answer)


def _kind(feature: object) -> str:
    kind = type(feature).__name__
    dtype = str(getattr(feature, "dtype", ""))
    if kind in ("Image", "ClassLabel"):
        return {"Image": "image", "ClassLabel": "class"}[kind]
    if kind == "Value" and "binary" in dtype:
        return "bytes"
    if kind == "Value" and "int" in dtype:
        return "int"
    return "string" if kind == "Value" and "string" in dtype else "other"


def _reader(table, image: str):
    from datasets import Image

    if type(table.features[image]).__name__ == "Image":
        table = table.cast_column(image, Image(decode=False))
    table = table.select_columns([image])

    def samples(rows: np.ndarray) -> Iterator[Sample]:
        for begin in range(0, len(rows), 64):
            chosen = rows[begin : begin + 64].tolist()
            for row, value in zip(chosen, table[chosen][image], strict=True):
                yield _sample(value, row)

    return samples


def _sample(value: dict | bytes | None, row: int) -> Sample:
    struct = value if isinstance(value, dict) else {"bytes": value}
    path, data = struct.get("path"), struct.get("bytes")
    name = f"{row}:{Path(path).name}" if path else str(row)
    try:
        data = Path(path).read_bytes() if data is None and path else data
    except OSError as error:
        return Sample(name, b"", problem=error.strerror or type(error).__name__)
    return Sample(name, data or b"", problem="" if data is not None else "no bytes in the table")

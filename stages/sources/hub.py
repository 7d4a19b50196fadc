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
)
from stages.sources._names import joined, some, tables
from stages.sources._tables import (
    by_column,
    find_columns,
    no_labels,
    number_labels,
    plain_labels,
    split_column,
    unused_labels,
)
from workflow.messages import did_you_mean

ARGUMENT = "NAME"
GIVES = {"labels"}
NAMED_SPLITS = True
COLUMNS = True

PATIENCE = 4.0  # seconds to wait for a first answer of the hub


@dataclass(frozen=True)
class Config:
    labels: bool = True  # False: every image is unlabelled
    split_column: str | None = None  # says of each row which split it is (null: see _tables.py)
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
    found = _load(argument, config)
    wanted = None if config.split_column else data.get("splits")
    splits, bare, warnings = _splits(f"hub:{argument}", found, wanted)
    features = splits["train"].features
    kinds = {name: _kind(feature) for name, feature in features.items()}
    image, label = find_columns(
        f"hub:{argument}", kinds, data.get("image_column"), data.get("label_column")
    )
    if not config.labels:
        label = None
    elif label is None:
        warnings += unused_labels(f"hub:{argument}", kinds, image)
    group = data.get("group")
    if group is not None and group not in features:
        raise SourceError(
            f"data.group: hub:{argument} has no column {group!r}, found {', '.join(features)}"
            f"{did_you_mean(group, features)}"
        )
    values = {
        s: list(table[label]) if label else [None] * len(table) for s, table in splits.items()
    }
    if bare:
        values["train"][-bare:] = [None] * bare
    if label:
        asked = data.get("label_column") is not None
        values, note = plain_labels(f"hub:{argument}", label, values, asked)
        warnings += note
    names = getattr(features[label], "names", None) if label else None
    labels, classes = number_labels(f"hub:{argument}", values, names, warnings)
    warnings += no_labels(f"hub:{argument}", label, labels)
    units = {s: list(table[group]) if group is not None else None for s, table in splits.items()}
    listings = {
        s: Listing(labels[s], _reader(table, image), groups=units[s]) for s, table in splits.items()
    }
    result = Found(listings, classes, warnings=warnings)
    chosen = (image, label)
    part = split_column(f"hub:{argument}", kinds, config.split_column, list(splits), chosen)
    if part is None:
        return result
    said = list(splits["train"][part])
    asked = config.split_column
    return by_column(f"hub:{argument}", result, part, said, data.get("splits"), asked)


def _splits(where: str, found, wanted: dict | None) -> tuple[dict, int, list[str]]:
    """({split: table}, how many rows at the end of train are to be unlabelled, warnings)."""
    roles = tables(where, "split", {name: {name} for name in found}, wanted)
    warnings = joined(where, "splits", {r: names for r, names in roles.items() if r in SPLITS})
    skipped, bare = roles.pop("ignore", []), roles.pop("unlabelled", [])
    unknown = roles.pop("", [])
    if not roles and len(unknown) == 1:
        roles, unknown = {"train": unknown}, []
    if "train" not in roles:
        raise SourceError(
            f"{where}: no split 'train', found {', '.join(found)}; expected one, or data.splits, "
            f"such as data.splits: {{train: {next(iter(found))}}}"
        )
    for names, why in (
        (unknown, "splits with other names are not used: {}; data.splits can name them"),
        (skipped, "left out by data.splits.ignore: {}"),
    ):
        if names:
            listed = some(f"{name} ({len(found[name])} images)" for name in names)
            warnings.append(f"{where}: {why.format(listed)}")
    splits = {}
    for role in [role for role in SPLITS if role in roles]:
        names = roles[role] + (bare if role == "train" else [])
        parts = [found[name] for name in names if len(found[name])]
        if parts:
            splits[role] = parts[0] if len(parts) == 1 else _together(parts)
        else:
            warnings.append(f"{where}: the split {role} has no rows")
    if "train" not in splits:
        raise SourceError(f"{where}: the split train has no rows")
    return splits, sum(len(found[name]) for name in bare), warnings


def _together(parts: list):
    from datasets import concatenate_datasets

    return concatenate_datasets(parts)


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
    for word, name in (("int", "int"), ("string", "string"), ("bool", "bool"), ("float", "float")):
        if kind == "Value" and word in dtype:
            return name
    if kind == "Value" and "decimal" in dtype:
        return "float"
    inner = str(getattr(getattr(feature, "feature", None), "dtype", ""))
    return "list of bytes" if inner in ("uint8", "int8", "binary", "large_binary") else str(feature)


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
    if isinstance(value, list):
        whole = all(isinstance(part, bytes) for part in value)
        value = b"".join(value) if whole else bytes(number & 255 for number in value)
    struct = value if isinstance(value, dict) else {"bytes": value}
    path, data = struct.get("path"), struct.get("bytes")
    name = f"{row}:{Path(path).name}" if path else str(row)
    try:
        data = Path(path).read_bytes() if data is None and path else data
    except OSError as error:
        return Sample(name, b"", problem=error.strerror or type(error).__name__)
    return Sample(name, data or b"", problem="" if data is not None else "no bytes in the table")

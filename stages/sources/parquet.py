"""`parquet:PATH`: tables of encoded images, as Hugging Face `datasets` writes them.

PATH is a file or a folder. In a folder, files named train-*, validation-* (val, valid, dev) and
test-* are the splits, also in subfolders `data/` or `train/`, `test/`; files without such names are
all train. The image column holds structs {bytes, path} or plain bytes. The label column holds class
numbers (names come from the `huggingface` metadata when they are there) or strings.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from stages.kit.data.store import SPLITS
from stages.sources import (
    Found,
    Listing,
    Sample,
    SourceError,
    split_name,
)
from stages.sources._tables import find_columns, number_labels
from workflow.plugins import did_you_mean

ARGUMENT = "PATH"
GIVES = {"labels"}
READS = ("*.parquet",)
COLUMNS = True

BATCH = 64  # rows read at once


@dataclass(frozen=True)
class Config:
    pass


def read(argument: str, config: Config, data: dict) -> Found:
    """List the rows of the table(s) at `argument`. Raises SourceError for missing files, columns or
    labels."""
    groups = _files(argument)
    first = groups["train"][0]
    schema = _schema(first)
    image, label = find_columns(
        argument, _kinds(schema), data.get("image_column"), data.get("label_column")
    )
    values: dict[str, list] = {}
    for split, paths in groups.items():
        values[split] = []
        for path in paths:
            names = _schema(path).names
            missing = next((c for c in (image, label) if c is not None and c not in names), None)
            if missing is not None:
                raise SourceError(
                    f"{path}: no column {missing!r}, found {', '.join(names)} ({first.name} has it)"
                )
            table = pq.ParquetFile(path)
            rows = table.metadata.num_rows
            values[split] += (
                table.read(columns=[label])[label].to_pylist() if label else [None] * rows
            )
    names = _features(schema).get(label, {}).get("names") if label else None
    labels, classes = number_labels(argument, values, names)
    if not len(labels["train"]):
        raise SourceError(f"{argument}: the split train has no rows")
    splits = {s: Listing(labels[s], _reader(groups[s], image)) for s in groups if len(labels[s])}
    return Found(splits, classes)


def _files(argument: str) -> dict[str, list[Path]]:
    """Split -> its parquet files, in order."""
    if not argument:
        raise SourceError("data.source: 'parquet:' needs a path, e.g. parquet:cifar10")
    root = Path(argument).expanduser()
    if root.is_file():
        return {"train": [root]}
    if not root.is_dir():
        siblings = [p.name for p in root.parent.iterdir()] if root.parent.is_dir() else []
        raise SourceError(
            f"data.source: no file or folder {argument}{did_you_mean(root.name, siblings)}"
        )
    files = sorted(p for p in root.glob("*.parquet") if not p.name.startswith("."))
    files = files or sorted(root.glob("data/*.parquet")) or sorted(root.glob("*/*.parquet"))
    if not files:
        listed = sorted(p.name for p in root.iterdir())[:8]
        raise SourceError(
            f"{argument}: no *.parquet files, found {', '.join(listed) or 'an empty folder'}"
        )
    groups: dict[str, list[Path]] = {}
    for path in files:
        inside = split_name(path.parent.name) if path.parent != root else None
        groups.setdefault(split_name(path.name) or inside or "", []).append(path)
    if set(groups) == {""}:
        return {"train": groups[""]}
    if "train" not in groups or "" in groups:
        odd = groups.get("", files)[0].name
        raise SourceError(
            f"{argument}: expected files train-*.parquet, validation-*.parquet, test-*.parquet, "
            f"found {odd}"
        )
    return {split: groups[split] for split in SPLITS if split in groups}


def _schema(path: Path) -> pa.Schema:
    try:
        return pq.read_schema(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise SourceError(f"{path}: not a parquet file ({str(error).splitlines()[0]})") from None


def _features(schema: pa.Schema) -> dict:
    """Hugging Face features of the columns, {} when the file has none."""
    try:
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"][
            "features"
        ]
        return {name: feature for name, feature in features.items() if isinstance(feature, dict)}
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}


def _kinds(schema: pa.Schema) -> dict[str, str]:
    """Column -> kind, in the words of `find_columns`."""
    features, kinds = _features(schema), {}
    for column in schema:
        declared = features.get(column.name, {}).get("_type")
        kind = column.type
        if pa.types.is_dictionary(kind):
            kind = kind.value_type
        if pa.types.is_struct(kind):
            inner = {kind.field(i).name for i in range(kind.num_fields)}
            name = "image" if "bytes" in inner and declared in (None, "Image") else "other"
        elif pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
            name = "image" if declared == "Image" else "bytes"
        elif pa.types.is_integer(kind):
            name = "class" if declared == "ClassLabel" else "int"
        elif pa.types.is_string(kind) or pa.types.is_large_string(kind):
            name = "string"
        else:
            name = "other"
        kinds[column.name] = name
    return kinds


def _reader(paths: list[Path], image: str):
    def samples(rows: np.ndarray) -> Iterator[Sample]:
        start = 0  # number of the first row of the row group at hand
        for path in paths:
            parquet = pq.ParquetFile(path)
            for group in range(parquet.num_row_groups):
                count = parquet.metadata.row_group(group).num_rows
                chosen = set(
                    (
                        rows[np.searchsorted(rows, start) : np.searchsorted(rows, start + count)]
                        - start
                    ).tolist()
                )
                if chosen:
                    yield from _group(parquet, group, image, chosen, start)
                start += count

    return samples


def _group(
    parquet: pq.ParquetFile, group: int, image: str, chosen: set[int], start: int
) -> Iterator[Sample]:
    row = 0
    for batch in parquet.iter_batches(
        BATCH, row_groups=[group], columns=[image], use_threads=False
    ):
        for value in batch.column(0):
            if row in chosen:
                yield to_sample(value.as_py(), start + row)
            row += 1


def to_sample(value: dict | bytes | None, row: int) -> Sample:
    """One cell of an image column -> Sample. Only stored bytes count: a path in a table is not
    followed.
    """
    struct = value if isinstance(value, dict) else {"bytes": value}
    name = f"{row}:{Path(struct['path']).name}" if struct.get("path") else str(row)
    data = struct.get("bytes")
    return Sample(name, data or b"", problem="" if data is not None else "no bytes in the table")

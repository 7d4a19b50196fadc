"""`parquet:PATH`: tables of encoded images, as Hugging Face `datasets` writes them.

PATH is a file or a folder. In a folder, the names of files, or of the folders that they lie in, say
which split they are (_names.py); files without such names are all train. The image column holds
structs {bytes, path}, plain bytes or lists of them. The label column holds class numbers (names
come from the `huggingface` metadata when they are there), strings or yes and no. What a file
declares to hold is checked before it is unpacked.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from stages.kit.data.decode import EXTENSIONS
from stages.kit.data.store import SPLITS
from stages.sources import (
    Found,
    Listing,
    Sample,
    SourceError,
)
from stages.sources._names import printable, some, tables
from stages.sources._tables import (
    by_column,
    find_columns,
    no_labels,
    number_labels,
    plain_labels,
    split_column,
    unused_labels,
)
from workflow.plugins import did_you_mean

ARGUMENT = "PATH"
GIVES = {"labels"}
NAMED_SPLITS = True
READS = ("*.parquet", "*.parq", "*.pq")
SKIPS = (".*", "_temporary*")
COLUMNS = True

BATCH, VALUES = 64, 65536  # rows of images, and of labels, read at once
READ_BYTES = 256 << 20  # of one batch at most, as far as the file declares it
ENDS = (".parquet", ".parq", ".pq")
BESIDE = (*EXTENSIONS, ".arrow", ".csv", ".tsv", ".jsonl", ".feather", ".tar", ".zip", ".gz")
# Encoded images hardly compress. What does so much more is no set of images but fills the memory.
GROWS, LARGE = 100, 8 << 20
ROW_BYTES = 150  # that the stage needs for one image, all in all


@dataclass(frozen=True)
class Config:
    labels: bool = True  # False: every image is unlabelled
    split_column: str | None = None  # says of each row which split it is (null: see _tables.py)


@dataclass(frozen=True)
class _File:
    path: Path
    bare: bool = False  # its labels are not used


def read(argument: str, config: Config, data: dict) -> Found:
    """List the rows of the table(s) at `argument`. Raises SourceError for missing files, columns or
    labels."""
    wanted = None if config.split_column else data.get("splits")
    groups, warnings = _files(argument, wanted)
    first = groups["train"][0].path
    schema = _schema(first)
    kinds = _kinds(schema)
    chosen = data.get("label_column")
    image, label = find_columns(argument, kinds, data.get("image_column"), chosen)
    if not config.labels:
        label = None
    elif label is None:
        warnings += unused_labels(argument, kinds, image)
    group = _group_column(argument, schema, data.get("group"))
    features = _features(schema)
    part = split_column(argument, kinds, config.split_column, list(groups), (image, label))
    columns = [column for column in (image, label, group, part) if column is not None]
    parts: list = []
    values: dict[str, list] = {}
    units: dict[str, list] = {}
    for split, files in groups.items():
        values[split], units[split] = [], []
        for file in files:
            _check(file.path, first, columns, features, label)
            table = pq.ParquetFile(file.path)
            rows = table.metadata.num_rows
            used = label is not None and not file.bare
            values[split] += _values(table, label) if used else [None] * rows
            units[split] += _values(table, group) if group is not None else []
            parts += _values(table, part) if part is not None else []
    if label is not None:
        values, note = plain_labels(argument, label, values, chosen is not None)
        warnings += note
    names = features.get(label, {}).get("names") if label is not None else None
    labels, classes = number_labels(argument, values, names, warnings)
    warnings += no_labels(argument, label, labels)
    if not len(labels["train"]):
        raise SourceError(f"{argument}: the split train has no rows")
    empty = [split for split in groups if not len(labels[split])]
    warnings += [f"{argument}: the split {split} has no rows" for split in empty]
    splits = {
        split: Listing(
            labels[split],
            _reader([file.path for file in files], image),
            groups=units[split] if group is not None else None,
        )
        for split, files in groups.items()
        if split not in empty
    }
    found = Found(splits, classes, warnings=warnings)
    if part is None:
        return found
    return by_column(argument, found, part, parts, data.get("splits"), config.split_column)


def _files(argument: str, wanted: dict | None) -> tuple[dict[str, list[_File]], list[str]]:
    """Split -> its parquet files, in order; and what is not used."""
    if not argument:
        raise SourceError("data.source: 'parquet:' needs a path, e.g. parquet:cifar10")
    root = Path(argument).expanduser()
    if root.is_file():
        return {"train": [_File(root)]}, []
    if not root.is_dir():
        siblings = [p.name for p in root.parent.iterdir()] if root.parent.is_dir() else []
        raise SourceError(
            f"data.source: no file or folder {argument}{did_you_mean(root.name, siblings)}"
        )
    known = sorted(_tables_below(root))
    files = [p for p in known if p.parent == root]
    files = files or [p for p in known if p.parent == root / "data"]
    files = files or [p for p in known if p.parent.parent == root] or known
    if not files:
        listed = sorted(p.name for p in root.iterdir())
        raise SourceError(
            f"{argument}: no *.parquet files, found {some(listed) or 'an empty folder'}"
        )
    warnings, unused = [], [p.relative_to(root).as_posix() for p in known if p not in set(files)]
    if unused:
        warnings.append(
            f"{argument}: {len(unused)} tables in other folders are not read: {some(unused)}"
        )
    beside = Counter(p.suffix.lower() for p in root.iterdir() if p.suffix.lower() in BESIDE)
    if beside:
        listed = ", ".join(f"{n} {kind}" for kind, n in sorted(beside.items()))
        warnings.append(f"{argument}: files beside the tables are not read: {listed}")
    paths = {p.relative_to(root).as_posix(): p for p in files}
    called = {
        name: {name, path.name, path.stem, *path.relative_to(root).parts[:-1]}
        for name, path in paths.items()
    }
    roles = tables(argument, "file", called, wanted)
    skipped, bare = roles.pop("ignore", []), roles.pop("unlabelled", [])
    if skipped:
        warnings.append(f"{argument}: left out by data.splits.ignore: {some(skipped)}")
    if set(roles) == {""}:
        roles = {"train": roles[""]}
    if "train" not in roles or "" in roles:
        odd = printable(roles.get("", list(paths))[0])
        raise SourceError(
            f"{argument}: expected files train-*.parquet, validation-*.parquet, test-*.parquet, "
            f"found {odd}; data.splits says what others are, such as {{train: {odd!r}}}"
        )
    groups = {s: [_File(paths[name]) for name in roles[s]] for s in SPLITS if s in roles}
    groups["train"] += [_File(paths[name], bare=True) for name in bare]
    return groups, warnings


def _tables_below(root: Path) -> Iterator[Path]:
    """All tables in a folder. Links are followed, every folder is entered once."""
    seen = set()
    for folder, below, files in os.walk(root, followlinks=True):
        here = os.stat(folder)
        if (here.st_dev, here.st_ino) in seen:
            below.clear()
            continue
        seen.add((here.st_dev, here.st_ino))
        below[:] = sorted(name for name in below if not name.startswith((".", "_temporary")))
        for name in files:
            if name.lower().endswith(ENDS) and not name.startswith("."):
                yield Path(folder) / name


def _group_column(argument: str, schema: pa.Schema, group) -> str | None:
    if group is None or group in schema.names:
        return group
    raise SourceError(
        f"data.group: {argument} has no column {group!r}, found {', '.join(schema.names)}"
        f"{did_you_mean(group, schema.names)}"
    )


def _check(path: Path, first: Path, columns: list[str], features: dict, label) -> None:
    """SourceError for a file whose columns are not those of the first, or beyond the memory."""
    schema = _schema(path)
    missing = next((c for c in columns if c not in schema.names), None)
    if missing is not None:
        raise SourceError(
            f"{path}: no column {missing!r}, found {', '.join(schema.names)} ({first.name} has it)"
        )
    if label is not None:
        kind, usual = (_kinds(s)[label] for s in (schema, _schema(first)))
        if _family(kind) != _family(usual) and "null" not in (kind, usual):
            raise SourceError(
                f"{path}: column {label!r} holds {kind}, expected {usual} as in {first.name}"
            )
        own, other = (f.get(label, {}).get("names") for f in (_features(schema), features))
        if own != other:
            raise SourceError(
                f"{path}: the classes of {label!r} are {_listed(own)}, expected those of "
                f"{first.name}, {_listed(other)}"
            )
    _affordable(path, columns)


def _family(kind: str) -> str:
    """Kinds of labels that mean the same: numbers, or words."""
    return {"class": "int", "float": "int", "bytes": "string"}.get(kind, kind)


def _listed(names: list | None) -> str:
    return some(map(str, names)) if names else "not named"


def _affordable(path: Path, columns: list[str]) -> None:
    """SourceError for a file that declares more than fits into the memory, or could be images."""
    facts = pq.ParquetFile(path).metadata
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    packed = 0
    for group in range(facts.num_row_groups):
        about = facts.row_group(group)
        for chunk in map(about.column, range(about.num_columns)):
            if chunk.path_in_schema.split(".")[0] not in columns:
                continue
            size, stored = chunk.total_uncompressed_size, chunk.total_compressed_size
            packed += stored
            each = size / max(1, about.num_rows)
            if size > max(LARGE, GROWS * stored) or min(size, each) > memory / 8:
                raise SourceError(
                    f"{path}: column {chunk.path_in_schema!r} declares {_bytes(size)} in "
                    f"{about.num_rows} rows, packed in {_bytes(stored)}; expected images that "
                    "fit into the memory"
                )
    rows = facts.num_rows
    if rows * ROW_BYTES > memory or rows > max(1_000_000, packed):
        raise SourceError(
            f"{path}: declares {rows} rows in {_bytes(packed)}, expected images that fit into the "
            f"memory of {_bytes(memory)}"
        )


def _bytes(number: int) -> str:
    for unit in ("bytes", "kB", "MB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} GB"


def _values(table: pq.ParquetFile, column: str) -> list:
    """All values of a column; equal ones are one object."""
    known: dict = {}
    return [
        known.setdefault(value, value)
        for group in range(table.num_row_groups)
        for batch in _batches(table, group, column, VALUES)
        for value in batch.to_pylist()
    ]


def _batches(table: pq.ParquetFile, group: int, column: str, most: int) -> Iterator[pa.Array]:
    """A column of a row group in pieces of at most `most` values. A value that all rows share is
    declared once, so fewer are read at once where one could be large.
    """
    about = table.metadata.row_group(group)
    chunks = [about.column(k) for k in range(about.num_columns)]
    sizes = [
        c.total_uncompressed_size
        for c in chunks
        if c.path_in_schema.split(".")[0] == column and c.physical_type == "BYTE_ARRAY"
    ]
    rows = max(1, min(most, READ_BYTES // max([1, *sizes])))
    for batch in table.iter_batches(rows, row_groups=[group], columns=[column], use_threads=False):
        yield batch.column(0)


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
    features = _features(schema)
    return {
        column.name: _kind(_plain(column.type), features.get(column.name, {}).get("_type"))
        for column in schema
    }


def _plain(kind: pa.DataType) -> pa.DataType:
    """The type of the values, however they are packed."""
    while True:
        if pa.types.is_dictionary(kind) or pa.types.is_run_end_encoded(kind):
            kind = kind.value_type
        elif isinstance(kind, pa.BaseExtensionType):
            kind = kind.storage_type
        else:
            return kind


def _kind(kind: pa.DataType, declared: str | None) -> str:
    is_ = pa.types
    if is_.is_struct(kind):
        inner = {kind.field(i).name for i in range(kind.num_fields)}
        return "image" if "bytes" in inner and declared in (None, "Image") else str(kind)
    if _is_bytes(kind):
        return "image" if declared == "Image" else "bytes"
    if is_.is_integer(kind):
        return "class" if declared == "ClassLabel" else "int"
    if is_.is_string(kind) or is_.is_large_string(kind) or is_.is_string_view(kind):
        return "string"
    if is_.is_boolean(kind):
        return "bool"
    if is_.is_floating(kind) or is_.is_decimal(kind):
        return "float"
    if is_.is_list(kind) or is_.is_large_list(kind) or is_.is_fixed_size_list(kind):
        inner = _plain(kind.value_type)
        if is_.is_uint8(inner) or is_.is_int8(inner) or _is_bytes(inner):
            return "list of bytes"
    return str(kind)


def _is_bytes(kind: pa.DataType) -> bool:
    is_ = pa.types
    return (
        is_.is_binary(kind)
        or is_.is_large_binary(kind)
        or is_.is_binary_view(kind)
        or is_.is_fixed_size_binary(kind)
    )


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
    for batch in _batches(parquet, group, image, BATCH):
        for value in batch:
            if row in chosen:
                yield to_sample(_cell(value), start + row)
            row += 1


def _cell(value: pa.Scalar) -> dict | bytes | None:
    """The content of a cell; a list of bytes, or of numbers that are bytes, as bytes."""
    inner = getattr(value, "values", None)
    if not isinstance(inner, pa.Array):
        found = value.as_py()
        if isinstance(found, dict) and isinstance(found.get("bytes"), list):
            found["bytes"] = bytes(number & 255 for number in found["bytes"])
        return found
    if pa.types.is_integer(inner.type):
        return inner.drop_null().to_numpy(zero_copy_only=False).astype(np.uint8).tobytes()
    return inner[0].as_py() if len(inner) == 1 else b"".join(v or b"" for v in inner.to_pylist())


def to_sample(value: dict | bytes | None, row: int) -> Sample:
    """One cell of an image column -> Sample. Only stored bytes count: a path in a table is not
    followed.
    """
    struct = value if isinstance(value, dict) else {"bytes": value}
    name = f"{row}:{Path(struct['path']).name}" if struct.get("path") else str(row)
    data = struct.get("bytes")
    return Sample(name, data or b"", problem="" if data is not None else "no bytes in the table")

"""Writes one split of a data set, row by row, with bounded memory; store.py says what lies where.

The parquet files are written plain: without compression, from which encoded images would not
profit, and without a dictionary. So an image lies in the file as it is, and index.npy can say
where. A copy of all images beside them, which would be simpler to index, would double the disk.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from stages.kit.data.decode import encode_png, square, square_boxes

Box = tuple[float, float, float, float, int]  # x, y, width, height in pixels, class
NO_BOXES = np.empty((0, 5), np.float32)
# A row group, and with it the writer's memory, ends at either.
GROUP_ROWS, GROUP_BYTES = 256, 16 << 20
SHARD_BYTES = 256 << 20


class NpyWriter:
    """Rows appended to an .npy file whose length is known only at the end; its header has room to
    be written again.
    """

    def __init__(self, path: Path, row_shape: tuple[int, ...], dtype=np.uint8):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.shape, self.dtype, self.count = row_shape, np.dtype(dtype), 0
        self.file = open(path, "wb")  # noqa: SIM115 (closed by `close`)
        self._header()

    def _header(self) -> None:
        facts = {
            "descr": self.dtype.str,
            "fortran_order": False,
            "shape": (self.count, *self.shape),
        }
        self.file.seek(0)
        np.lib.format.write_array_header_1_0(self.file, facts)

    def add(self, row: np.ndarray) -> None:
        row = np.ascontiguousarray(row, self.dtype)
        if row.shape != self.shape:
            raise ValueError(f"{self.file.name}: row of shape {row.shape}, expected {self.shape}")
        self.file.write(row.data)
        self.count += 1

    def close(self) -> None:
        self._header()
        self.file.close()


class BytesWriter:
    """Values one after the other in PATH.bin, and their offsets and lengths in PATH_index.npy."""

    def __init__(self, path: Path):
        self.file = open(path.with_suffix(".bin"), "wb")  # noqa: SIM115 (closed by `close`)
        self.index = path.with_name(f"{path.name}_index.npy")
        self.lengths: list[int] = []

    def add(self, value: bytes) -> None:
        self.file.write(value)
        self.lengths.append(len(value))

    def close(self) -> None:
        self.file.close()
        lengths = np.array(self.lengths, np.int64)
        np.save(self.index, np.stack([np.cumsum(lengths) - lengths, lengths], 1))


class SplitWriter:
    """Writes one split row by row with bounded memory; the files are whole after `close()`."""

    def __init__(
        self,
        data_dir: Path,
        name: str,
        size: int,
        classes: Sequence[str],
        *,
        memmap: bool,
        masks: bool = False,
        boxes: bool = False,
        shard_bytes: int = SHARD_BYTES,
    ):
        self.data_dir, self.name, self.size = Path(data_dir), name, size
        self.memmap, self.shard_bytes = memmap, shard_bytes
        self.schema = _schema(classes, boxes)
        self.folder = self.data_dir / name
        self.folder.mkdir(parents=True, exist_ok=True)
        self.images = NpyWriter(self.folder / "images.npy", (size, size, 3)) if memmap else None
        self.masks = None
        if masks and memmap:
            self.masks = NpyWriter(self.folder / "masks.npy", (size, size))
        elif masks:
            self.masks = BytesWriter(self.folder / "masks")
        self.boxes: list[np.ndarray] | None = [] if boxes else None
        self.labels: list[int] = []
        self.rows: list[dict] = []
        self.parts: list[Path] = []
        self.writer: pq.ParquetWriter | None = None
        self.group_bytes = self.part_bytes = 0

    def add(
        self,
        name: str,
        encoded: bytes,
        label: int,
        image: np.ndarray,
        mask: np.ndarray | None = None,
        boxes: Sequence[Box] = (),
        shape: tuple[int, int] | None = None,
    ) -> None:
        """One image: its name and bytes, label (-1 = none), S x S square; mask (H, W) uint8 and
        boxes (x, y, width, height, class) of the original, whose height and width are `shape`
        (None: the square's).
        """
        row = {"image": {"bytes": encoded, "path": name}, "label": label}
        row["objects"] = {
            "bbox": [box[:4] for box in boxes],
            "category": [int(box[4]) for box in boxes],
        }
        self.rows.append(row)
        self.labels.append(label)
        if self.images:
            self.images.add(image)
        if isinstance(self.masks, NpyWriter):
            self.masks.add(square(mask, self.size, nearest=True))
        elif self.masks:
            self.masks.add(encode_png(mask))
        if self.boxes is not None:
            found = np.array(boxes, np.float64).reshape(-1, 5)
            if self.memmap:
                found = square_boxes(found, *(shape or image.shape[:2]), self.size)
            self.boxes.append(found.astype(np.float32))
        self.group_bytes += len(encoded)
        if len(self.rows) >= GROUP_ROWS or self.group_bytes >= GROUP_BYTES:
            self._flush()

    def _flush(self) -> None:
        if not self.rows:
            return
        if self.writer is None:
            self.parts.append(self.data_dir / f".{self.name}-{len(self.parts):05d}.parquet")
            self.writer = _open(self.parts[-1], self.schema)
        columns = {name: [row[name] for row in self.rows] for name in self.schema.names}
        self.writer.write_table(pa.table(columns, schema=self.schema))
        self.part_bytes += self.group_bytes
        self.rows, self.group_bytes = [], 0
        if self.part_bytes >= self.shard_bytes:
            self._end_part()

    def _end_part(self) -> None:
        if self.writer is not None:
            self.writer.close()
        self.writer, self.part_bytes = None, 0

    def close(self) -> np.ndarray:
        """Finish all files; returns the labels, (N,) int64."""
        self._flush()
        if not self.parts:  # a split without rows is still a file that can be read
            self.parts.append(self.data_dir / f".{self.name}-00000.parquet")
            self.writer = _open(self.parts[0], self.schema)
        self._end_part()
        for array in (self.images, self.masks):
            if array:
                array.close()
        labels = np.array(self.labels, np.int64)
        np.save(self.folder / "labels.npy", labels)
        if self.boxes is not None:
            counts = [0, *(len(boxes) for boxes in self.boxes)]
            np.save(self.folder / "boxes_start.npy", np.cumsum(counts, dtype=np.int64))
            np.save(self.folder / "boxes.npy", np.concatenate([NO_BOXES, *self.boxes]))
        for k, part in enumerate(self.parts):
            part.rename(self.data_dir / f"{self.name}-{k:05d}-of-{len(self.parts):05d}.parquet")
        if not self.memmap:
            files = sorted(self.data_dir.glob(f"{self.name}-?????-of-?????.parquet"))
            index = [np.insert(_places(path), 0, k, axis=1) for k, path in enumerate(files)]
            np.save(self.folder / "index.npy", np.concatenate(index))
        return labels


def _open(path: Path, schema: pa.Schema) -> pq.ParquetWriter:
    return pq.ParquetWriter(
        path, schema, compression="none", use_dictionary=False, write_statistics=False
    )


def _schema(classes: Sequence[str], boxes: bool) -> pa.Schema:
    """Arrow schema, with the metadata by which `datasets.load_dataset` knows images and classes."""
    fields = [pa.field("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())]))]
    features: dict = {"image": {"_type": "Image"}}
    if classes:
        features["label"] = {"names": list(classes), "_type": "ClassLabel"}
        fields.append(pa.field("label", pa.int64()))
    if boxes:
        four = {"feature": {"dtype": "float32", "_type": "Value"}, "length": 4, "_type": "Sequence"}
        category = features.get("label", {"dtype": "int64", "_type": "Value"})
        features["objects"] = {
            "bbox": {"feature": four, "_type": "Sequence"},
            "category": {"feature": category, "_type": "Sequence"},
        }
        kinds = [("bbox", pa.list_(pa.list_(pa.float32(), 4))), ("category", pa.list_(pa.int64()))]
        fields.append(pa.field("objects", pa.struct(kinds)))
    return pa.schema(fields, {"huggingface": json.dumps({"info": {"features": features}})})


def _places(path: Path) -> np.ndarray:
    """Byte offset and length of each image in a plain parquet file, (N, 2) int64.

    Parquet does not say where a value lies. A plain value is its length (4 bytes, little-endian)
    and then its bytes; between pages lies a short header. So every value is searched for, one row
    group after the other, and its place cannot be wrong.
    """
    parquet, found = pq.ParquetFile(path), []
    for group in range(parquet.num_row_groups):
        meta = parquet.metadata.row_group(group)
        chunks = [meta.column(j) for j in range(meta.num_columns)]
        chunk = next(chunk for chunk in chunks if chunk.path_in_schema == "image.bytes")
        start = chunk.data_page_offset
        with open(path, "rb") as file:
            file.seek(start)
            data, cursor = file.read(chunk.total_compressed_size), 0
        for row in parquet.read_row_group(group, columns=["image.bytes"])["image"]:
            value = row["bytes"].as_py()
            place = data.find(len(value).to_bytes(4, "little") + value, cursor)
            if place < 0:
                raise RuntimeError(
                    f"{path}: row {len(found)} is not stored plain; index.npy cannot be written"
                )
            found.append((start + place + 4, len(value)))
            cursor = place + 4 + len(value)
    return np.array(found, np.int64).reshape(-1, 2)

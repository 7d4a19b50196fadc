"""The data set on disk: what the data stage writes and every later stage reads.

    data.json                        facts: classes, mean, std, counts, hash, duplicates, quarantine
    quarantine.jsonl                 one line per image that could not be used
    train-00000-of-00001.parquet     Hugging Face layout: image {bytes, path}, label; objects {bbox,
    category}
                                     where the source has boxes
    train/labels.npy                 (N,) int64, -1 = no label train/images.npy                 (N,
    S, S, 3) uint8; mode "memmap" only train/masks.npy                  (N, S, S) uint8; only where
    the source has masks train/index.npy                  (N, 3) int64: shard, byte offset, length
    of each image; mode "shards"

The parquet files hold the original bytes of every image (PNG for rendered ones), so nothing is lost
by resizing. Mode "memmap" adds the decoded squares: decode once, then read at memory speed. Mode
"shards" is for sets that do not fit: images are decoded when asked for. Parquet has no random
access to a value, so these files are written plain (no compression, which encoded images would not
profit from, and no dictionary): a value then lies in the file as it is, and index.npy says where.
Row i is the same image in every file.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from stages.kit.data.decode import Pixels, cores, decode, ordered_map, square

if TYPE_CHECKING:
    import torch

GROUP_ROWS, GROUP_BYTES = (
    256,
    16 << 20,
)  # a row group, and with it the writer's memory, ends at either
SHARD_BYTES = 256 << 20
OPEN_SHARDS = 512  # at a time; a process may often open 1024 files


def info(data_dir: Path | str) -> dict:
    """The facts in data.json. Raises FileNotFoundError when the folder holds no data set."""
    path = Path(data_dir) / "data.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"no data set in {data_dir} (data.json is missing): run `python -m stages.data` first"
        )
    return json.loads(path.read_text())


class Split:
    """One split of a stored data set; open it with `Split.open(data_dir, "train")`.

    labels: (N,) int64, -1 = unlabelled.  images: memory map (N, S, S, 3) uint8, or None in mode
    "shards". masks: memory map (N, S, S) uint8 (0 = background, class + 1), or None.  classes:
    their names.
    """

    def __init__(self, data_dir: Path, name: str, facts: dict):
        self.data_dir, self.name, self.facts = Path(data_dir), name, facts
        self.mode, self.size, self.classes = facts["mode"], facts["store_size"], facts["classes"]
        self.labels = np.load(self.data_dir / name / "labels.npy")
        self.images = self._map("images") if self.mode == "memmap" else None
        self.masks = self._map("masks")
        self._index = None if self.mode == "memmap" else np.load(self.data_dir / name / "index.npy")
        files = self.files()
        self._shard = lru_cache(OPEN_SHARDS)(lambda shard: open(files[shard], "rb", buffering=0))  # noqa: SIM115

    @classmethod
    def open(cls, data_dir: Path | str, name: str) -> Split:
        """Raises FileNotFoundError (no data set there) or ValueError (no such split)."""
        facts = info(data_dir)
        if name not in facts["splits"]:
            near = difflib.get_close_matches(name, facts["splits"], 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"{data_dir}: no split {name!r}, found {', '.join(facts['splits'])}{hint}"
            )
        return cls(Path(data_dir), name, facts)

    def __len__(self) -> int:
        return len(self.labels)

    def _map(self, name: str) -> np.ndarray | None:
        path = self.data_dir / self.name / f"{name}.npy"
        return np.load(path, mmap_mode="r") if path.is_file() else None

    def files(self) -> list[Path]:
        """The parquet files of this split, in order of rows."""
        return sorted(self.data_dir.glob(f"{self.name}-?????-of-?????.parquet"))

    def names(self) -> list[str]:
        """Where each image came from: path inside its source, (N,) strings. Reads only that column."""
        tables = (pq.ParquetFile(path).read(columns=["image.path"]) for path in self.files())
        return [row["path"] for table in tables for row in table["image"].to_pylist()]

    def encoded(self, i: int) -> bytes:
        """Bytes of the original file of row i; mode "shards" only (ValueError otherwise)."""
        if self._index is None:
            raise ValueError(
                f"{self.data_dir}: encoded bytes are indexed in mode 'shards' only; read the parquet file"
            )
        shard, offset, length = (int(v) for v in self._index[i])
        # Not mapped: pages once read would count as this process's memory, up to the size of the
        # set. The name keeps
        # the file open where threads that open the same one, or the next ones, drive it out of the
        # cache.
        file = self._shard(shard)
        return os.pread(file.fileno(), length, offset)

    def decode(self, i: int) -> np.ndarray:
        """Row i as stored, (H, W, 3) uint8: the S x S square of mode "memmap", the whole original
        in mode "shards".
        """
        return np.array(self.images[i]) if self.images is not None else decode(self.encoded(i))[0]

    def square(self, indices: Sequence[int], size: int) -> torch.Tensor:
        """Rows in the evaluation view (short side to `size`, centre square): (B, size, size, 3)
        uint8.

        In both modes the same pixels when size == store_size; otherwise mode "memmap" resizes the
        stored square.
        """
        import torch  # here, so that writing a data set needs no torch

        rows = torch.as_tensor(indices).reshape(-1).numpy()
        if self.images is not None and self.size == size:
            return torch.from_numpy(np.asarray(self.images[rows]))
        images = ordered_map(
            lambda i: square(self.decode(i), size), rows, min(4, cores(), len(rows))
        )
        out = np.empty((len(rows), size, size, 3), np.uint8)
        for place, image in zip(out, images, strict=True):
            place[...] = image
        return torch.from_numpy(out)


class NpyWriter:
    """Rows appended to an .npy file whose length is known only at the end: the header has room to
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
        self.data_dir, self.name, self.memmap, self.shard_bytes = (
            Path(data_dir),
            name,
            memmap,
            shard_bytes,
        )
        self.schema = _schema(classes, boxes)
        folder = self.data_dir / name
        self.images = NpyWriter(folder / "images.npy", (size, size, 3)) if memmap else None
        self.masks = NpyWriter(folder / "masks.npy", (size, size)) if masks else None
        folder.mkdir(parents=True, exist_ok=True)
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
        boxes: Sequence[tuple[float, float, float, float, int]] = (),
    ) -> None:
        """One image: its name and bytes, label (-1 none), S x S square, S x S mask, boxes (x, y, w,
        h, class) in pixels.
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
        if self.masks:
            self.masks.add(mask)
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
        np.save(self.data_dir / self.name / "labels.npy", labels)
        for k, part in enumerate(self.parts):
            part.rename(self.data_dir / f"{self.name}-{k:05d}-of-{len(self.parts):05d}.parquet")
        if not self.memmap:
            files = sorted(self.data_dir.glob(f"{self.name}-?????-of-?????.parquet"))
            index = [np.insert(_offsets(path), 0, k, axis=1) for k, path in enumerate(files)]
            np.save(self.data_dir / self.name / "index.npy", np.concatenate(index))
        return labels


def _open(path: Path, schema: pa.Schema) -> pq.ParquetWriter:
    return pq.ParquetWriter(
        path, schema, compression="none", use_dictionary=False, write_statistics=False
    )


def _schema(classes: Sequence[str], boxes: bool) -> pa.Schema:
    """Arrow schema plus the metadata by which `datasets.load_dataset` knows images and class names."""
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


def _offsets(path: Path) -> np.ndarray:
    """Byte offset and length of each image in a plain parquet file, (N, 2) int64.

    A plain value is its length (4 bytes, little-endian) and its bytes; between pages lies a short
    header. Every place is found by looking for the value itself, one row group after the other, so
    it cannot be wrong.
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


class Tally:
    """What is counted while a split is written: content hash, statistics, the digest of every
    image.
    """

    def __init__(self):
        self.digests = bytearray()
        self.hasher = hashlib.sha256()
        self.sums, self.pixels, self.upscaled = np.zeros((2, 3), np.int64), 0, 0
        self.converted: Counter = Counter()

    def add(
        self, image: Pixels, label: int, mask: np.ndarray | None = None, boxes: Sequence = ()
    ) -> None:
        self.digests += image.digest
        self.hasher.update(image.digest + label.to_bytes(8, "little", signed=True))
        if mask is not None:
            self.hasher.update(mask.tobytes() + repr(tuple(boxes)).encode())
        self.sums += image.sums
        self.pixels += image.square.shape[0] * image.square.shape[1]
        self.upscaled += image.short < len(image.square)
        self.converted.update(image.notes)

    def statistics(self) -> dict[str, list[float]]:
        """Exact mean and std of [0, 1] pixels; std at least one grey level, so that one may divide."""
        mean = self.sums[0] / self.pixels
        variance = np.maximum(self.sums[1] / self.pixels - mean**2, 1.0)
        return {
            "mean": [round(float(v), 6) for v in mean / 255],
            "std": [round(float(v), 6) for v in variance**0.5 / 255],
        }


def duplicates(digests: dict[str, bytearray]) -> dict:
    """Exact repeats: `within` counts images beyond the first of their kind in a split, `across`
    those of the second split that the first holds too, `groups` lists the first 100 as [(split,
    row), ...].
    """
    names = list(digests)
    keys = {s: np.frombuffer(bytes(d), [("a", "<u8"), ("b", "<u8")]) for s, d in digests.items()}
    everything = np.concatenate([keys[s] for s in names])
    inverse, counts = np.unique(everything, return_inverse=True, return_counts=True)[1:]
    place = np.concatenate([np.full(len(keys[s]), k) for k, s in enumerate(names)])
    row = np.concatenate([np.arange(len(keys[s])) for s in names])
    members = {
        s: set(inverse[(place == k) & (counts[inverse] > 1)].tolist()) for k, s in enumerate(names)
    }
    across = {}
    for i, one in enumerate(names):
        for k, other in enumerate(names[i + 1 :], i + 1):
            across[f"{one}-{other}"] = (
                sum(kind in members[one] for kind in inverse[place == k].tolist())
                if members[one]
                else 0
            )
    repeated = np.flatnonzero(counts[inverse] > 1)
    groups: dict[int, list] = {}
    for j in repeated.tolist():
        groups.setdefault(int(inverse[j]), []).append((names[place[j]], int(row[j])))
    within = {s: int(len(keys[s]) - len(np.unique(keys[s]))) for s in names}
    return {
        "within": within,
        "across": across,
        "groups": [group[:20] for group in list(groups.values())[:100]],
    }

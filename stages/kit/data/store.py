"""The data set on disk, as every later stage reads it (writer.py writes it).

    data.json                      facts: classes, mean, std, counts, hash, duplicates, quarantine
    quarantine.jsonl               one line per image that could not be used
    train-00000-of-00001.parquet   Hugging Face layout: image {bytes, path}, label, and objects
                                   {bbox, category} where the source has boxes
    train/labels.npy               (N,) int64, -1 = no label
    train/images.npy               (N, S, S, 3) uint8; mode "memmap" only
    train/index.npy                (N, 3) int64: file, byte offset and length of each image in the
                                   parquet files; mode "shards" only
    train/masks.npy                (N, S, S) uint8: 0 = background, class + 1; mode "memmap", where
                                   the source has masks
    train/masks.bin                the same in mode "shards": a PNG file per image, of its own size,
    train/masks_index.npy          and (N, 2) int64: offset and length of each
    train/boxes.npy                (M, 5) float32: x, y, width, height in pixels, class; where the
                                   source has boxes
    train/boxes_start.npy          (N + 1,) int64: image i has the rows start[i] to start[i + 1]

Row i is the same image in every file. The parquet files hold the original bytes of every image (PNG
for rendered ones), so nothing is lost, and other programs can read them.

There are two modes. `data.memory_map_gb` chooses: "memmap" for sets no larger than that.

* "memmap" holds every image decoded once, as a square of S = store_size pixels: short side to S,
  then the centre square. It is read at memory speed. Random crops are cut from these squares: what
  lies beside the centre square is never seen, and a small crop is enlarged from S pixels.
* "shards" is for sets that do not fit. Images are decoded each time they are asked for. Random
  crops are cut from the whole original, at its own resolution.

So the mode changes what a training sees. Masks and boxes always belong to what `Split.decode`
gives: the square or the original.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow.parquet as pq

from stages.kit.data.decode import Range, decode_all, decode_mask, square
from stages.kit.data.threads import ordered_map
from workflow.machine import cores
from workflow.plugins import did_you_mean

if TYPE_CHECKING:
    import torch

SPLITS = ("train", "val", "test")
# Facts of which the report and messages tell, and which no training or task reads.
TOLD = (
    *("source", "ignored", "auto_range", "duplicates", "near_duplicates", "levels", "darkest"),
    *("brightest", "quarantine", "converted", "upscaled", "warnings"),
)
OPEN_SHARDS = 512  # at a time; a process may often open 1024 files


def info(data_dir: Path | str) -> dict:
    """The facts in data.json. Raises FileNotFoundError when the folder holds no data set."""
    path = Path(data_dir) / "data.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"no data set in {data_dir} (data.json is missing): run `python -m stages.data` first"
        )
    return json.loads(path.read_text())


def learnt(facts: dict) -> dict:
    """Those facts that a result may depend on: a job is not run again where others change."""
    return {name: value for name, value in facts.items() if name not in TOLD}


class Split:
    """One split of a stored data set; open it with `Split.open(data_dir, "train")`.

    labels: (N,) int64, -1 = unlabelled; classes: their names
    images: memory map (N, S, S, 3) uint8, or None in mode "shards"
    masks: memory map (N, S, S) uint8, or None in mode "shards" and where there are none; `mask(i)`
        gives one in both modes
    """

    def __init__(self, data_dir: Path, name: str, facts: dict):
        self.data_dir, self.name, self.facts = Path(data_dir), name, facts
        self.mode, self.size, self.classes = facts["mode"], facts["store_size"], facts["classes"]
        self._range = Range.of(facts)
        self.labels = self._load("labels")
        self.images = self._load("images", "r") if self.mode == "memmap" else None
        self.masks = self._load("masks", "r")
        self._index = self._load("index")
        self._masks_index = self._load("masks_index")
        self._boxes, self._boxes_start = self._load("boxes"), self._load("boxes_start")
        self._open = lru_cache(OPEN_SHARDS)(lambda path: open(path, "rb", buffering=0))  # noqa: SIM115

    @classmethod
    def open(cls, data_dir: Path | str, name: str) -> Split:
        """Raises FileNotFoundError (no data set there) or ValueError (no such split)."""
        facts = info(data_dir)
        if name not in facts["splits"]:
            raise ValueError(
                f"{data_dir}: no split {name!r}, found {', '.join(facts['splits'])}"
                f"{did_you_mean(name, facts['splits'])}"
            )
        return cls(Path(data_dir), name, facts)

    def __len__(self) -> int:
        return len(self.labels)

    def _load(self, name: str, mode: str | None = None) -> np.ndarray | None:
        path = self.data_dir / self.name / f"{name}.npy"
        return np.load(path, mmap_mode=mode) if path.is_file() else None

    def files(self) -> list[Path]:
        """The parquet files of this split, in order of rows."""
        return sorted(self.data_dir.glob(f"{self.name}-?????-of-?????.parquet"))

    @cached_property
    def _files(self) -> list[Path]:
        return self.files()

    def names(self) -> list[str]:
        """Where each image came from: (N,) paths inside its source. Reads only that column."""
        tables = (pq.ParquetFile(path).read(columns=["image.path"]) for path in self.files())
        return [row["path"] for table in tables for row in table["image"].to_pylist()]

    def encoded(self, i: int) -> bytes:
        """Bytes of the original file of row i; mode "shards" only (ValueError otherwise)."""
        if self._index is None:
            raise ValueError(
                f"{self.data_dir}: encoded bytes are indexed in mode 'shards' only; "
                "read the parquet file"
            )
        shard, offset, length = self._index[i].tolist()
        return self._read(self._files[shard], offset, length)

    def _read(self, path: Path, offset: int, length: int) -> bytes:
        """Bytes of a file, which is read and not mapped: pages of a map, once read, would count as
        this process's memory, up to the size of the set.
        """
        # `file` must be a name: another thread may drive the entry out of the cache, and the file
        # would be closed as soon as nothing holds it.
        file = self._open(path)
        return os.pread(file.fileno(), length, offset)

    def decode(self, i: int) -> np.ndarray:
        """Row i, (H, W, 3) uint8: the square of mode "memmap", the whole original in mode
        "shards".
        """
        return (
            np.array(self.images[i])
            if self.images is not None
            else decode_all(self.encoded(i), self._range).pixels
        )

    def mask(self, i: int) -> np.ndarray:
        """The mask of what `decode(i)` gives, (H, W) uint8: 0 = background, class + 1. ValueError
        if there are none.
        """
        if self.masks is not None:
            return np.array(self.masks[i])
        if self._masks_index is None:
            raise ValueError(self._none("masks"))
        path = self.data_dir / self.name / "masks.bin"
        return decode_mask(self._read(path, *self._masks_index[i].tolist()))

    def boxes(self, i: int) -> np.ndarray:
        """The boxes in what `decode(i)` gives, (m, 5) float32: x, y, width, height in its pixels,
        class. They may reach beyond its edges. ValueError if there are none.
        """
        if self._boxes is None:
            raise ValueError(self._none("boxes"))
        return self._boxes[self._boxes_start[i] : self._boxes_start[i + 1]]

    @cached_property
    def most_boxes(self) -> int:
        """The largest number of boxes of any image. ValueError if there are none."""
        if self._boxes is None:
            raise ValueError(self._none("boxes"))
        return int(np.diff(self._boxes_start).max(initial=0))

    def _none(self, what: str) -> str:
        source = self.facts.get("source", "its source")
        return f"{self.data_dir}: {what} are needed, but {source} gives none for {self.name}"

    def square(self, indices: Sequence[int], size: int, crop: float = 1.0) -> torch.Tensor:
        """Rows in the evaluation view (short side to `size`, centre square): (B, size, size, 3)
        uint8.

        crop: the share of the short side that is seen; it is resized to size / crop. In both modes
        the same pixels when size / crop == store_size; otherwise mode "memmap" resizes the stored
        square.
        """
        import torch  # here, so that writing a data set needs no torch

        rows, short = torch.as_tensor(indices).reshape(-1).numpy(), int(size / crop)
        if self.images is not None and self.size == size == short:
            return torch.from_numpy(np.asarray(self.images[rows]))
        threads = min(4, cores(), len(rows))
        images = ordered_map(
            lambda i: square(self.decode(i), size, short=short), rows, threads if threads > 1 else 0
        )
        out = np.empty((len(rows), size, size, 3), np.uint8)
        for place, image in zip(out, images, strict=True):
            place[...] = image
        return torch.from_numpy(out)

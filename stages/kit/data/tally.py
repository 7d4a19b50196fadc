"""What the data stage counts: the content hash and statistics of a split, and exact duplicates."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence

import numpy as np

from stages.kit.data.decode import Pixels


class Tally:
    """What is counted while a split is written: content hash, statistics, digest of every image."""

    def __init__(self):
        self.digests, self.looks = bytearray(), bytearray()
        self.hasher = hashlib.sha256()
        self.sums, self.pixels, self.upscaled = np.zeros((2, 3), np.int64), 0, 0
        self.converted: Counter = Counter()
        self.darkest, self.brightest = 255, 0
        self.levels: dict[str, tuple[float, float]] = {}  # of 16-bit and float images

    def add(
        self, image: Pixels, label: int, mask: np.ndarray | None = None, boxes: Sequence = ()
    ) -> None:
        """One image with its label, and its mask and boxes as the source has them."""
        self.digests += image.digest
        self.looks += image.look
        self.hasher.update(image.digest + label.to_bytes(8, "little", signed=True))
        if mask is not None:
            self.hasher.update(f"mask {mask.shape}".encode() + np.ascontiguousarray(mask).data)
        if len(boxes):
            self.hasher.update(f"boxes {len(boxes)}".encode() + np.array(boxes, "<f8").tobytes())
        self.sums += image.sums
        self.pixels += image.square.shape[0] * image.square.shape[1]
        self.upscaled += min(image.shape) < len(image.square)
        self.converted.update(image.notes)
        self.darkest = min(self.darkest, int(image.square.min()))
        self.brightest = max(self.brightest, int(image.square.max()))
        if image.levels:
            kind, (low, high) = image.notes[-1], image.levels
            before = self.levels.get(kind, image.levels)
            self.levels[kind] = min(before[0], low), max(before[1], high)

    def statistics(self) -> dict[str, list[float]]:
        """Exact mean and std of pixels in [0, 1]. std is at least one grey level, so that one may
        divide by it.
        """
        mean = self.sums[0] / self.pixels
        variance = np.maximum(self.sums[1] / self.pixels - mean**2, 1.0)
        return {
            "mean": [round(float(v), 6) for v in mean / 255],
            "std": [round(float(v), 6) for v in variance**0.5 / 255],
        }


def duplicates(digests: dict[str, bytearray]) -> dict:
    """Images whose decoded pixels are exactly equal. `digests`: split -> 16 bytes for each image.

    "within": split -> images beyond the first of their kind; "across": "one-other" -> images of
    the other split that the one holds too; "groups": the first 100 groups of equal images, as lists
    of at most 20 (split, row).
    """
    names = list(digests)
    keys = {s: np.frombuffer(bytes(d), [("a", "<u8"), ("b", "<u8")]) for s, d in digests.items()}
    kinds, counts = np.unique(
        np.concatenate([keys[s] for s in names]), return_inverse=True, return_counts=True
    )[1:]
    # kinds: (N,) the kind of each image of all splits; counts: images of each kind
    place = np.concatenate([np.full(len(keys[s]), k) for k, s in enumerate(names)])
    row = np.concatenate([np.arange(len(keys[s])) for s in names])
    repeated = counts[kinds] > 1
    held = [set(kinds[(place == k) & repeated].tolist()) for k in range(len(names))]

    across = {}
    for i, one in enumerate(names):
        for k, other in enumerate(names[i + 1 :], i + 1):
            also = kinds[(place == k) & repeated].tolist()
            across[f"{one}-{other}"] = sum(kind in held[i] for kind in also)
    groups: dict[int, list] = {}
    for j in np.flatnonzero(repeated).tolist():
        groups.setdefault(int(kinds[j]), []).append((names[place[j]], int(row[j])))
    return {
        "within": {s: int(len(keys[s]) - len(np.unique(keys[s]))) for s in names},
        "across": across,
        "groups": [group[:20] for group in list(groups.values())[:100]],
    }

"""Images that look alike: the same photo scaled, compressed anew, or a little brighter.

`look` is a difference hash: the image is shrunk to a few cells of grey, and each bit says whether a
cell is brighter than its neighbour, 64 times to the right and 64 times down. Two images are near
when at most BITS of the 128 bits differ, and their greys correlate (`confirmed`). It is a hint, no
proof:

* an image that was cropped, mirrored, turned or written upon is not found;
* different images of one scene, or on one plain ground, may be counted;
* images without structure (one colour, or one slope) are left out, as all of them look alike.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image

BITS = 6  # of 128 that may differ
BANDS = 8  # of 16 bits: of two images that differ in fewer bits than bands, one band is the same
PLAIN = 20  # bits set, or not set, below which an image has no structure
GRID, LIKE, CHECKED = 16, 0.97, 2000  # cells a side, correlation at least, pairs at most
MOST = 50  # images of one split that are compared to one image of another, for each band


def look(image: np.ndarray) -> bytes:
    """(S, S, 3) uint8 -> 16 bytes that are nearly the same for images that look alike."""
    grey = Image.fromarray(image).convert("L")
    rows = np.asarray(grey.resize((9, 8), Image.Resampling.BOX)).astype(np.int16)
    columns = np.asarray(grey.resize((8, 9), Image.Resampling.BOX)).astype(np.int16)
    bits = np.concatenate(
        [(np.diff(rows, axis=1) > 0).ravel(), (np.diff(columns, axis=0) > 0).ravel()]
    )
    return np.packbits(bits).tobytes()


def near_duplicates(looks: dict[str, bytearray], digests: dict[str, bytearray]) -> dict:
    """Images of one split that look like one of another, without those whose pixels are equal.

    looks, digests: split -> 16 bytes of each image. "across": "one-other" -> how many images of
    the other split; "pairs": lists of (split, row).
    """
    names = list(looks)
    table = {s: np.frombuffer(bytes(v), np.uint8).reshape(-1, 16) for s, v in looks.items()}
    exact = {s: np.frombuffer(bytes(v), "V16") for s, v in digests.items()}
    across, pairs = {}, []
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            known, asked = _alike(table[one], table[other])
            new = exact[one][known] != exact[other][asked]
            new &= ~np.isin(exact[other][asked], exact[one])
            across[f"{one}-{other}"] = len(np.unique(asked[new]))
            found = zip(known[new].tolist(), asked[new].tolist(), strict=True)
            pairs += [[(one, a), (other, b)] for a, b in found]
    return {"across": across, "pairs": pairs}


def confirmed(near: dict, pictures: Callable[[str, int], np.ndarray]) -> dict:
    """Those pairs whose pictures look alike: of the first CHECKED, the ones whose greys in a grid
    of cells rise and fall together. `pictures`: (split, row) -> (S, S, 3) uint8.
    """
    across, pairs, seen = dict.fromkeys(near["across"], 0), [], set()
    for one, other in near["pairs"][:CHECKED]:
        if _together(pictures(*one), pictures(*other)) >= LIKE:
            pairs.append([one, other])
            across[f"{one[0]}-{other[0]}"] += (one[0], *other) not in seen
            seen.add((one[0], *other))
    return {"across": across, "pairs": pairs[:100]}


def _together(*images: np.ndarray) -> float:
    """The correlation of two images, each as a grid of cells."""
    cells = [
        np.asarray(
            Image.fromarray(image).convert("L").resize((GRID, GRID), Image.Resampling.BOX), float
        ).ravel()
        for image in images
    ]
    one, other = (values - values.mean() for values in cells)
    length = np.sqrt((one @ one) * (other @ other))
    return float(one @ other / length) if length else 0.0


def _alike(known: np.ndarray, asked: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows of both, (k,) each, that are near: the nearest known one of each that is asked."""
    best = np.full(len(asked), 999)
    which = np.full(len(asked), -1)
    structured = [np.flatnonzero(_structured(rows)) for rows in (known, asked)]
    for band in range(BANDS):
        keys = [
            np.ascontiguousarray(rows[own, 2 * band : 2 * band + 2]).view(np.uint16).ravel()
            for rows, own in zip((known, asked), structured, strict=True)
        ]
        order = np.argsort(keys[0], kind="stable")
        first = np.searchsorted(keys[0][order], keys[1], "left")
        last = np.searchsorted(keys[0][order], keys[1], "right")
        for step in range(int(min(MOST, (last - first).max(initial=0)))):
            rows = np.flatnonzero(first + step < last)
            one, other = structured[0][order[first[rows] + step]], structured[1][rows]
            apart = np.bitwise_count(known[one] ^ asked[other]).sum(1)
            closer = apart < best[other]
            best[other[closer]], which[other[closer]] = apart[closer], one[closer]
    found = np.flatnonzero(best <= BITS)
    return which[found], found


def _structured(rows: np.ndarray) -> np.ndarray:
    halves = np.bitwise_count(rows).reshape(-1, 2, 8).sum(2)
    total = halves.sum(1)
    return (total >= PLAIN) & (total <= 128 - PLAIN)

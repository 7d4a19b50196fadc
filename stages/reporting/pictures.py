"""Pictures inside a page that needs no other file."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image


def picture(path: Path, widest: int = 1000, limit: int = 160_000) -> tuple[str, int, int]:
    """(data URI, width, height) of a picture file: at most `widest` pixels wide, small ones
    enlarged by whole factors.

    Lossless WebP unless that exceeds `limit` bytes, then quality 82. Raises OSError for what is not
    a picture.
    """
    with Image.open(path) as image:
        image = image.convert("RGB")
    return embed(np.asarray(image), widest, limit)


def embed(pixels: np.ndarray, widest: int = 1000, limit: int = 160_000) -> tuple[str, int, int]:
    """As `picture`, for uint8 (H, W, 3)."""
    image = Image.fromarray(pixels)
    if image.width > widest:
        image = image.resize(
            (widest, max(1, round(image.height * widest / image.width))), Image.Resampling.LANCZOS
        )
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", lossless=True, quality=60, method=4)
    if buffer.tell() > limit:
        buffer = io.BytesIO()
        image.save(buffer, "WEBP", quality=82, method=4)
    return (
        f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}",
        image.width,
        image.height,
    )


def sheet(images: Sequence[np.ndarray], columns: int, side: int, gap: int = 2) -> np.ndarray:
    """Square uint8 images (S, S, 3) in rows of `columns`, each enlarged or reduced to `side`; the
    gaps are mid grey.
    """
    rows = max(1, math.ceil(len(images) / columns))
    canvas = np.full((rows * (side + gap) - gap, columns * (side + gap) - gap, 3), 128, np.uint8)
    for n, pixels in enumerate(images):
        how = Image.Resampling.NEAREST if side % pixels.shape[0] == 0 else Image.Resampling.LANCZOS
        tile = np.asarray(Image.fromarray(pixels).resize((side, side), how))
        y, x = n // columns * (side + gap), n % columns * (side + gap)
        canvas[y : y + side, x : x + side] = tile
    return canvas


def pictures(folder: Path, most: int = 8) -> list[dict]:
    """The pictures that a stage left in <folder>/pictures, ready to be embedded: uri, width,
    height, name.
    """
    found = sorted((folder / "pictures").glob("*.png"))[:most]
    return [
        dict(
            zip(("uri", "width", "height"), picture(path), strict=True),
            name=path.stem.replace("_", " "),
        )
        for path in found
    ]


def samples(folder: Path, data: dict, most: int = 48) -> dict | None:
    """Training images, up to eight of each class, or any, evenly spread; None without any."""
    from stages.kit.data import store  # imports torch: seconds, and only needed here

    if not data["splits"]["train"]["count"]:
        return None
    split = store.Split.open(folder, "train")
    classes = len(data["classes"]) if 0 < len(data["classes"]) <= 12 else 0
    groups = [np.flatnonzero(split.labels == c)[:8] for c in range(classes)] if classes else []
    spread = np.linspace(0, len(split) - 1, min(most, len(split))).astype(int)
    index = np.concatenate(groups) if any(len(g) for g in groups) else spread
    side = min(96, max(64, data["image_size"] // 32 * 32))
    tiles = split.square(index, data["image_size"]).numpy()
    uri, width, height = embed(sheet(list(tiles), 8, side))
    return {"uri": uri, "width": width, "height": height, "classes": bool(classes)}

"""Encoded image bytes -> uint8 pixels, or a reason why not.

`decode` is the only place where foreign files are opened. It converts what can be converted (CMYK,
16-bit, palette, alpha, grey, EXIF orientation, first frame of an animation) and raises `Broken`
with a short reason for the rest, so that the caller can put the file aside. Choices that are ours:

* Transparent pixels are laid over white. Without alpha, whatever colour lies hidden beneath would
  show.
* 16-bit values are divided by 257: full range to full range. They are never stretched per image, so
  that brightness stays comparable.
* Only common photo formats are tried. So a file cannot reach the decoders that call other programs
  (EPS, PDF).
* The number of pixels is checked in the header before anything is unpacked.
"""

from __future__ import annotations

import hashlib
import io
import warnings
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

MAX_PIXELS = 89_478_485  # Pillow's default limit: 256 MiB as RGB
# Aspect ratio beyond which the far ends, which never reach the centre square, are cut off early.
LONGEST = 16
EXTENSIONS = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".gif", ".bmp", ".dib", ".tif", ".tiff"}
EXTENSIONS |= {".webp", ".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".avif", ".mpo"}

Image.init()
FORMATS = tuple(
    name
    for name in ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "JPEG2000", "AVIF", "MPO")
    if name in Image.OPEN
)
# `decode` checks the size itself.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class Broken(ValueError):
    """An image that cannot be used. `reason` is a short word, to be counted; `detail` is what the
    decoder said.
    """

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


def decode(data: bytes, max_pixels: int = MAX_PIXELS) -> tuple[np.ndarray, tuple[str, ...]]:
    """Bytes of one image file -> (H, W, 3) uint8 RGB and the conversions that it needed, e.g.
    ("cmyk",).

    Raises `Broken` with the reason "empty", "not an image", "too many pixels", "truncated" or
    "damaged".
    """
    if not data:
        raise Broken("empty", "0 bytes")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise Broken("too many pixels", f"{width} x {height}, at most {max_pixels}")
            if width * height == 0:
                raise Broken("damaged", f"{width} x {height} pixels")
            return _rgb(image)
    except Broken:
        raise
    except Image.DecompressionBombError as error:
        raise Broken("too many pixels", str(error)) from None
    except UnidentifiedImageError:
        raise Broken("not an image", f"starts with {bytes(data[:8])!r}") from None
    except Exception as error:  # Pillow's plug-ins raise almost anything on damaged files
        text = str(error).replace("\n", " ")[:200]
        short = isinstance(error, EOFError) or "truncated" in text.lower()
        raise Broken("truncated" if short else "damaged", text or type(error).__name__) from None


def _rgb(image: Image.Image) -> tuple[np.ndarray, tuple[str, ...]]:
    """Opened image -> RGB array of its first frame, upright."""
    notes = []
    if _animated(image):
        notes.append("animated")
    image.load()  # the pixels of the first frame; raises when they are incomplete
    upright = _upright(image)
    if upright is not None:
        notes.append("rotated")
        image = upright
    mode = image.mode
    if mode == "RGB" and not image.has_transparency_data:
        return np.asarray(image), tuple(notes)
    if mode == "I" or mode == "F" or mode.startswith("I;16"):
        notes.append("16-bit" if mode != "F" else "float")
        return np.repeat(_eight_bits(np.asarray(image))[..., None], 3, axis=2), tuple(notes)
    notes.append({"1": "grey", "L": "grey", "P": "palette"}.get(mode, mode.lower()))
    if image.has_transparency_data:
        notes[-1:] = [note for note in notes[-1:] if note == "palette"] + ["alpha"]
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(image.convert("RGB")), tuple(notes)


def _animated(image: Image.Image) -> bool:
    try:
        return bool(getattr(image, "is_animated", False))
    except Exception:  # a damaged second frame is no reason to lose the first
        return False


def _upright(image: Image.Image) -> Image.Image | None:
    """The image turned as its EXIF orientation says, None when there is nothing to turn."""
    try:
        if image.getexif().get(0x0112, 1) in (0, 1):
            return None
        return ImageOps.exif_transpose(image)
    except Exception:  # unreadable EXIF: take the pixels as they lie
        return None


def _eight_bits(values: np.ndarray) -> np.ndarray:
    """(H, W) integers in 0..65535, or floats in 0..1, -> uint8. Raises `Broken` for other values,
    whose scale is not known.
    """
    low, high = values.min(), values.max()
    top = 1 if values.dtype.kind == "f" else 65535
    if not (low >= 0 and high <= top):  # written so that NaN fails too
        raise Broken("damaged", f"values {low:g} to {high:g}, expected 0 to {top} ({values.dtype})")
    return np.rint(values * (255.0 / top)).astype(np.uint8)


def square(
    image: np.ndarray, size: int, nearest: bool = False, short: int | None = None
) -> np.ndarray:
    """Evaluation transform: short side to `short` (antialiased bicubic), then the centre square.

    (H, W, 3) or (H, W) uint8 -> (size, size, ...) uint8; the same numbers as torchvision's
    Resize(short, BICUBIC) and CenterCrop(size) on a PIL image. short: None is `size`, which shows
    all of the centre square. `nearest` is for masks, whose values are names rather than amounts.
    """
    height, width = image.shape[:2]
    short = size if short is None else short
    if height == width == size == short:
        return image
    placed = _placed(height, width, short, size)
    (cut_y, cut_x), (new_height, new_width), (top, left) = placed
    if cut_y or cut_x:
        image = np.ascontiguousarray(image[cut_y : height - cut_y, cut_x : width - cut_x])
    how = Image.Resampling.NEAREST if nearest else Image.Resampling.BICUBIC
    resized = np.asarray(Image.fromarray(image).resize((new_width, new_height), how))
    return np.ascontiguousarray(resized[top : top + size, left : left + size])


def square_boxes(boxes: np.ndarray, height: int, width: int, size: int) -> np.ndarray:
    """Boxes float64 (m, 5), x, y, width, height in pixels and class, of an image of height x width
    pixels -> the same in the pixels of its `square`. They may reach beyond its edges.
    """
    if height == width == size:
        return boxes
    (cut_y, cut_x), (new_height, new_width), (top, left) = _placed(height, width, size)
    down, across = new_height / (height - 2 * cut_y), new_width / (width - 2 * cut_x)
    x, y, w, h, kind = boxes.T
    moved = [(x - cut_x) * across - left, (y - cut_y) * down - top, w * across, h * down, kind]
    return np.stack(moved, 1)


def _placed(
    height: int, width: int, size: int, window: int | None = None
) -> tuple[tuple[int, int], ...]:
    """How `square` treats an image: rows and columns cut off at either end, height and width after
    the resize to the short side `size`, top and left of the `window` (None: as large) in that.
    """
    window = size if window is None else window
    short = min(height, width)
    cut_y, cut_x = (max(0, (side - LONGEST * short) // 2) for side in (height, width))
    new = int(size * (height - 2 * cut_y) / short), int(size * (width - 2 * cut_x) / short)
    return (cut_y, cut_x), new, tuple(int(round((side - window) / 2.0)) for side in new)


@dataclass(frozen=True)
class Pixels:
    """One image ready to be stored."""

    encoded: bytes  # the file as it came; a rendered image as PNG
    square: np.ndarray  # (S, S, 3) uint8, see `square`
    digest: bytes  # of the decoded pixels at full size: equal pixels, equal digest
    notes: tuple[str, ...]  # conversions, see `decode`
    shape: tuple[int, int]  # height and width of the original
    sums: np.ndarray  # (2, 3) int64: sum and sum of squares of each channel of the square


def prepare(image: bytes | np.ndarray, size: int) -> Pixels:
    """An encoded image, or pixels (H, W, 3) uint8 -> what is stored of it. Raises `Broken`."""
    rendered = isinstance(image, np.ndarray)
    pixels, notes = (image, ()) if rendered else decode(image)
    digest = hashlib.blake2b(str(pixels.shape).encode(), digest_size=16)
    digest.update(np.ascontiguousarray(pixels))
    small = square(pixels, size)
    flat = small.reshape(-1, 3).astype(np.int64)
    sums = np.stack([flat.sum(0), (flat * flat).sum(0)])
    encoded = encode_png(pixels) if rendered else image
    return Pixels(encoded, small, digest.digest(), notes, pixels.shape[:2], sums)


def encode_png(image: np.ndarray) -> bytes:
    """(H, W, 3) or (H, W) uint8 -> PNG bytes, the same bytes every time."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", compress_level=3)
    return buffer.getvalue()


def decode_mask(data: bytes) -> np.ndarray:
    """The inverse of `encode_png` for a mask: (H, W) uint8."""
    with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
        return np.asarray(image)

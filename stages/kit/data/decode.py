"""Encoded image bytes -> uint8 pixels, or a reason why not.

`decode` is the only place where foreign files are opened. It converts what can be converted (CMYK,
16-bit, palette, alpha, grey, EXIF orientation, first frame of an animation) and raises `Broken`
with a short reason for the rest, so that the caller can put the file aside. Choices that are ours:

* Transparent pixels are laid over white. Without alpha, whatever colour lies hidden beneath would
  show.
* 16-bit values are divided by 257: full range to full range, or the range that is asked for. They
  are never stretched per image, so that brightness stays comparable.
* Only common photo formats are tried. So a file cannot reach the decoders that call other programs
  (EPS, PDF).
* The number of pixels is checked in the header before anything is unpacked.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import sys
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from stages.kit.data import libtiff, pillow
from stages.kit.data.near import look

MAX_PIXELS = 89_478_485  # unless another limit is given; Pillow's default: 256 MiB as RGB
# Aspect ratio beyond which the far ends, which never reach the centre square, are cut off early.
LONGEST = 16
EXTENSIONS = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".gif", ".bmp", ".dib", ".tif", ".tiff"}
EXTENSIONS |= {".webp", ".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".avif", ".mpo"}

GREY_ALPHA = "LA;16B"  # Pillow's name of 16-bit grey with transparency in a PNG file

Image.init()
FORMATS = tuple(
    name
    for name in ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "JPEG2000", "AVIF", "MPO")
    if name in Image.OPEN
)
Image.MAX_IMAGE_PIXELS = None  # `decode` checks the size itself
# How files begin that are taken for images -> what they are.
KINDS = (
    (b"<!doctype html", "a web page"),
    (b"<html", "a web page"),
    (b"%PDF", "a PDF document"),
    (b"%!PS", "a PostScript document"),
    (b"<?xml", "an XML file, such as SVG"),
    (b"<svg", "an SVG drawing"),
    (b"PK\3\4", "a ZIP archive"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"Rar!", "a RAR archive"),
    (b"7z\xbc\xaf", "a 7z archive"),
    (b"8BPS", "a Photoshop file"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"\x89HDF", "an HDF5 file"),
    (b"PAR1", "a Parquet table"),
    (b"version https://git-lfs", "a pointer of Git LFS, not the file itself"),
    (b"/annex/objects", "a pointer of git-annex, not the file itself"),
    (b"II*\0", "a TIFF of a kind that cannot be read"),
    (b"MM\0*", "a TIFF of a kind that cannot be read"),
    (b"II+\0", "a TIFF of a kind that cannot be read"),
    (b"FUJIFILM", "a raw photo"),
    (b"{", "JSON text"),
)
BRANDS = {b"heic": "a HEIC photo", b"heix": "a HEIC photo", b"mif1": "a HEIF photo"}
BRANDS |= {b"avif": "an AVIF photo", b"crx ": "a raw photo"}


class Broken(ValueError):
    """An image that cannot be used. `reason` is a short word, to be counted; `detail` is what the
    decoder said.
    """

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class Range:
    """What becomes black and white of a 16-bit or float image; and the pixels that are allowed."""

    span: tuple[float, float] | None = None  # None: 0 to 65535, or 0 to 1
    max_pixels: int = MAX_PIXELS

    @classmethod
    def of(cls, settings: dict) -> Range:
        """From the keys `range` and `max_pixels` of a data set's settings or facts."""
        span = settings.get("range")
        return cls(tuple(span) if span else None, settings.get("max_pixels") or MAX_PIXELS)


@dataclass(frozen=True)
class Decoded:
    """pixels: (H, W, 3) uint8; notes: the conversions that it needed; levels: the 0.1 and 99.9
    percentiles of a 16-bit or float image, of any other None; said: what Pillow and libtiff
    complained about.
    """

    pixels: np.ndarray
    notes: tuple[str, ...]
    levels: tuple[float, float] | None = None
    said: tuple[str, ...] = ()


def decode(data: bytes, max_pixels: int = MAX_PIXELS) -> tuple[np.ndarray, tuple[str, ...]]:
    """Bytes of one image file -> (H, W, 3) uint8 RGB and the conversions that it needed, e.g.
    ("cmyk",).

    Raises `Broken` with the reason "empty", "not an image", "too many pixels", "truncated" or
    "damaged".
    """
    found = decode_all(data, Range(max_pixels=max_pixels))
    return found.pixels, found.notes


def decode_all(data: bytes, how: Range) -> Decoded:
    """As `decode`, with all there is to know."""
    found = _opened(data, how.max_pixels, lambda image: _rgb(image, how.span, data))
    return dataclasses.replace(found[0], said=found[1])


def raw_levels(data: bytes, max_pixels: int = MAX_PIXELS) -> tuple[str, np.ndarray] | None:
    """("16-bit" or "float", the values) of an image of that kind, None of any other; `Broken`."""

    def values(image: Image.Image) -> tuple[str, np.ndarray] | None:
        if deep := _deep(data, image):
            return "16-bit", deep[0]
        image.load()
        return (_depth(image.mode), np.asarray(image)) if _depth(image.mode) else None

    return _opened(data, max_pixels, values)[0]


def _opened(data: bytes, max_pixels: int, work: Callable) -> tuple:
    """(what `work` makes of the opened image, what Pillow and libtiff said meanwhile)."""
    if not data:
        raise Broken("empty", "0 bytes")
    what, tiff, warned = "", [], []
    try:
        with (
            libtiff.heard() as tiff,
            pillow.heard() as warned,
            Image.open(io.BytesIO(data), formats=FORMATS) as image,
        ):
            width, height = image.size
            what = f"{image.format} of {width} x {height} pixels, mode {image.mode}"
            if width * height > max_pixels:
                raise Broken(
                    "too many pixels",
                    f"{width} x {height} ({image.format}), at most {max_pixels}; data.max_pixels "
                    "allows more",
                )
            if width * height == 0:
                raise Broken("damaged", f"{width} x {height} pixels")
            return work(image), _said(tiff, warned)
    except Broken as error:
        if error.reason != "damaged" or not what:
            raise
        raise Broken("damaged", f"{error.detail}; {what}") from None
    except UnidentifiedImageError:
        raise Broken("not an image", f"{_kind(data)}starts with {bytes(data[:8])!r}") from None
    except Exception as error:  # Pillow's plug-ins raise almost anything on damaged files
        text = str(error).replace("\n", " ")[:200]
        short = isinstance(error, EOFError) or "truncated" in text.lower()
        more = "".join(f"; {part}" for part in (*_said(tiff, warned), what) if part)
        reason = "truncated" if short else "damaged"
        raise Broken(reason, (text or type(error).__name__) + more) from None


def _said(tiff: list[str], warned: list[str]) -> tuple[str, ...]:
    return (*(f"libtiff: {text}" for text in tiff), *(f"Pillow: {text}" for text in warned))


def _kind(data: bytes) -> str:
    """What a file that is no image is, as far as its beginning tells."""
    head = bytes(data[:64]).lstrip().lower()
    if data[4:8] == b"ftyp":
        return f"{BRANDS.get(bytes(data[8:12]), 'a film')}, "
    if bytes(data[128:132]) == b"DICM":
        return "a DICOM file, "
    if not any(data[:4096]):
        return "nothing but zeros, "
    return next((f"{what}, " for start, what in KINDS if head.startswith(start.lower())), "")


def _depth(mode: str) -> str | None:
    """The kind of an image with one channel of more than 8 bits."""
    if mode == "F":
        return "float"
    return "16-bit" if mode == "I" or mode.startswith("I;16") else None


def _levels(values: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(values[np.isfinite(values)], (0.1, 99.9))
    return float(low), float(high)


def _is_deep(image: Image.Image) -> bool:
    """Whether colours have 16 bits, of which Pillow keeps 8."""
    return ";16" in str(image.tile[:1]) and not _depth(image.mode)


def _deep(data: bytes, image: Image.Image) -> tuple[np.ndarray, np.ndarray | None] | None:
    """All bits of 16-bit colours: (H, W, 3) uint16, and the transparency (H, W) if there is any.

    Pillow keeps the upper byte of each value. Told that the bytes lie the other way round, it keeps
    the lower one. Grey with transparency it does not know so: told that the four bytes of a pixel
    are four channels, it keeps them all. None of an image that it cannot read so.
    """
    if not _is_deep(image) or image.mode not in ("RGB", "RGBA"):
        return None
    if [tile.args for tile in image.tile] == [GREY_ALPHA]:
        with Image.open(io.BytesIO(data), formats=FORMATS) as other:
            other.tile = [tile._replace(args="RGBA") for tile in other.tile]
            both = np.asarray(other).view(">u2").astype(np.uint16)
        return np.repeat(both[..., :1], 3, axis=2), both[..., 1]
    with Image.open(io.BytesIO(data), formats=FORMATS) as other:
        other.tile = [tile._replace(args=_swapped(tile.args)) for tile in other.tile]
        lower = np.asarray(other).astype(np.uint16)
    values = np.asarray(image).astype(np.uint16) * 256 + lower
    return values[..., :3], values[..., 3] if image.mode == "RGBA" else None


def _swapped(args: str | tuple) -> str | tuple:
    """The arguments of a decoder with the two bytes of each value exchanged."""
    mode, *rest = (args,) if isinstance(args, str) else args
    head, order = mode[:-1], mode[-1]
    little = order == "L" or (order == "N" and sys.byteorder == "little")
    swapped = head + ("B" if little else "L")
    return swapped if isinstance(args, str) else (swapped, *rest)


def _rgb_deep(image: Image.Image, colours: np.ndarray, alpha, span: tuple) -> Decoded:
    """16-bit colours in a range -> RGB, upright, over white."""
    new, notes = Image.fromarray(_eight_bits(colours, span)), []
    if alpha is not None:
        new.putalpha(Image.fromarray(_eight_bits(alpha)))
        new = Image.alpha_composite(Image.new("RGBA", new.size, "white"), new).convert("RGB")
        notes.append("alpha")
    new.getexif()[0x0112] = image.getexif().get(0x0112, 1)
    upright = _upright(new)
    notes += ["rotated"] if upright is not None else []
    return Decoded(np.asarray(upright or new), (*notes, "16-bit colour"), _levels(colours))


def _rgb(image: Image.Image, span: tuple[float, float] | None, data: bytes) -> Decoded:
    """Opened image -> RGB array of its first frame, upright. `data`: the same image as a file."""
    deep = _deep(data, image) if span else None
    if deep:
        return _rgb_deep(image, *deep, span)
    notes = []
    if _animated(image):
        notes.append("animated")
    notes += ["16-bit colour"] if _is_deep(image) else []
    image.load()  # the pixels of the first frame; raises when they are incomplete
    upright = _upright(image)
    if upright is not None:
        notes.append("rotated")
        image = upright
    mode = image.mode
    if mode == "RGB" and not image.has_transparency_data:
        return Decoded(np.asarray(image), tuple(notes))
    if _depth(mode):
        values = np.asarray(image)
        notes += ["not a number"] if span and np.isnan(values).any() else []
        notes.append(_depth(mode))
        grey = _eight_bits(values, span)
        return Decoded(np.repeat(grey[..., None], 3, axis=2), tuple(notes), _levels(values))
    notes.append({"1": "grey", "L": "grey", "P": "palette"}.get(mode, mode.lower()))
    if image.has_transparency_data:
        notes[-1:] = [note for note in notes[-1:] if note == "palette"] + ["alpha"]
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return Decoded(np.asarray(image.convert("RGB")), tuple(notes))


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


def _eight_bits(values: np.ndarray, span: tuple[float, float] | None = None) -> np.ndarray:
    """(H, W) integers in 0..65535, or floats in 0..1, -> uint8. Raises `Broken` for other values,
    whose scale is not known. With a `span`, what lies outside of it becomes black or white, and
    what is no number black.
    """
    low, high = values.min(), values.max()
    if span is not None and np.isfinite(values).any():
        with np.errstate(invalid="ignore"):  # some bits that are no number make a noise
            known = np.nan_to_num(values.astype(np.float64), nan=span[0])
        part = (known - span[0]) / (span[1] - span[0])
        return np.rint(part.clip(0, 1) * 255).astype(np.uint8)
    top = 1 if values.dtype.kind == "f" else 65535
    if not (low >= 0 and high <= top):  # written so that NaN fails too
        finite = np.isfinite(low) and np.isfinite(high)
        way = "; data.range can say what is black and white" if finite else ""
        raise Broken(
            "damaged", f"values {low:g} to {high:g}, expected 0 to {top} ({values.dtype}){way}"
        )
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
    look: bytes = bytes(16)  # see near.look
    levels: tuple[float, float] | None = None  # see `Decoded`
    said: tuple[str, ...] = ()


def prepare(image: bytes | np.ndarray, size: int, how: Range = Range()) -> Pixels:
    """An encoded image, or pixels (H, W, 3) uint8 -> what is stored of it. Raises `Broken`."""
    rendered = isinstance(image, np.ndarray)
    found = Decoded(image, ()) if rendered else decode_all(image, how)
    pixels, notes = found.pixels, found.notes
    digest = hashlib.blake2b(str(pixels.shape).encode(), digest_size=16)
    digest.update(np.ascontiguousarray(pixels))
    small = square(pixels, size)
    flat = small.reshape(-1, 3).astype(np.int64)
    sums = np.stack([flat.sum(0), (flat * flat).sum(0)])
    encoded = encode_png(pixels) if rendered else image
    about = (look(small), found.levels, found.said)
    return Pixels(encoded, small, digest.digest(), notes, pixels.shape[:2], sums, *about)


def encode_png(image: np.ndarray) -> bytes:
    """(H, W, 3) or (H, W) uint8 -> PNG bytes, the same bytes every time."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", compress_level=3)
    return buffer.getvalue()


def decode_mask(data: bytes) -> np.ndarray:
    """The inverse of `encode_png` for a mask: (H, W) uint8."""
    with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
        return np.asarray(image)

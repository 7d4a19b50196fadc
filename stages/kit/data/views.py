"""Augmented views of images. A recipe for them is a `View`; `make` gives the same bits whatever the
batch.

The order is SimCLR's and DINO's: random resized crop, flip (crops.py), RandAugment
(randaugment.py), then colour jitter, greyscale, blur, solarise, erase (pixels.py). Which random
numbers a sample gets depends on its key alone (kit/keyed.py). Crop and flip follow
torchvision.transforms.v2.RandomResizedCrop. Pixels are rounded to 8 bits after the crop, as in
pipelines of Pillow images, but not after each operation on colours.

Views of an image may belong together. `View(112, crop_of="view")` shows what the view called "view"
shows, at another size. `View(224, crop_of="view", shift=31)` shows it moved by 0 to 31 pixels to
the right and 0 to 31 down, each drawn for itself. To have these pixels, the crop of the first view
has a `margin`: with CMAE's View(224, margin=32) the crop has 256 pixels, and the view is its upper
left window of 224. Shared are crop, flip and margin; colours are each view's own.

Batches (loader.py) takes any object with `make(name, rows, key)` for a recipe, so that other data
than images can have their own: `name` is the view's name, `rows` are the samples (loader.Rows), and
key(name) is the integer from which all random numbers of the view `name` come. `make` returns a
dict of tensors, (b, ...) each, with names that begin with the view's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from stages.kit import keyed
from stages.kit.data import pixels, randaugment
from stages.kit.data.crops import Crops, centre_squares, random_boxes

WORKING_SET = 3 << 20  # bytes of float32 pixels treated at once: what a core's cache holds
FIELDS = ("mask", "boxes")


@dataclass(frozen=True)
class View:
    """How to make one view. Probabilities are in [0, 1]; 0 (or None) switches an operation off.

    size: height and width of the result, pixels
    scale: share of the image's area that a crop keeps; (1, 1): the centre square
    ratio: width / height of the crop
    flip: probability of a horizontal flip
    jitter: strength of brightness, contrast, saturation and hue
    jitter_p: probability that colours are jittered at all
    grey, blur, solarise, erase: probabilities
    blur_sigma: range of the blur's deviation, pixels
    randaugment: timm's notation, such as "rand-m9-mstd0.5-inc1"
    margin: pixels by which the resized crop is larger than the view, which is its upper left window
    crop_of: the view whose crop, flip and margin this one shares; scale, ratio, flip and margin are
        then left at their defaults
    shift: the window is moved by up to so many pixels right and down; at most the shared margin
    fields: of the data, "mask" and "boxes" go through the same crop and flip
    """

    size: int
    scale: tuple[float, float] = (1.0, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.0
    jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    jitter_p: float = 1.0
    grey: float = 0.0
    blur: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    solarise: float = 0.0
    randaugment: str | None = None
    erase: float = 0.0
    margin: int = 0
    crop_of: str | None = None
    shift: int = 0
    fields: tuple[str, ...] = ()
    shared: View | None = None  # the view called `crop_of`; filled in by `linked`

    def __post_init__(self) -> None:
        def check(good: bool, field: str, expected: str) -> None:
            if not good:
                found = getattr(self, field)
                raise ValueError(f"View.{field}: expected {expected}, found {found!r}")

        check(isinstance(self.size, int) and self.size > 0, "size", "a positive integer")
        for field, most in (("scale", 1), ("ratio", math.inf), ("blur_sigma", math.inf)):
            pair = getattr(self, field)
            good = len(pair) == 2 and 0 < pair[0] <= pair[1] <= most
            check(good, field, f"0 < low <= high <= {most}")
        check(len(self.jitter) == 4 and min(self.jitter) >= 0, "jitter", "4 numbers >= 0")
        check(self.jitter[3] <= 0.5, "jitter", "a hue of at most 0.5")
        for field in ("flip", "jitter_p", "grey", "blur", "solarise", "erase"):
            check(0 <= getattr(self, field) <= 1, field, "a probability in [0, 1]")
        for field in ("margin", "shift"):
            number = getattr(self, field)
            check(isinstance(number, int) and number >= 0, field, "0 or more whole pixels")
        check(set(self.fields) <= set(FIELDS), "fields", f"some of {FIELDS}")
        if self.randaugment is not None:
            check(not self.fields, "fields", "none, as masks and boxes cannot follow RandAugment")
            try:
                randaugment.policy(self.randaugment)
            except ValueError as error:
                expected = f"timm's notation such as 'rand-m9-mstd0.5-inc1' ({error})"
                check(False, "randaugment", expected)
        if self.crop_of is not None:
            for field in ("scale", "ratio", "flip", "margin"):
                default = getattr(View, field)
                check(getattr(self, field) == default, field, f"{default} (crop_of is given)")
        elif self.shift:
            check(False, "shift", "0, as there is no crop_of to be shifted against")

    @property
    def colours(self) -> bool:
        """Whether anything happens to pixel values in floating point."""
        strengths = (*self.jitter, self.grey, self.blur, self.solarise, self.erase)
        return any(strength > 0 for strength in strengths)

    def make(self, name: str, rows, key: Callable[[str], int]) -> dict[str, Tensor]:
        """The view of all samples in `rows` (loader.Rows), a dict of

        <name>: float32 (b, 3, size, size) in [0, 1];
        <name>.box: int64 (b, 5), what of the stored image is seen: top, left, height and width in
            its pixels, and 1 where the view is flipped left to right;
        <name>.mask: uint8 (b, size, size), if asked for in `fields`;
        <name>.boxes: float32 (b, M, 4), x, y, width and height in the view's pixels, clipped to it,
            and <name>.classes: int64 (b, M), if asked for; -1 marks an empty place, and M is the
            largest number of boxes that any image of the split has.

        `key(name)`: the integer key of the view `name` in this epoch.
        """
        images = _tensors(rows.images)
        crops = self.crops(images, key(name), key(self.crop_of or name), rows.index)
        found = {name: self.finish(crops.pixels(images), key(name), rows.index)}
        found[f"{name}.box"] = crops.seen()
        if "mask" in self.fields:
            found[f"{name}.mask"] = crops.masks(rows.masks)
        if "boxes" in self.fields:
            boxes, classes = crops.objects(rows.boxes, rows.most_boxes)
            found |= {f"{name}.boxes": boxes, f"{name}.classes": classes}
        return found

    def crops(
        self, images: Tensor | Sequence[Tensor], base: int, crop_base: int, index: Tensor
    ) -> Crops:
        """Where this view lies in each of the images. `base` is its own key, `crop_base` that of
        the view whose crop it has, `index` int64 (B,) the samples' indices.
        """
        first = self.shared or self
        if self.crop_of is not None and self.shared is None:
            raise ValueError(f"View.crop_of: {self.crop_of!r} is not known yet; see views.linked")
        shapes = torch.tensor([image.shape[:2] for image in images], dtype=torch.int64)
        heights, widths = shapes.reshape(-1, 2).unbind(1)
        if tuple(first.scale) == (1.0, 1.0):
            boxes = centre_squares(heights, widths)
        else:
            crop_key = keyed.key(crop_base, "crop")
            boxes = random_boxes(heights, widths, first.scale, first.ratio, crop_key, index)
        flips = pixels.happens(first.flip, "flip", crop_base, index)
        offsets = torch.zeros(len(index), 2, dtype=torch.int64)
        if self.shift:
            draws = keyed.uniform(keyed.key(base, "shift"), index, 2).double()
            offsets = (draws * (self.shift + 1)).long()
        margin = first.margin * self.size // first.size
        return Crops(boxes, flips, self.size + margin, self.size, offsets)

    def finish(self, crops: Tensor, base: int, index: Tensor) -> Tensor:
        """uint8 (B, S, S, 3) -> float32 (B, 3, S, S) in [0, 1], with all that follows the crop."""
        if self.randaugment is not None:
            seeds = keyed.bits(keyed.key(base, "randaugment"), index).tolist()
            for b, seed in enumerate(seeds):
                image = Image.fromarray(crops[b].cpu().numpy())
                image = randaugment.randaugment(self.randaugment, image, seed % 2**32)
                crops[b] = torch.from_numpy(np.array(image)).to(crops.device)
        result = torch.empty(len(crops), 3, self.size, self.size, device=crops.device)
        count = len(crops) if crops.is_cuda else max(1, WORKING_SET // (12 * self.size**2))
        parts = (whole.split(max(1, count)) for whole in (crops, result, index))
        for part, into, some in zip(*parts, strict=True):
            torch.div(part.permute(0, 3, 1, 2), 255, out=into)
            if self.colours:
                pixels.change(self, into, base, some)
        return result


def apply(view: View, images: Tensor | Sequence[np.ndarray], base: int, index: Tensor) -> Tensor:
    """One view of every image alone: float32 (B, 3, size, size) in [0, 1], on the images' device.

    `images`: uint8 (B, H, W, 3), or a list of uint8 arrays (H, W, 3) that may differ in size;
    `base`: integer key of this view in this epoch; `index`: int64 (B,), the samples' indices.
    Sample b depends on (view, images[b], base, index[b]) only.
    """
    if len(images) != len(index):
        raise ValueError(f"views.apply: found {len(images)} images but {len(index)} rows")
    images, index = _tensors(images), index.cpu()
    return view.finish(view.crops(images, base, base, index).pixels(images), base, index)


def _tensors(images: Tensor | Sequence[np.ndarray]) -> Tensor | list[Tensor]:
    """Images as tensors, which for a list of arrays share their memory if they may."""
    if not isinstance(images, Tensor):
        return [torch.from_numpy(np.require(image, np.uint8, "W")) for image in images]
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        found = f"{images.dtype} {tuple(images.shape)}"
        raise ValueError(f"views: expected uint8 (B, H, W, 3), found {found}")
    return images


def linked(views: dict) -> dict:
    """The recipes, with every `View(crop_of=...)` knowing the view whose crop it shares.

    ValueError where that view does not exist, shares another's crop itself, or has no margin for
    the shift.
    """
    return {name: _linked(name, recipe, views) for name, recipe in views.items()}


def _linked(name: str, view, views: dict):
    if getattr(view, "crop_of", None) is None:
        return view
    first = views.get(view.crop_of)
    if not isinstance(first, View) or first.crop_of is not None:
        good = [n for n, v in views.items() if isinstance(v, View) and v.crop_of is None]
        raise ValueError(
            f"view {name!r}: crop_of is {view.crop_of!r}, expected a view with a crop of its own "
            f"({', '.join(good) or 'there is none'})"
        )
    margin, rest = divmod(first.margin * view.size, first.size)
    if rest:
        raise ValueError(
            f"view {name!r}: the margin of {first.margin} pixels of {view.crop_of!r} is no whole "
            f"number of pixels at size {view.size} instead of {first.size}"
        )
    if view.shift > margin:
        raise ValueError(
            f"view {name!r}: shift is {view.shift}, but the crop of {view.crop_of!r} has only "
            f"{margin} pixels to spare; give that view a larger margin"
        )
    return replace(view, shared=first)

"""Where a view lies in its image, and what of image, mask and boxes is seen there.

A crop is a box in the image. It is resized to `side` x `side` pixels and perhaps flipped. The view
is a window of `size` x `size` pixels in it, at `offsets`: the whole of it, unless views are shifted
against each other (CMAE, arXiv 2207.13532, crops 256 pixels for windows of 224).

The resize of images is torch's integer kernel for uint8 (Pillow's bicubic algorithm, antialiased),
so that pixels depend on neither the batch nor the number of threads. On a GPU there is no such
kernel: float32 is used, rounded to 8 bits, and a pixel can differ by a grey level. Masks hold names
rather than amounts: each pixel of a view takes the one value that lies under its centre.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from stages.kit import keyed


@dataclass(frozen=True)
class Crops:
    """The crops of B images, each in its own image's pixels."""

    boxes: Tensor  # int64 (B, 4): top, left, height, width of the crop in the image
    flips: Tensor  # bool (B,): mirrored left to right
    side: int  # of the resized crop, pixels
    size: int  # of the view, pixels
    offsets: Tensor  # int64 (B, 2): row and column of the view in the resized, flipped crop

    def windows(self) -> Tensor:
        """`offsets` in the resized crop before it is flipped, int64 (B, 2)."""
        row, column = self.offsets.unbind(1)
        mirrored = self.side - self.size - column
        return torch.stack([row, torch.where(self.flips, mirrored, column)], 1)

    def seen(self) -> Tensor:
        """What of the images is seen, int64 (B, 5): top, left, height, width in the image's pixels,
        and 1 where it is flipped. Edges of a shifted window are rounded to whole pixels.
        """
        first, length = self.boxes[:, :2], self.boxes[:, 2:]
        low = first + _rounded(self.windows() * length, self.side)
        high = first + _rounded((self.windows() + self.size) * length, self.side)
        return torch.cat([low, high - low, self.flips[:, None].long()], 1)

    def pixels(self, images: Tensor | Sequence[Tensor]) -> Tensor:
        """uint8 (B, size, size, 3) of `images`: uint8 (B, H, W, 3), or tensors (H, W, 3)."""
        stacked = isinstance(images, Tensor)
        device = images.device if stacked else torch.device("cpu")
        size = (self.size, self.size)
        found = torch.empty(len(images), *size, 3, dtype=torch.uint8, device=device)
        if stacked and images.shape == found.shape and self._whole():
            found.copy_(images)
        else:
            into = found.permute(0, 3, 1, 2)
            places = torch.cat([self.boxes, self.windows()], 1).tolist()
            for b, (top, left, height, width, row, column) in enumerate(places):
                region = images[b][top : top + height, left : left + width].permute(2, 0, 1)[None]
                region = _resized(region, self.side)
                into[b] = region[0, :, row : row + self.size, column : column + self.size]
        flipped = self.flips.nonzero()[:, 0].to(device)
        found[flipped] = found[flipped].flip(2)
        return found

    def _whole(self) -> bool:
        """Whether every crop is an image of the view's size, as it is."""
        box = torch.tensor([0, 0, self.size, self.size])
        return self.side == self.size and bool((self.boxes == box).all())

    def masks(self, masks: Tensor | Sequence[np.ndarray]) -> Tensor:
        """uint8 (B, size, size) of masks (H, W) of the images' sizes."""
        found = torch.empty(len(masks), self.size, self.size, dtype=torch.uint8)
        centre = 2 * np.arange(self.size) + 1  # in half pixels
        places = torch.cat([self.boxes, self.windows(), self.flips[:, None].long()], 1).tolist()
        for b, (top, left, height, width, row, column, flip) in enumerate(places):
            y = top + (centre + 2 * row) * height // (2 * self.side)
            x = left + (centre + 2 * column) * width // (2 * self.side)
            chosen = np.asarray(masks[b])[np.ix_(y, x[::-1] if flip else x)]
            found[b] = torch.from_numpy(chosen)
        return found

    def objects(self, objects: Sequence[np.ndarray], most: int) -> tuple[Tensor, Tensor]:
        """Boxes float32 (B, most, 4) x, y, width, height in the view's pixels, and their classes
        int64 (B, most), of `objects`: arrays (m, 5) x, y, width, height, class in the image's.

        Boxes are clipped to the view. Those that lie outside are left out. Empty places have the
        class -1.
        """
        boxes = torch.zeros(len(objects), most, 4)
        classes = torch.full((len(objects), most), -1)
        places = torch.cat([self.boxes, self.windows(), self.flips[:, None].long()], 1).tolist()
        for b, (top, left, height, width, row, column, flip) in enumerate(places):
            x, y, w, h, kind = np.asarray(objects[b], np.float64).reshape(-1, 5).T
            across, down = self.side / width, self.side / height
            x0, x1 = ((edge - left) * across - column for edge in (x, x + w))
            y0, y1 = ((edge - top) * down - row for edge in (y, y + h))
            if flip:
                x0, x1 = self.size - x1, self.size - x0
            x0, x1, y0, y1 = (np.clip(edge, 0, self.size) for edge in (x0, x1, y0, y1))
            kept = (x1 > x0) & (y1 > y0)
            found = np.stack([x0, y0, x1 - x0, y1 - y0], 1)[kept]
            boxes[b, : len(found)] = torch.from_numpy(found).float()
            classes[b, : len(found)] = torch.from_numpy(kind[kept]).long()
        return boxes, classes


def _rounded(product: Tensor, side: int) -> Tensor:
    """product / side, rounded to the nearest integer, halves up."""
    return torch.div(2 * product + side, 2 * side, rounding_mode="floor")


def _resized(region: Tensor, side: int) -> Tensor:
    """uint8 (1, 3, h, w) -> (1, 3, side, side); uint8, or on a GPU float32 with whole values."""
    if region.shape[2:] == (side, side):
        return region
    if not region.is_cuda:
        return F.interpolate(region, (side, side), mode="bicubic", antialias=True)
    region = F.interpolate(region.float(), (side, side), mode="bicubic", antialias=True)
    return region.round().clamp(0, 255)


def centre_squares(heights: Tensor, widths: Tensor) -> Tensor:
    """Boxes int64 (B, 4), top, left, height, width: the largest square in the middle of each of B
    images.
    """
    side = torch.minimum(heights, widths)
    return torch.stack([(heights - side) // 2, (widths - side) // 2, side, side], 1)


def random_boxes(
    heights: Tensor, widths: Tensor, scale: tuple, ratio: tuple, base: int, index: Tensor
) -> Tensor:
    """Random crops as boxes int64 (B, 4), top, left, height, width, of images of `heights` and
    `widths` (B,) pixels.

    As torchvision's RandomResizedCrop: ten tries, then the largest centre crop within `ratio`.
    """
    box, found = tries(heights, widths, scale, ratio, base, index)
    low, high = ratio
    height = torch.minimum(heights, (widths / low).round().long())
    width = torch.minimum(widths, (heights * high).round().long())
    centre = torch.stack([(heights - height) // 2, (widths - width) // 2, height, width], 1)
    return torch.where(found[:, None], box, centre)


def tries(
    heights: Tensor,
    widths: Tensor,
    scale: tuple,
    ratio: tuple,
    base: int,
    index: Tensor,
    inside: int = 0,
) -> tuple[Tensor, Tensor]:
    """The first of ten random boxes that fits with `inside` pixels to spare, int64 (B, 4), and
    whether one did, bool (B,).

    A box has a share in `scale` of the image's area, and width / height in `ratio`.
    """
    area, aspect, y, x = keyed.uniform(base, index, 10, 4).double().unbind(2)
    area = (heights * widths)[:, None] * (scale[0] + area * (scale[1] - scale[0]))
    low, high = math.log(ratio[0]), math.log(ratio[1])
    aspect = (low + aspect * (high - low)).exp()
    width, height = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    spare_x, spare_y = widths[:, None] - width, heights[:, None] - height
    fits = (width > 0) & (height > 0) & (spare_x >= inside) & (spare_y >= inside)
    box = torch.stack([y * (spare_y + 1), x * (spare_x + 1), height, width], 2).floor().long()
    first = fits.int().argmax(1)
    return box[torch.arange(len(index)), first], fits.any(1)

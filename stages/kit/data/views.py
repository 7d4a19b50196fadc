"""Augmented views of images: a recipe (`View`), and `apply`, which gives the same bits whatever the
batch.

The order is SimCLR's and DINO's: random resized crop, flip, (RandAugment,) colour jitter,
greyscale, blur, solarise, erase. Which random numbers a sample gets depends on its key alone
(kit/keyed.py). That its pixels too do not depend on the rest of the batch, nor on the number of
threads, holds by construction: the resize is torch's integer kernel for uint8 images (Pillow's
algorithm), and everything after it consists of single operations that IEEE 754 rounds correctly,
and of sums and matrix products over numbers rounded beforehand to so few bits that float32 or int64
holds every partial sum exactly.

Sources: crop, jitter and blur as in torchvision.transforms.v2 (RandomResizedCrop, ColorJitter with
its random order per sample, GaussianBlur); RandAugment (arXiv 1909.13719) and random erasing (arXiv
1708.04896, mode "pixel", one box of 2-33 % of the area, aspect 0.3-3.3) as in timm. Departures from
them:
- Pixels are rounded to 8 bits after the crop, as in Pillow pipelines, but not after each colour
  operation.
- The blur is a true Gaussian cut at 3 times the view's largest sigma, with weights in steps of
  2^-12 and pixels in eighths of a grey level; Pillow approximates a Gaussian with boxes. The mean
  in the contrast operation is rounded to 2^-16.
- RandAugment uses bicubic interpolation always (as timm with train_interpolation=bicubic) and fills
  with grey (128).
- Erasing runs before normalisation, so its noise is normal with mean 0.5 and deviation 0.25, about
  that of unit noise on normalised pixels, cut to [0, 1].
- On a GPU there is no integer resize: float32 is used, rounded to 8 bits, and a pixel can differ by
  a grey level.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import random
import threading
import types
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F

from stages.kit import keyed

GREY = (0.2989, 0.587, 0.114)  # torchvision's weights of red, green and blue
WORKING_SET = 3 << 20  # bytes of float32 pixels treated at once: what a core's cache holds
DRAWING = threading.Lock()  # held while RandAugment's generators are seeded and read


@dataclass(frozen=True)
class View:
    """How to make one view. Probabilities are in [0, 1]; 0 (or None) switches an operation off."""

    size: int  # height and width of the result, pixels
    scale: tuple[float, float] = (
        1.0,
        1.0,
    )  # share of the area that a crop keeps; (1, 1): the centre square
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width / height of the crop
    flip: float = 0.0  # probability of a horizontal flip
    jitter: tuple[float, float, float, float] = (
        0.0,
        0.0,
        0.0,
        0.0,
    )  # brightness, contrast, saturation, hue
    jitter_p: float = 1.0  # probability that colours are jittered at all
    grey: float = 0.0
    blur: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)  # pixels
    solarise: float = 0.0
    randaugment: str | None = None  # timm's notation, such as "rand-m9-mstd0.5-inc1"
    erase: float = 0.0

    def __post_init__(self) -> None:
        def check(good: bool, field: str, expected: str) -> None:
            if not good:
                raise ValueError(
                    f"View.{field}: expected {expected}, found {getattr(self, field)!r}"
                )

        check(isinstance(self.size, int) and self.size > 0, "size", "a positive integer")
        for field, most in (("scale", 1), ("ratio", math.inf), ("blur_sigma", math.inf)):
            pair = getattr(self, field)
            check(
                len(pair) == 2 and 0 < pair[0] <= pair[1] <= most,
                field,
                f"0 < low <= high <= {most}",
            )
        check(len(self.jitter) == 4 and min(self.jitter) >= 0, "jitter", "4 numbers >= 0")
        check(self.jitter[3] <= 0.5, "jitter", "a hue of at most 0.5")
        for field in ("flip", "jitter_p", "grey", "blur", "solarise", "erase"):
            check(0 <= getattr(self, field) <= 1, field, "a probability in [0, 1]")
        if self.randaugment is not None:
            try:
                _policy(self.randaugment, self.size)
            except (AssertionError, ValueError, AttributeError) as error:
                check(
                    False,
                    "randaugment",
                    f"timm's notation such as 'rand-m9-mstd0.5-inc1' ({error})",
                )

    @property
    def crops(self) -> bool:
        """Whether the crop is random."""
        return tuple(self.scale) != (1.0, 1.0)

    @property
    def colours(self) -> bool:
        """Whether anything happens to pixel values in floating point."""
        return (
            any(self.jitter)
            or self.grey > 0
            or self.blur > 0
            or self.solarise > 0
            or self.erase > 0
        )


def apply(view: View, images: Tensor | Sequence[np.ndarray], base: int, rows: Tensor) -> Tensor:
    """Make the view of every image: float32 (B, 3, size, size) in [0, 1], on the images' device.

    `images`: uint8 (B, H, W, 3), or a list of uint8 arrays (H, W, 3) that may differ in size;
    `base`: integer key of this view in this epoch; `rows`: int64 (B,), the samples' indices. Sample
    b depends on (view, images[b], base, rows[b]) only.
    """
    if len(images) != len(rows):
        raise ValueError(f"views.apply: found {len(images)} images but {len(rows)} rows")
    if isinstance(images, Tensor):
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[-1] != 3:
            raise ValueError(
                f"views.apply: expected uint8 (B, H, W, 3), found {images.dtype} {tuple(images.shape)}"
            )
    else:
        images = [torch.from_numpy(np.require(image, np.uint8, "W")) for image in images]
    rows = rows.cpu()
    crops = _crop(view, images, base, rows)
    if view.randaugment is not None:
        _randaugment(view, crops, base, rows)
    result = torch.empty(len(crops), 3, view.size, view.size, device=crops.device)
    count = len(crops) if crops.is_cuda else max(1, WORKING_SET // (12 * view.size**2))
    for part, into, some in zip(
        crops.split(count), result.split(count), rows.split(count), strict=True
    ):
        torch.div(part.permute(0, 3, 1, 2), 255, out=into)
        if view.colours:
            _colour(view, into, base, some)
    return result


def boxes(view: View, heights: Tensor, widths: Tensor, base: int, rows: Tensor) -> Tensor:
    """The crops, int64 (B, 4): top, left, height, width, of images with `heights` and `widths`
    (B,), in pixels.

    As torchvision's RandomResizedCrop.make_params: ten tries, then the largest centre crop within
    `ratio`.
    """
    if not view.crops:
        side = torch.minimum(heights, widths)
        return torch.stack([(heights - side) // 2, (widths - side) // 2, side, side], 1)
    box, found = _tries(heights, widths, view.scale, view.ratio, keyed.key(base, "crop"), rows)
    low, high = view.ratio
    height = torch.minimum(heights, (widths / low).round().long())
    width = torch.minimum(widths, (heights * high).round().long())
    centre = torch.stack([(heights - height) // 2, (widths - width) // 2, height, width], 1)
    return torch.where(found[:, None], box, centre)


def _tries(
    heights: Tensor, widths: Tensor, scale, ratio, base: int, rows: Tensor, inside: int = 0
) -> tuple[Tensor, Tensor]:
    """The first of ten boxes that fits with `inside` pixels to spare, int64 (B, 4), and if one did
    (B,).
    """
    area, aspect, y, x = keyed.uniform(base, rows, 10, 4).double().unbind(2)
    area = (heights * widths)[:, None] * (scale[0] + area * (scale[1] - scale[0]))
    low, high = math.log(ratio[0]), math.log(ratio[1])
    aspect = (low + aspect * (high - low)).exp()
    width, height = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    spare_x, spare_y = widths[:, None] - width, heights[:, None] - height
    fits = (width > 0) & (height > 0) & (spare_x >= inside) & (spare_y >= inside)
    box = torch.stack([y * (spare_y + 1), x * (spare_x + 1), height, width], 2).floor().long()
    first = fits.int().argmax(1)
    return box[torch.arange(len(rows)), first], fits.any(1)


def _crop(view: View, images: Tensor | list[Tensor], base: int, rows: Tensor) -> Tensor:
    """Crop, resize (bicubic, antialiased) and flip: uint8 (B, size, size, 3)."""
    shapes = torch.tensor([image.shape[:2] for image in images], dtype=torch.int64).reshape(-1, 2)
    device = images.device if isinstance(images, Tensor) else torch.device("cpu")
    crops = torch.empty(len(images), view.size, view.size, 3, dtype=torch.uint8, device=device)
    as_is = not view.crops and isinstance(images, Tensor) and images.shape == crops.shape
    if as_is:
        crops.copy_(images)
    into = crops.permute(0, 3, 1, 2)
    found = [] if as_is else boxes(view, shapes[:, 0], shapes[:, 1], base, rows).tolist()
    for b, (top, left, height, width) in enumerate(found):
        region = images[b][top : top + height, left : left + width].permute(2, 0, 1)[None]
        if (height, width) != (view.size, view.size):
            if region.is_cuda:
                region = region.float()
            region = F.interpolate(region, (view.size, view.size), mode="bicubic", antialias=True)
            if region.is_cuda:
                region = region.round().clamp(0, 255)
        into[b] = region[0]
    flips = _chosen(view.flip, "flip", base, rows, device)
    crops[flips] = crops[flips].flip(2)
    return crops


def _colour(view: View, x: Tensor, base: int, rows: Tensor) -> None:
    """Jitter, greyscale, blur, solarise and erase `x` (B, 3, S, S) in place."""
    if any(view.jitter):
        _jitter(view, x, base, rows)
    chosen = _chosen(view.grey, "grey", base, rows, x.device)
    if len(chosen):
        x[chosen] = _grey(x[chosen]).expand(-1, 3, -1, -1)
    chosen = _chosen(view.blur, "blur", base, rows, x.device)
    if len(chosen):
        low, high = view.blur_sigma
        sigma = low + keyed.uniform(keyed.key(base, "sigma"), rows[chosen.cpu()]).double() * (
            high - low
        )
        x[chosen] = blur(x[chosen], sigma, math.ceil(3 * high))
    chosen = _chosen(view.solarise, "solarise", base, rows, x.device)
    if len(chosen):
        x[chosen] = torch.where(x[chosen] >= 0.5, 1 - x[chosen], x[chosen])
    if view.erase > 0:
        _erase(view, x, base, rows)


def _jitter(view: View, x: Tensor, base: int, rows: Tensor) -> None:
    """ColorJitter: each sample has its own factors and its own order of the four operations."""
    draws = keyed.uniform(keyed.key(base, "jitter"), rows, 8)
    strength = torch.tensor(view.jitter)
    low = (torch.tensor([1.0, 1.0, 1.0, 0.0]) - strength).clamp(
        min=torch.tensor([0.0, 0.0, 0.0, -0.5])
    )
    high = torch.tensor([1.0, 1.0, 1.0, 0.0]) + strength
    factors = low + draws[:, :4] * (high - low)
    order = draws[:, 4:].argsort(dim=1, stable=True)
    order[~_happens(view.jitter_p, "jitter_p", base, rows)] = -1
    for turn in range(4):
        for which, operation in enumerate((brightness, contrast, saturation, hue)):
            chosen = (order[:, turn] == which).nonzero()[:, 0]
            if view.jitter[which] > 0 and len(chosen):
                at = chosen.to(x.device)
                x[at] = operation(x[at], factors[chosen, which, None, None, None].to(x.device))


def brightness(x: Tensor, factor: Tensor) -> Tensor:
    """Scale `x` (B, 3, H, W) in [0, 1] by `factor` (B, 1, 1, 1) >= 0; as torchvision's
    adjust_brightness.
    """
    return (x * factor).clamp_(0, 1)


def contrast(x: Tensor, factor: Tensor) -> Tensor:
    """Blend with the image's mean grey; as torchvision's adjust_contrast."""
    grey = (_grey(x) * 2.0**16).round_().long()  # integers: their sum is exact in any order
    total = grey.sum((1, 2, 3), keepdim=True)
    return _blend(x, (total.double() / (x.shape[2] * x.shape[3] * 2.0**16)).float(), factor)


def saturation(x: Tensor, factor: Tensor) -> Tensor:
    """Blend with the grey picture; as torchvision's adjust_saturation."""
    return _blend(x, _grey(x), factor)


def hue(x: Tensor, shift: Tensor) -> Tensor:
    """Turn colours by `shift` (B, 1, 1, 1) in [-0.5, 0.5] of a circle; as torchvision's adjust_hue."""
    red, green, blue = x.split(1, 1)
    value = torch.maximum(torch.maximum(red, green), blue)
    low = torch.minimum(torch.minimum(red, green), blue)
    chroma = value - low
    safe = torch.where(chroma > 0, chroma, 1)
    second = torch.where(value == green, (blue - red) / safe + 2, (red - green) / safe + 4)
    angle = torch.where(value == red, (green - blue) / safe, second) + 6 * shift
    angle -= (angle / 6).floor_() * 6  # now in [0, 6): red is at 0, green at 2, blue at 4
    level = torch.cat([(angle - 3).abs_() - 1, 2 - (angle - 2).abs_(), 2 - (angle - 4).abs_()], 1)
    return level.clamp_(0, 1).mul_(chroma).add_(low).clamp_(0, 1)


def blur(x: Tensor, sigma: Tensor, radius: int) -> Tensor:
    """Gaussian blur of `x` (B, 3, H, W) in [0, 1] with `sigma` (B,) in pixels; borders are
    reflected.

    As torchvision's gaussian_blur with 2 radius + 1 taps, to about 5e-4. Each axis is one matrix
    product per sample. Pixels are multiples of 1/2040 (an eighth of a grey level) and weights of
    1/4096, hence all partial sums are integers below 2^24: exact in float32.
    """
    radius = min(radius, min(x.shape[2:]) - 1)
    offset = torch.arange(-radius, radius + 1)
    weight = (-0.5 * (offset / sigma[:, None].double().cpu()) ** 2).exp()
    weight = (weight / weight.sum(1, keepdim=True) * 4096).round()
    weight[:, radius] += 4096 - weight.sum(1)  # a constant picture stays as it is
    weight = weight.float().to(x.device)

    def matrix(length: int) -> Tensor:
        place, last = torch.arange(length)[:, None], length - 1
        source = last - ((place + offset).abs() - last).abs()  # reflected at both ends
        flat = (place * length + source).reshape(-1).to(x.device)
        full = torch.zeros(len(x), length * length, device=x.device)
        return full.index_add_(1, flat, weight.repeat(1, length)).view(-1, length, length)

    x = (x * 2040).round_()
    x = (_exact(matrix(x.shape[2])[:, None], x) / 4096).round_()
    return (_exact(x, matrix(x.shape[3])[:, None].transpose(2, 3)) / (4096 * 2040)).clamp_(0, 1)


def _exact(a: Tensor, b: Tensor) -> Tensor:
    """A matrix product that keeps 24 bits: float64 on a GPU, where float32 may mean TF32 with 11
    bits.
    """
    return (a.double() @ b.double()).float() if a.is_cuda else a @ b


def _erase(view: View, x: Tensor, base: int, rows: Tensor) -> None:
    """Fill a random box with noise, in place."""
    side = torch.full((len(rows),), view.size)
    box, found = _tries(
        side, side, (0.02, 1 / 3), (0.3, 1 / 0.3), keyed.key(base, "erase"), rows, inside=1
    )
    found &= _happens(view.erase, "erase_p", base, rows)
    noise = keyed.key(base, "noise")
    for b in found.nonzero()[
        :, 0
    ].tolist():  # one at a time: noise is dear, and most boxes are small
        top, left, height, width = box[b].tolist()
        fill = keyed.normal(noise, rows[b : b + 1], 3, height, width)[0] * 0.25 + 0.5
        x[b, :, top : top + height, left : left + width] = fill.clamp_(0, 1).to(x.device)


def _grey(x: Tensor) -> Tensor:
    red, green, blue = x.split(1, 1)
    return red * GREY[0] + green * GREY[1] + blue * GREY[2]


def _blend(x: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    return (x * factor).add_(other * (1 - factor)).clamp_(0, 1)


def _happens(probability: float, name: str, base: int, rows: Tensor) -> Tensor:
    """bool (B,): a biased coin for each sample."""
    return keyed.uniform(keyed.key(base, name), rows) < probability


def _chosen(probability: float, name: str, base: int, rows: Tensor, device: torch.device) -> Tensor:
    """Positions in the batch at which the coin shows heads."""
    return _happens(probability, name, base, rows).nonzero()[:, 0].to(device)


@functools.cache
def _policy(notation: str, size: int) -> tuple:
    """timm's RandAugment, and the two generators that it draws from.

    timm draws from the global `random` and `numpy.random`, which every thread and library of the
    process shares. So its file is loaded once more, under no name, with generators of its own in
    their place. The policy is called with a list instead of an image and appends what it would do:
    (function, arguments). So only the drawing, not the work on pixels, needs a lock.
    """
    spec = importlib.util.find_spec("timm.data.auto_augment")
    timm = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(timm)
    timm.random = random.Random()
    timm.ImageOps = types.SimpleNamespace(**{**vars(ImageOps), "posterize": _posterize})
    timm.np = types.SimpleNamespace(**{**vars(np), "random": np.random.RandomState()})
    bicubic, grey = Image.Resampling.BICUBIC, (128, 128, 128)
    hparams = {"translate_const": int(0.45 * size), "img_mean": grey, "interpolation": bicubic}
    policy = timm.rand_augment_transform(notation, hparams)
    for operation in policy.ops:
        operation.aug_fn = functools.partial(_later, operation.aug_fn)
    return policy, timm.random, timm.np.random


def _posterize(image: Image.Image, bits: int) -> Image.Image:
    """timm asks for 0 bits at magnitude 10; newer Pillows refuse what older ones drew: a black
    picture.
    """
    return ImageOps.posterize(image, bits) if bits >= 1 else Image.new(image.mode, image.size)


def _later(function, plan: list, *args, **kwargs) -> list:
    return [*plan, (function, args, kwargs)]


def _randaugment(view: View, crops: Tensor, base: int, rows: Tensor) -> None:
    """RandAugment on uint8 `crops` (B, S, S, 3), in place."""
    policy, *generators = _policy(view.randaugment, view.size)
    seeds = keyed.bits(keyed.key(base, "randaugment"), rows).tolist()
    for b, seed in enumerate(seeds):
        with DRAWING:
            for generator in generators:
                generator.seed(seed % 2**32)
            plan = policy([])
        if plan:
            image = Image.fromarray(crops[b].cpu().numpy())
            for function, args, kwargs in plan:
                image = function(image, *args, **kwargs)
            crops[b] = torch.from_numpy(np.array(image)).to(crops.device)

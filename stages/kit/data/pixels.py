"""What happens to a view's pixels after the crop: jitter, greyscale, blur, solarise, erase.

Images are float32 (B, 3, H, W) in [0, 1]. A sample's result does not depend on the rest of the
batch, nor on the number of threads, because each step is either a single operation that IEEE 754
rounds correctly, or a sum or matrix product over numbers that were rounded beforehand to so few
bits that float32 or int64 holds every partial sum exactly.

Jitter and blur follow torchvision.transforms.v2 (ColorJitter with its random order per sample,
GaussianBlur); erasing follows timm (random erasing, arXiv 1708.04896, mode "pixel": one box of 2 to
33 % of the area, aspect 0.3 to 3.3). Departures:
- pixels are not rounded to 8 bits after each operation;
- the blur is a true Gaussian cut at 3 times the view's largest sigma, with weights in steps of
  2^-12 and pixels in eighths of a grey level; Pillow approximates a Gaussian with boxes;
- the mean in the contrast operation is rounded to 2^-16;
- erasing runs before normalisation, so its noise is normal with mean 0.5 and deviation 0.25, about
  that of unit noise on normalised pixels, cut to [0, 1].
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stages.kit import keyed
from stages.kit.data.crops import tries

GREY = (0.2989, 0.587, 0.114)  # torchvision's weights of red, green and blue


def change(view, x: Tensor, base: int, index: Tensor) -> None:
    """Jitter, greyscale, blur, solarise and erase `x` in place, as `view` (views.View) says.

    `base`: the view's key in this epoch; `index`: int64 (B,), the samples' indices.
    """
    if any(view.jitter):
        jitter(view, x, base, index)
    chosen = _chosen(view.grey, "grey", base, index, x.device)
    if len(chosen):
        x[chosen] = _grey(x[chosen]).expand(-1, 3, -1, -1)
    chosen = _chosen(view.blur, "blur", base, index, x.device)
    if len(chosen):
        low, high = view.blur_sigma
        share = keyed.uniform(keyed.key(base, "sigma"), index[chosen.cpu()]).double()
        x[chosen] = blur(x[chosen], low + share * (high - low), math.ceil(3 * high))
    chosen = _chosen(view.solarise, "solarise", base, index, x.device)
    if len(chosen):
        x[chosen] = torch.where(x[chosen] >= 0.5, 1 - x[chosen], x[chosen])
    if view.erase > 0:
        erase(view, x, base, index)


def jitter(view, x: Tensor, base: int, index: Tensor) -> None:
    """ColorJitter, in place: each sample has its own factors and its own order of the four
    operations.
    """
    draws = keyed.uniform(keyed.key(base, "jitter"), index, 8)
    strength, neutral = torch.tensor(view.jitter), torch.tensor([1.0, 1.0, 1.0, 0.0])
    low = (neutral - strength).clamp(min=torch.tensor([0.0, 0.0, 0.0, -0.5]))
    factors = low + draws[:, :4] * (neutral + strength - low)
    order = draws[:, 4:].argsort(dim=1, stable=True)
    order[~happens(view.jitter_p, "jitter_p", base, index)] = -1
    for turn in range(4):
        for which, operation in enumerate((brightness, contrast, saturation, hue)):
            chosen = (order[:, turn] == which).nonzero()[:, 0]
            if view.jitter[which] > 0 and len(chosen):
                at = chosen.to(x.device)
                x[at] = operation(x[at], factors[chosen, which, None, None, None].to(x.device))


def brightness(x: Tensor, factor: Tensor) -> Tensor:
    """Scale `x` by `factor` (B, 1, 1, 1) >= 0; as torchvision's adjust_brightness."""
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
    """Turn colours by `shift` (B, 1, 1, 1) in [-0.5, 0.5] of a circle; as torchvision's
    adjust_hue.
    """
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
    """Gaussian blur with `sigma` (B,) in pixels; borders are reflected.

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
    """A matrix product that keeps 24 bits: float64 on a GPU, where float32 may mean TF32, which has
    11.
    """
    return (a.double() @ b.double()).float() if a.is_cuda else a @ b


def erase(view, x: Tensor, base: int, index: Tensor) -> None:
    """Fill a random box with noise, in place."""
    side = torch.full((len(index),), x.shape[2])
    key = keyed.key(base, "erase")
    box, found = tries(side, side, (0.02, 1 / 3), (0.3, 1 / 0.3), key, index, inside=1)
    found &= happens(view.erase, "erase_p", base, index)
    noise = keyed.key(base, "noise")
    for b in found.nonzero()[:, 0].tolist():  # one by one: noise is dear, and most boxes are small
        top, left, height, width = box[b].tolist()
        fill = keyed.normal(noise, index[b : b + 1], 3, height, width)[0] * 0.25 + 0.5
        x[b, :, top : top + height, left : left + width] = fill.clamp_(0, 1).to(x.device)


def happens(probability: float, name: str, base: int, index: Tensor) -> Tensor:
    """bool (B,): a biased coin for each sample."""
    return keyed.uniform(keyed.key(base, name), index) < probability


def _chosen(
    probability: float, name: str, base: int, index: Tensor, device: torch.device
) -> Tensor:
    """Positions in the batch at which the coin shows heads."""
    return happens(probability, name, base, index).nonzero()[:, 0].to(device)


def _grey(x: Tensor) -> Tensor:
    red, green, blue = x.split(1, 1)
    return red * GREY[0] + green * GREY[1] + blue * GREY[2]


def _blend(x: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    return (x * factor).add_(other * (1 - factor)).clamp_(0, 1)

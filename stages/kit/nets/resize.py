"""Images at another resolution, by Lanczos' filter, as BEiT's tokenizers see them."""

from __future__ import annotations

import torch

LOBES = 3  # of the filter on either side, as Pillow's


def lanczos(images: torch.Tensor, size: int) -> torch.Tensor:
    """Square images (B,C,S,S) in [0,1] -> (B,C,size,size), clipped to [0,1]; as Pillow's LANCZOS,
    which widens the filter where it shrinks an image, but without rounding to 8 bits.
    """
    if images.shape[-1] == size:
        return images
    with torch.autocast(images.device.type, enabled=False):
        weights = filters(images.shape[-1], size).to(images)
        return (weights @ images @ weights.T).clamp(0, 1)


def filters(old: int, new: int) -> torch.Tensor:
    """Shares of the `old` pixels of a line in each of the `new` ones, float64 (new,old); rows sum
    to 1.
    """
    scale = old / new  # old pixels for a new one
    centre = (torch.arange(new, dtype=torch.float64, device="cpu")[:, None] + 0.5) * scale
    pixels = torch.arange(old, dtype=torch.float64, device="cpu") + 0.5
    x = (pixels - centre) / max(scale, 1.0)
    weights = torch.sinc(x) * torch.sinc(x / LOBES) * (x.abs() < LOBES)
    return weights / weights.sum(dim=1, keepdim=True)

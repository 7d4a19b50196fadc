"""Images as sequences of patches, and contact sheets to look at them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


def patchify(images: torch.Tensor, size: int) -> torch.Tensor:
    """(B,C,H,W) -> (B, H/size * W/size, size*size*C), patches row by row.

    Inside a patch: row, column, channel, the channel fastest. ValueError if `size` does not divide
    H and W.
    """
    batch, channels, height, width = images.shape
    if height % size or width % size:
        raise ValueError(f"patchify: {size} does not divide the image of {height}x{width}")
    x = images.reshape(batch, channels, height // size, size, width // size, size)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(batch, -1, size * size * channels)


def project(conv: nn.Conv2d, patches: torch.Tensor) -> torch.Tensor:
    """What a convolution over patches side by side makes of some: (B,n,size*size*C) as from
    `patchify` -> (B,n,D).
    """
    return F.linear(patches, conv.weight.permute(0, 2, 3, 1).flatten(1), conv.bias)


def unpatchify(
    patches: torch.Tensor, size: int, grid: tuple[int, int] | None = None
) -> torch.Tensor:
    """The inverse of `patchify`: (B,N,size*size*C) -> (B,C,H,W); grid (rows, columns), by default
    square.
    """
    batch, count, values = patches.shape
    rows, columns = grid or (round(count**0.5),) * 2
    if rows * columns != count or values % size**2:
        raise ValueError(
            f"unpatchify: {count} patches of {values} values do not make a {rows}x{columns} "
            f"grid of {size}x{size} pixels"
        )
    x = patches.reshape(batch, rows, columns, size, size, values // size**2)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(batch, -1, rows * size, columns * size)


def patch_statistics(patches: torch.Tensor, eps: float = 1e-6) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and sqrt(unbiased variance + eps) over all values of each patch, channels jointly: two
    (B,N,1).
    """
    # in two passes: torch.var_mean takes three times longer on a CPU
    mean = patches.mean(dim=-1, keepdim=True)
    variance = (patches - mean).square().sum(dim=-1, keepdim=True) / (patches.shape[-1] - 1)
    return mean, (variance + eps).sqrt()


def channel_statistics(
    images: torch.Tensor, size: int, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and sqrt(biased variance + eps) of each patch, for each channel by itself: two images
    (B,C,H,W) that are constant within a patch.
    """
    grid = (images.shape[2] // size, images.shape[3] // size)
    values = patchify(images, size).unflatten(2, (size**2, -1))  # (B,N,size^2,C)
    mean = values.mean(dim=2, keepdim=True)
    deviation = (values.var(dim=2, keepdim=True, correction=0) + eps).sqrt()
    both = (part.expand_as(values).flatten(2) for part in (mean, deviation))
    mean, deviation = (unpatchify(part, size, grid) for part in both)
    return mean, deviation


def normalise_patches(patches: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """Each patch minus its mean over its deviation (MAE's norm_pix targets, arXiv 2111.06377
    section 4).
    """
    mean, deviation = patch_statistics(patches, eps)
    return (patches - mean) / deviation

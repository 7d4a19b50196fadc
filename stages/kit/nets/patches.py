"""Images as sequences of patches, and contact sheets to look at them."""

from __future__ import annotations

import math

import numpy as np
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


def normalise_patches(patches: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """Each patch minus its mean over its deviation (MAE's norm_pix targets, arXiv 2111.06377
    section 4).
    """
    mean, deviation = patch_statistics(patches, eps)
    return (patches - mean) / deviation


def paint(
    images: torch.Tensor, mask: torch.Tensor, colour: float | torch.Tensor = 0.5
) -> torch.Tensor:
    """Images (B,C,H,W) with patches painted over where mask (B,N) is 1; `colour` is broadcast to
    the images.
    """
    rows = round(mask.shape[1] ** 0.5)
    cells = mask.reshape(len(mask), 1, rows, -1).float()
    hidden = F.interpolate(cells, size=images.shape[-2:], mode="nearest") > 0.5
    return torch.where(
        hidden, torch.as_tensor(colour, dtype=images.dtype, device=images.device), images
    )


def colour_codes(codes: torch.Tensor, side: int) -> torch.Tensor:
    """Integers (B,N) of the patches of square images -> pictures (B,3,side,side): a colour for
    each, far from the next's.
    """
    rows = round(codes.shape[1] ** 0.5)
    shift = torch.tensor([[0.0], [1 / 3], [2 / 3]], device=codes.device)
    colours = (
        0.5 + 0.5 * (2 * math.pi * (codes[:, None].float() * 0.618034 + shift)).cos()
    )  # (B, 3, N)
    return F.interpolate(colours.unflatten(2, (rows, rows)), size=side, mode="nearest")


def windows(images: torch.Tensor, size: int) -> torch.Tensor:
    """Each patch of images (B,C,H,W) amid its eight neighbours: (B*N,C,3*size,3*size), borders
    repeated.
    """
    padded = F.pad(images, (size,) * 4, mode="replicate")
    found = F.unfold(padded, 3 * size, stride=size).transpose(1, 2)  # (B, N, C*9*size^2)
    return found.reshape(-1, images.shape[1], 3 * size, 3 * size)


def contact_sheet(columns: list[torch.Tensor], side: int = 96, gap: int = 4) -> np.ndarray:
    """Columns of images in [0,1], each (B,3,H,W), side by side: uint8 (height, width, 3), one row
    per sample.

    Small images are enlarged by a whole factor, without smoothing, to about `side` pixels.
    """
    factor = max(1, round(side / columns[0].shape[-1]))
    cells = [x.detach().float().cpu().clamp(0, 1) for x in columns]
    cells = [F.interpolate(x, scale_factor=factor, mode="nearest") for x in cells]
    cells = [F.pad(x, (0, gap, 0, gap), value=1.0) for x in cells]
    rows = torch.cat(cells, dim=3).permute(0, 2, 3, 1)
    sheet = rows.reshape(-1, *rows.shape[2:])[:-gap, :-gap]
    return (sheet * 255).round().to(torch.uint8).numpy()

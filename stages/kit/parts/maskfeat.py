"""Histograms of oriented gradients (HOG) as MaskFeat defines them (arXiv 2112.09133), without its
window: what FastMIM predicts (arXiv 2212.06593, ggjy/FastMIM.pytorch).

It is another HOG than DMJD's (hog.py). Gradients are Sobel's, of images normalised by mean and
deviation and reflected at the border. Bins begin where the gradient points along the rows, and a
cell's histogram has length 1. There is no interpolation between bins or cells, and no block of
cells.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from stages.kit.parts import hog as dmjd

BINS = 9


@torch.no_grad()
def hog(images: torch.Tensor, cell: int, norm: bool = True) -> torch.Tensor:
    """Normalised images (B,C,H,W) -> (B, C*9, H/cell, W/cell), float32, channel c*9 + bin.

    norm: each histogram at length 1 (one of zeros stays), else it is a sum of magnitudes. No
    gradient passes through it. ValueError if `cell` does not divide H and W.
    """
    height, width = images.shape[-2:]
    if height % cell or width % cell:
        raise ValueError(f"hog: cells of {cell} pixels do not divide an image of {height}x{width}")
    x = F.pad(images.float(), (1, 1, 1, 1), mode="reflect")
    # smoothed first: at the border both neighbours are the same pixel, and their difference exactly
    # 0, which is the beginning of bin 0
    down = x[..., :-2, :] + 2 * x[..., 1:-1, :] + x[..., 2:, :]
    along = x[..., :-2] + 2 * x[..., 1:-1] + x[..., 2:]
    gx = down[..., :-2] - down[..., 2:]  # left minus right
    gy = along[..., :-2, :] - along[..., 2:, :]  # above minus below
    magnitude = (gx.square() + gy.square()).sqrt()
    place = (torch.atan2(gx, gy) / math.pi * BINS).floor()  # -9..9
    place = place - BINS * (place / BINS).floor()
    # bin by bin, so that the order of sums is the same on every device
    parts = [torch.where(place == k, magnitude, 0.0) for k in range(BINS)]
    found = torch.stack([F.avg_pool2d(part, cell) * cell**2 for part in parts], dim=2)
    return (F.normalize(found, dim=2) if norm else found).flatten(1, 2)


def to_tokens(maps: torch.Tensor, cells: int) -> torch.Tensor:
    """Maps (B,K,rows,columns) -> (B,N,K*cells*cells) of places of cells x cells: channel slowest,
    then cell row, then cell column.
    """
    return F.pixel_unshuffle(maps, cells).flatten(2).transpose(1, 2)


def from_tokens(tokens: torch.Tensor, cells: int) -> torch.Tensor:
    """The inverse of `to_tokens` for a square grid of places."""
    side = math.isqrt(tokens.shape[1])
    return F.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (side, side)), cells)


def strokes(maps: torch.Tensor, side: int) -> torch.Tensor:
    """Maps (B,27,rows,columns) -> pictures of edges (B,3,rows*side,columns*side), see hog.py."""
    histograms = maps.unflatten(1, (-1, BINS)).movedim(2, 4)
    # a bin's angle is the gradient's from the rows' direction; hog.py counts from the columns'
    middle = (torch.arange(BINS, device=maps.device) + 0.5) * (math.pi / BINS)
    return dmjd.strokes(histograms, side, math.pi / 2 - middle)

"""Pictures of patches, codes and features, to look at."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F


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


def framed(images: torch.Tensor, boxes: torch.Tensor, colour: tuple) -> torch.Tensor:
    """Images (B,3,H,W) in which a line of one pixel goes round the inner edge of boxes (B,4+): top,
    left, height and width in pixels. colour: red, green and blue in [0, 1].
    """
    top, left, height, width = boxes[:, :4].T[:, :, None]  # (B,1) each
    line = []
    for size, first, length in ((images.shape[2], top, height), (images.shape[3], left, width)):
        place = torch.arange(size, device=images.device)
        inside = (place >= first) & (place < first + length)  # (B,size)
        line.append((inside, inside & ((place == first) | (place == first + length - 1))))
    (rows, row_edges), (columns, column_edges) = line
    edge = row_edges[:, :, None] & columns[:, None] | rows[:, :, None] & column_edges[:, None]
    ink = torch.tensor(colour, dtype=images.dtype, device=images.device).view(3, 1, 1)
    return torch.where(edge[:, None], ink, images)


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


def heat(values: torch.Tensor, side: int) -> torch.Tensor:
    """Numbers in [0,1] (B,N) of the patches of square images -> pictures (B,3,side,side): from
    black by red and yellow to white.
    """
    rows = round(values.shape[1] ** 0.5)
    shift = torch.arange(3, device=values.device)[:, None]  # of red, green, blue
    colours = (3 * values.float()[:, None] - shift).clamp(0, 1)  # (B, 3, N)
    return F.interpolate(colours.unflatten(2, (rows, rows)), size=side, mode="nearest")


def principal_colours(features: torch.Tensor) -> torch.Tensor:
    """Features (B,N,D) of square grids -> pictures (B,3,G,G) in [0,1]: the first three principal
    components as RGB.
    """
    flat = features.float().flatten(0, 1)
    flat = flat - flat.mean(dim=0)
    axes = torch.linalg.svd(flat, full_matrices=False).Vh[:3]
    axes = axes * axes.sum(dim=1, keepdim=True).sign()  # an SVD's signs are arbitrary
    parts = F.pad(flat @ axes.T, (0, 3 - len(axes)))
    low, high = (parts.quantile(q, dim=0) for q in (0.02, 0.98))
    parts = ((parts - low) / (high - low).clamp(min=1e-6)).clamp(0, 1)
    side = round(features.shape[1] ** 0.5)
    return parts.view(len(features), side, side, 3).permute(0, 3, 1, 2)


def windows(images: torch.Tensor, size: int) -> torch.Tensor:
    """Each patch of images (B,C,H,W) amid its eight neighbours: (B*N,C,3*size,3*size), borders
    repeated.
    """
    padded = F.pad(images, (size,) * 4, mode="replicate")
    found = F.unfold(padded, 3 * size, stride=size).transpose(1, 2)  # (B, N, C*9*size^2)
    return found.reshape(-1, images.shape[1], 3 * size, 3 * size)

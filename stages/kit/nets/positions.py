"""Fixed two-dimensional sin-cos position embeddings, as in MAE (arXiv 2111.06377)."""

from __future__ import annotations

import torch


def sincos_2d(dim: int, grid: int | tuple[int, int]) -> torch.Tensor:
    """Embeddings (rows*columns, dim) of a grid in row-major order, computed in float64 and rounded
    to float32.

    The first half of the channels encodes the column x, the second half the row y; each half of
    place p is [sin(p w_0), ..., sin(p w_{dim/4-1}), cos(p w_0), ...] with w_k = 10000^(-k/(dim/4)).
    Raises ValueError if dim is no multiple of 4.
    """
    if dim % 4:
        raise ValueError(f"sin-cos positions need a width that is a multiple of 4, found {dim}")
    rows, columns = (grid, grid) if isinstance(grid, int) else grid
    # On the CPU in float64 whatever the default device is: the table is a constant of the method.
    omega = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64, device="cpu") / (dim // 4))
    y, x = torch.meshgrid(
        torch.arange(rows, dtype=torch.float64, device="cpu"),
        torch.arange(columns, dtype=torch.float64, device="cpu"),
        indexing="ij",
    )
    angles = [place.reshape(-1, 1) * omega for place in (x, y)]
    return torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)], dim=1).float()

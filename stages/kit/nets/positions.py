"""Tables of positions: MAE's fixed sin-cos one, and how official codes resize one to another grid.

timm resizes in its own way, which is the default (tasks/_features.py tells how). `fitted` does it
as the papers' codes do:
- "bicubic" (facebookresearch/mae, microsoft/unilm for absolute tables): plain bicubic, without
  antialiasing, for a smaller grid, too;
- "dino" (facebookresearch/dino, bytedance/ibot, liuxingbin/dbot): the same, but the sides are
  multiplied by (new + 0.1) / old, lest a product be rounded down, and the samples lie that much
  closer together;
- relative tables, with either (microsoft/unilm, microsoft/SimMIM): a cubic spline on offsets that
  grow geometrically with the distance; a straight line for grids of 2 x 2 places, as in ggjy/
  FastMIM.
Prefix tokens, and the class token's entries of a relative table, are copied.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F


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
    y, x = torch.meshgrid(
        torch.arange(rows, dtype=torch.float64, device="cpu"),
        torch.arange(columns, dtype=torch.float64, device="cpu"),
        indexing="ij",
    )
    return sincos(torch.stack([x, y], dim=-1).reshape(-1, 2), dim).float()


def sincos(places: torch.Tensor, dim: int) -> torch.Tensor:
    """Numbers (..., 2) -> their code (..., dim), of each as `sincos_2d` has it, the first's before
    the second's. They need not be whole; dim is a multiple of 4.
    """
    steps = torch.arange(dim // 4, dtype=places.dtype, device=places.device)
    angles = places[..., None] * 10000.0 ** (-steps / (dim // 4))  # (..., 2, dim / 4)
    return torch.stack([angles.sin(), angles.cos()], dim=-2).flatten(-3)


def seen_from(first: torch.Tensor, second: torch.Tensor, grid: int) -> tuple:
    """Where a view's patches lie in another view of the same image (SiM, arXiv 2206.01204).

    Boxes (B,5) of both, see data/views.View.make -> for each of the second one's grid*grid patches,
    row by row, its centre's column and row in the first one's grid, (B,N,2), in which 0 is the
    centre of the first patch, and which may lie outside of it; and how much wider and higher the
    second view is, natural logarithms (B,2). float64.
    """
    middle = (torch.arange(grid, dtype=torch.float64, device=first.device) + 0.5) / grid
    row, column = torch.cartesian_prod(middle, middle).unbind(1)  # (N,)
    top, left, height, width, flip = second.double().T[:, :, None]  # (B,1) each
    y = top + height * row
    x = left + width * torch.where(flip > 0, 1 - column, column)
    sizes = [width, height]
    top, left, height, width, flip = first.double().T[:, :, None]
    row, column = (y - top) / height, (x - left) / width
    column = torch.where(flip > 0, 1 - column, column)
    places = grid * torch.stack([column, row], dim=2) - 0.5
    return places, torch.cat([sizes[0] / width, sizes[1] / height], dim=1).log()


def fitted(
    state: dict[str, torch.Tensor], encoder: torch.nn.Module, how: str
) -> dict[str, torch.Tensor]:
    """Weights of an encoder for other sizes of images, with tables of positions that fit `encoder`.

    how: "bicubic" or "dino". Tables of the right size stay as they are.
    """
    found, shapes = dict(state), {name: x.shape for name, x in encoder.state_dict().items()}
    for name, table in state.items():
        kind, shape = name.split(".")[-1], shapes.get(name, table.shape)
        if table.shape == shape:
            continue
        if kind == "pos_embed":
            prefix = shape[1] - encoder.patch_embed.num_patches
            old, new = (math.isqrt(length - prefix) for length in (table.shape[1], shape[1]))
            patches = absolute(table[:, prefix:], old, new, 0.1 if how == "dino" else None)
            found[name] = torch.cat([table[:, :prefix], patches], dim=1)
        elif kind == "relative_position_bias_table":
            found[name] = relative(table, shape[0])
    return found


def absolute(table: torch.Tensor, old: int, new: int, excess: float | None = None) -> torch.Tensor:
    """Positions (1, old*old, D) -> (1, new*new, D), bicubic without antialiasing.

    excess: sides are multiplied by (new + excess) / old; None: they become `new`, which samples as
    an excess of 0 does.
    """
    if old == new:
        return table
    size = {"size": (new, new)} if excess is None else {"scale_factor": (new + excess) / old}
    grid = table.unflatten(1, (old, old)).permute(0, 3, 1, 2)
    return F.interpolate(grid, mode="bicubic", **size).permute(0, 2, 3, 1).flatten(1, 2)


def relative(table: torch.Tensor, entries: int) -> torch.Tensor:
    """A table of relative positions (T, heads) -> (entries, heads).

    Of a grid of n x n places it has (2n-1)^2 entries, after which may come 3 of a class token. The
    n - 1 offsets to one side are placed at 1, 1 + q, 1 + q + q^2, ... so that the last one lies at
    the new table's last; through them goes a cubic spline (not-a-knot), first along one axis, then
    along the other. q is 1.01 at least: for a smaller grid the middle of the table is read. What
    lies outside is taken at the edge. Of 2 x 2 places there are too few offsets for a spline, and
    lines go through them; one place says the same for all. ValueError for tables of other grids.
    """
    from scipy.interpolate import make_interp_spline  # here, as it is slow to import

    old, new = math.isqrt(len(table)), math.isqrt(entries)
    extra = len(table) - old**2
    if not old % 2 or not new % 2 or extra != entries - new**2:
        raise ValueError(
            f"relative positions: found tables of {len(table)} and {entries} entries, expected "
            "those of square grids, both with or both without a class token"
        )
    places = geometric(old // 2, new // 2)
    offsets = np.clip(np.arange(-(new // 2), new // 2 + 1), places[0], places[-1])
    values = table[: old**2].detach().cpu().double().unflatten(0, (old, old)).numpy()
    for axis in (0, 1):
        degree = 3 if old > 3 else old // 2
        values = make_interp_spline(places, values, k=degree, axis=axis)(offsets)
    found = torch.from_numpy(values).flatten(0, 1).to(table)
    return torch.cat([found, table[old**2 :]])


def geometric(count: int, reach: int) -> np.ndarray:
    """Places of the offsets -count..count: 0, and to either side sums of 1, q, q^2, ...

    q is found by bisection in [1.01, 1.5], so that the last place is `reach`, as far as it can be.
    """
    low, high = 1.01, 1.5
    while high - low > 1e-6:
        q = (low + high) / 2
        low, high = (low, q) if (1 - q**count) / (1 - q) > reach else (q, high)
    side = np.cumsum(q ** np.arange(count))
    return np.concatenate([-side[::-1], [0.0], side])

"""Orders in which the patches of an image are predicted one after the other.

An order is the patches' ranks, (B,N) of 0..N-1, 0 is the first: a pure function of uniform random
numbers, as masks are. Row b depends on the random numbers of row b alone.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

# of SemAIM's nested squares: sides 2, 6 and 10 of 14, as shares of the grid's side
RINGS = (1 / 7, 3 / 7, 5 / 7)


def by_score(scores: torch.Tensor) -> torch.Tensor:
    """Scores (B,N), smaller is earlier -> ranks (B,N); equal ones in raster order."""
    return scores.argsort(dim=1, stable=True).argsort(dim=1)


def stochastic(uniform: Callable, grid: int) -> torch.Tensor:
    """A fresh random order for each sample: SAIM's (arXiv 2212.01610)."""
    return by_score(uniform("order", grid**2))


def raster(rows: int, grid: int, turning: bool = False, device=None) -> torch.Tensor:
    """Row by row from left to right, for `rows` samples; turning: odd rows from right to left
    (boustrophedon, which SemAIM's code calls "raster", and the plain one "zigzag").
    """
    places = torch.arange(grid**2, device=device).view(grid, grid)
    if turning:
        places[1::2] = places[1::2].flip(1)
    return places.flatten().expand(rows, -1)


def centre_out(uniform: Callable, grid: int, anywhere: bool = False) -> torch.Tensor:
    """From the inner to the outer of nested squares, at random within each (SemAIM, skyoux/SemAIM).

    The squares lie around the image's centre, or with `anywhere` around a random patch of each
    sample; one that would leave the grid is shifted into it. At a grid of 14 they are SemAIM's,
    save that its table for random centres never reaches the last row and column.
    """
    noise = uniform("order", grid**2).double()
    if anywhere:
        centre = (uniform("centre", 2).double() * grid).long()  # (B,2)
    else:
        centre = torch.full((len(noise), 2), grid // 2, device=noise.device)
    place = torch.arange(grid, device=noise.device)
    for share in RINGS:
        half = max(1, round(share * grid / 2))
        first = (centre - half).clamp(min=0).clamp(max=max(grid - 2 * half, 0))[..., None]
        inside = (place >= first) & (place < first + 2 * half)  # (B,2,grid)
        noise = noise - (inside[:, 0, :, None] & inside[:, 1, None, :]).flatten(1).double()
    return by_score(noise)


def from_peak(uniform: Callable, grid: int, saliency: torch.Tensor) -> torch.Tensor:
    """By the distance to the patch of the largest saliency (B,N), equal ones at random (SemAIM)."""
    noise, peak = uniform("order", grid**2).double(), saliency.argmax(dim=1, keepdim=True)
    place = torch.arange(grid**2, device=noise.device)
    rows = torch.div(peak, grid, rounding_mode="floor") - torch.div(
        place, grid, rounding_mode="floor"
    )
    distance = (rows.square() + (peak % grid - place % grid).square()).double().sqrt()
    return by_score(distance + 1e-3 * noise)

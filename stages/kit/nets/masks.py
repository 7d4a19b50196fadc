"""Which patches are hidden: masks as pure functions of uniform random numbers, whole batches at
once.

1 or True = hidden. Row b of every result depends on row b of the given random numbers alone, so a
sample's mask does not depend on who else is in the batch; nothing here waits for a device.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import torch
import torch.nn.functional as F

from workflow.checks import keep_count

# Blocks per mask at most; of 20,000 masks of 14x14 (75 hidden) or 16x16 (98 hidden) none has more
# than 12.
ROUNDS = 16
TRIES = 10  # attempts per block, as in the official code


def random_masking(
    noise: torch.Tensor, keep: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """MAE's uniform masking (arXiv 2111.06377, section 3): noise (B,N) -> (ids_keep, ids_restore,
    mask).

    ids_keep (B,keep): the patches with the smallest noise, in that order; ids_restore (B,N): where
    each patch is in the sequence kept-then-dropped; mask (B,N) float: 0 kept, 1 dropped.
    """
    ids_shuffle = noise.argsort(dim=1, stable=True)
    ids_restore = ids_shuffle.argsort(dim=1)
    return ids_shuffle[:, :keep], ids_restore, (ids_restore >= keep).to(noise.dtype)


def block_masks(
    uniform: Callable[..., torch.Tensor],
    grid: tuple[int, int],
    count: int | torch.Tensor,
    smallest: int = 16,
    largest: int | None = None,
    aspect: float = 0.3,
    rounds: int = ROUNDS,
    tries: int = TRIES,
) -> torch.Tensor:
    """BEiT's block-wise masks (arXiv 2106.08254, algorithm 1): bool (B,N) with at most `count`
    ones, or, as in iBOT (arXiv 2111.07832), as many as each row's of `count` (B,), which may be
    fractions.

    Rectangles are added until `count` patches of the grid (rows, columns) are hidden. A rectangle's
    area is uniform between `smallest` and cap = min(count - hidden, largest), in whichever order;
    its aspect ratio is log-uniform in (aspect, 1/aspect); it lies anywhere inside and is smaller
    than the grid both ways; it is taken if it hides 1..cap new patches. A mask whose `tries` all
    fail is finished, as it is with so many rectangles as there are `rounds`. `uniform(name,
    *shape)` gives numbers (B, *shape) in [0,1), as Progress.uniform does.
    """
    rows, columns = grid
    draws = uniform("block", rounds, tries, 4)
    log_aspect = math.log(aspect)
    ratio = (log_aspect * (1 - 2 * draws[..., 1])).exp()
    hidden = torch.zeros(len(draws), rows, columns, dtype=torch.bool, device=draws.device)
    going = torch.ones(len(draws), dtype=torch.bool, device=draws.device)
    row = torch.arange(rows, device=draws.device)[:, None]
    column = torch.arange(columns, device=draws.device)
    for number in range(rounds):
        cap = (count - hidden.sum((1, 2))).clamp(max=largest or count)
        area = smallest + draws[:, number, :, 0] * (cap[:, None] - smallest)  # (B, tries)
        height, width = (
            (area * ratio[:, number]).sqrt().round(),
            (area / ratio[:, number]).sqrt().round(),
        )
        fits = (height < rows) & (width < columns)
        top = (draws[:, number, :, 2] * (rows - height + 1)).floor().clamp(min=0)
        left = (draws[:, number, :, 3] * (columns - width + 1)).floor().clamp(min=0)
        y0, y1 = top.long(), (top + height).long().clamp(max=rows)
        x0, x1 = left.long(), (left + width).long().clamp(max=columns)
        # Hidden cells above and left of each corner; from four of them, those inside a rectangle.
        sums = F.pad(hidden.cumsum(1).cumsum(2), (1, 0, 1, 0)).flatten(1)
        inside = sum(
            sign * sums.gather(1, y * (columns + 1) + x)
            for y, x, sign in ((y1, x1, 1), (y0, x1, -1), (y1, x0, -1), (y0, x0, 1))
        )
        new = (y1 - y0) * (x1 - x0) - inside
        good = fits & (new > 0) & (new <= cap[:, None])
        going = going & good.any(dim=1)
        if draws.device.type == "cpu" and not going.any():  # on a GPU asking would mean waiting
            break
        first = good.to(torch.uint8).argmax(
            dim=1, keepdim=True
        )  # of the tries that are good, if any is
        y0, y1, x0, x1 = (edge.gather(1, first)[..., None] for edge in (y0, y1, x0, x1))
        chosen = (row >= y0) & (row < y1) & (column >= x0) & (column < x1)
        hidden = hidden | (chosen & going[:, None, None])
    return hidden.flatten(1)


def exact_block_masks(
    uniform: Callable[..., torch.Tensor],
    grid: tuple[int, int],
    count: int,
    smallest: int = 16,
    largest: int | None = None,
    aspect: float = 0.3,
    **limits: int,
) -> torch.Tensor:
    """BEiT v2's masks: `block_masks` topped up with random visible patches to exactly `count` ones
    each. limits: its `rounds` and `tries`.
    """
    hidden = block_masks(uniform, grid, count, smallest, largest, aspect, **limits)
    rank = torch.where(hidden, -1.0, uniform("top-up", hidden.shape[1])).argsort(dim=1, stable=True)
    return torch.zeros_like(hidden).scatter_(1, rank[:, :count], True)


def mixed_masking(
    uniform: Callable[..., torch.Tensor],
    blocked: torch.Tensor,
    keep: int,
    roll: torch.Tensor | int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """BootMAE's masks of blocks and single patches (arXiv 2207.07116, official code).

    blocked (B,N) -> as `random_masking`, with the patches of the blocks in the last places of a
    random order, of which the first `keep` are kept. Then the order is rolled: the last `roll`
    patches of it come first, so that as many blocked ones are kept.
    """
    noise = uniform("order", blocked.shape[1])
    order = (noise + blocked).argsort(dim=1, stable=True)
    places = torch.arange(blocked.shape[1], device=order.device) - roll
    order = order[:, places % blocked.shape[1]]
    ids_restore = order.argsort(dim=1)
    return order[:, :keep], ids_restore, (ids_restore >= keep).to(noise.dtype)


def surrounded(mask: torch.Tensor) -> torch.Tensor:
    """Mask (B,N) of 0 and 1 on square grids -> what its patches count in BootMAE (arXiv 2207.07116,
    official code): a hidden one 1, plus the share of hidden ones in the 3 x 3 patches around it, of
    which those outside of the grid are not hidden; a visible one 0.
    """
    side = math.isqrt(mask.shape[1])
    maps = mask.unflatten(1, (1, side, side))
    return mask + mask * F.avg_pool2d(maps, 3, stride=1, padding=1).flatten(1)


def hidden_ids(mask: torch.Tensor, count: int) -> torch.Tensor:
    """Positions (B,count) of the ones of bool masks (B,N), ascending; where a row has fewer ones,
    zeros' follow.
    """
    return (~mask).to(torch.uint8).argsort(dim=1, stable=True)[:, :count]


def random_masks(noise: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """noise (B,N) -> bool (B,N): in row b the int(count[b]) patches with the smallest noise are
    hidden.
    """
    return noise.argsort(dim=1, stable=True).argsort(dim=1) < count.floor()[:, None]


def take(tokens: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Tokens (B,N,D) at positions ids (B,n) -> (B,n,D)."""
    return tokens.gather(1, ids[..., None].expand(-1, -1, tokens.shape[-1]))


def disjoint_counts(cells: int, ratio: float, predict: float, views: int) -> tuple[int, list[int]]:
    """DMJD's counts (arXiv 2301.00230, official code): cells kept visible in each view, and for
    each view how many of the cells that it hides no earlier view has hidden.

    A view hides `hidden` = cells - int(cells * (1 - ratio)); the first v views together hide hidden
    + int(min(predict - ratio, (v - 1) * ratio) * cells) different cells, in exact arithmetic.
    `predict` beyond what so many views can reach is not reached. Raises ValueError for what cannot
    be.
    """
    if views < 1:
        raise ValueError(f"views: found {views}, expected 1 or more")
    keep = keep_count(cells, ratio)
    m, goal = Fraction(str(ratio)), Fraction(str(predict))
    if not m <= goal <= 1:
        raise ValueError(
            f"predict_ratio: found {predict}, expected a share from mask_ratio ({ratio}) to 1"
        )
    seen = [cells - keep + int(min(goal - m, v * m) * cells) for v in range(views)]
    return keep, [seen[0], *(after - before for before, after in zip(seen, seen[1:], strict=False))]


def disjoint_masking(
    noise: torch.Tensor, ratio: float, predict: float | None = 1.0, cell: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Several masks of each image, each hiding first what the others showed: DMJD (arXiv
    2301.00230).

    noise (B,V,n) in [0,1), for V views of a square grid of n cells of cell x cell patches each ->
    the visible patches (B,V,keep*cell^2) and the hidden ones (B,V,(n-keep)*cell^2). A view hides as
    many fresh cells, which no earlier view has hidden, as `disjoint_counts` says, and others for
    the rest, all at random: each cell is hidden in each view with the same probability. predict
    None: every view is drawn by itself, without regard to the others. One view of one-patch cells
    is `random_masking`.

    The official code knows two views and draws the second with one permutation for the whole batch;
    here the rows are independent. As there, a list holds the top-left patches of all its cells,
    then the top-right ones and so on; it is not sorted.
    """
    views, cells = noise.shape[1:]
    side = math.isqrt(cells)
    if side * side != cells:
        raise ValueError(f"disjoint masking: {cells} cells do not make a square grid")
    if predict is None:
        keep, fresh = keep_count(cells, ratio), [cells - keep_count(cells, ratio)] * views
    else:
        keep, fresh = disjoint_counts(cells, ratio, predict, views)
    orders, left = [], cells
    never = torch.ones_like(
        noise[:, 0]
    )  # cells that are visible in all views so far; `left` of them
    for view, new in enumerate(fresh):
        # noise - 1 is exact in float32, noise + 1 is not: ties would favour the first cells
        order = (noise[:, view] - never).argsort(dim=1, stable=True)
        first, second = order[:, :left], order[:, left:]
        stay = keep - (left - new)  # of the second
        orders.append(
            torch.cat(
                [
                    first[:, : left - new],
                    second[:, :stay],
                    first[:, left - new :],
                    second[:, stay:],
                ],
                dim=1,
            )
        )
        if predict is not None:
            never, left = never.scatter(1, first[:, left - new :], 0.0), left - new
    order = torch.stack(orders, dim=1)
    corner = order // side * (side * cell * cell) + order % side * cell  # a cell's top-left patch
    inside = torch.arange(cell, device=order.device)
    inside = (inside[:, None] * (side * cell) + inside).flatten()
    return tuple(
        (ids[..., None, :] + inside[:, None]).flatten(-2)
        for ids in corner.split([keep, cells - keep], -1)
    )


def unit_masks(noise: torch.Tensor, count: int, cell: int) -> torch.Tensor:
    """Random square units of cell x cell patches: noise (B,n) in [0,1) of a square grid of n units
    -> bool (B, n*cell^2) of patches with exactly `count` units hidden (SimMIM, arXiv 2111.09886).
    """
    side = math.isqrt(noise.shape[1])
    hidden = noise.argsort(dim=1, stable=True).argsort(dim=1) < count
    grid = hidden.unflatten(1, (side, side))
    return grid.repeat_interleave(cell, dim=1).repeat_interleave(cell, dim=2).flatten(1)

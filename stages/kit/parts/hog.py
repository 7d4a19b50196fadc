"""Histograms of oriented gradients (HOG) as DMJD predicts them, and their picture.

As in the official code (arXiv 2301.00230, mx-mark/DMJD) with one departure: magnitudes are added in
float64. The sums are then exact for 8-bit images, and hence the same in any order that a GPU takes.
The HOG of MaskFeat (arXiv 2112.09133, maskfeat.py) is another one: it differs in the gradient, also
at the borders, the origin of the bins and the normalisation.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

BINS = 9
# Pixel values treated at once on a CPU, as many as its caches hold; 256 times as many on a GPU.
WORKING_SET = 1 << 16


def hog(images: torch.Tensor, cell: int, bins: int = BINS) -> torch.Tensor:
    """Images (B,C,H,W) of 0..255 -> histograms of each channel (B,C,H/cell,W/cell,bins), float32.

    A pixel's gradient is the difference of its two neighbours, undivided, down the rows and along
    the columns; it is 0 on the border, where one is missing. The whole magnitude goes into the bin
    of the angle modulo 180 degrees; bin k begins at 180 k / bins. A histogram is the sum over a
    cell of cell x cell pixels, divided by their number. No gradient passes through it. ValueError
    if `cell` does not divide H and W; RuntimeError for images that require a gradient.
    """
    height, width = images.shape[-2:]
    if height % cell or width % cell:
        raise ValueError(f"hog: cells of {cell} pixels do not divide an image of {height}x{width}")
    values = WORKING_SET if images.device.type == "cpu" else 256 * WORKING_SET
    size = max(1, values // images[0].numel())
    return torch.cat([_hog(part, cell, bins) for part in images.float().split(size)])


def _hog(images: torch.Tensor, cell: int, bins: int) -> torch.Tensor:
    down, along = torch.zeros_like(images), torch.zeros_like(images)
    torch.sub(images[..., 2:, :], images[..., :-2, :], out=down[..., 1:-1, :])
    torch.sub(images[..., 2:], images[..., :-2], out=along[..., 1:-1])
    magnitude = (down.square() + along.square()).sqrt()
    # Rounding can put angles of 0, 45 and 90 degrees below the bin that they begin: the small
    # addition corrects it. The bins are -bins..bins.
    place = torch.atan2(down, along).mul_(bins / math.pi).add_(bins * 2**-22).floor_()
    # modulo `bins`; torch.remainder and torch.where take many times longer
    place = (place - bins * (place / bins).floor_()).long()
    rows, columns = images.shape[-2] // cell, images.shape[-1] // cell

    def cells(x):  # (B,C,H,W) -> (B*C*rows*columns, cell*cell)
        return x.reshape(-1, rows, cell, columns, cell).transpose(2, 3).reshape(-1, cell * cell)

    histograms = torch.zeros(
        images[:, :, ::cell, ::cell].numel(), bins, dtype=torch.float64, device=images.device
    )
    histograms.scatter_add_(1, cells(place), cells(magnitude).double())
    return (histograms / cell**2).float().view(*images.shape[:2], rows, columns, bins)


def whiten(histograms: torch.Tensor, eps: float = 1e-5) -> torch.Tensor:
    """Each histogram (...,bins) at zero mean and unit (biased) variance.

    A histogram of equal numbers becomes zeros.
    """
    return F.layer_norm(histograms, histograms.shape[-1:], eps=eps)


def to_tokens(histograms: torch.Tensor, cells: int) -> torch.Tensor:
    """(B,C,rows,columns,bins) -> (B, N, cells*cells*bins*C) of N patches, row by row.

    A patch has cells x cells cells. Its order is cell row, cell column, bin, channel, the channel
    fastest.
    """
    x = histograms.unflatten(3, (-1, cells)).unflatten(2, (-1, cells))  # (B, C, R, r, K, k, bins)
    return x.permute(0, 2, 4, 3, 5, 6, 1).flatten(3).flatten(1, 2)


def from_tokens(tokens: torch.Tensor, cells: int, channels: int = 3) -> torch.Tensor:
    """The inverse of `to_tokens` for a square grid of patches."""
    side = math.isqrt(tokens.shape[1])
    x = tokens.unflatten(1, (side, side))
    x = x.unflatten(3, (cells, cells, -1, channels))  # (B, R, K, r, k, bins, C)
    return x.permute(0, 6, 1, 3, 2, 4, 5).flatten(4, 5).flatten(2, 3)


def strokes(histograms: torch.Tensor, side: int, angle: torch.Tensor | None = None) -> torch.Tensor:
    """Histograms (B,C,rows,columns,bins) -> pictures of edges (B,C,rows*side,columns*side).

    Each bin is a stroke through its cell's centre, across the gradient and as bright as the bin.
    The brightest is 1; negative bins are dark. angle (bins,): of the gradients of a bin, from the
    direction of the columns; by default the middles of this module's bins.
    """
    if angle is None:
        bins = histograms.shape[-1]
        angle = (torch.arange(bins, device=histograms.device) + 0.5) * (math.pi / bins)
    place = torch.arange(side, device=histograms.device) - (side - 1) / 2
    distance = angle.sin()[:, None, None] * place[:, None] + angle.cos()[:, None, None] * place
    glyphs = (1 - distance.abs()).clamp(min=0)  # (bins, side, side): one pixel wide
    drawn = torch.einsum("bcrkn,nyx->bcrykx", histograms.float().clamp(min=0), glyphs)
    drawn = drawn.flatten(4, 5).flatten(2, 3)
    return drawn / drawn.amax(dim=(1, 2, 3), keepdim=True).clamp(min=1e-6)

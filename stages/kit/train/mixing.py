"""Mixup (arXiv:1710.09412) and CutMix (arXiv:1905.04899) of images 2j and 2j + 1 with each other.

Official code mixes the first image of a batch with the last. Here neighbours are partners, so that
they stay together however a batch is cut into (even) micro batches and processes. In a shuffled
batch these pairs are as random. Who calls this draws the numbers; nothing here is random.
"""

from __future__ import annotations

import math

import torch


def partners(x: torch.Tensor) -> torch.Tensor:
    """(B, ...) with rows 2j and 2j + 1 exchanged; B must be even."""
    return x.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)


def box(height: int, width: int, row: int, column: int, share: float) -> tuple[slice, slice]:
    """CutMix's box, of sides sqrt(1 - share) times the image's, around (row, column).

    Its rim is cut off at the image's, as in timm, so an image may keep more than `share`.
    """
    side = math.sqrt(1 - share)

    def across(size: int, centre: int) -> slice:
        half = int(size * side) // 2
        return slice(max(centre - half, 0), min(centre + half, size))

    return across(height, row), across(width, column)


def outside(height: int, width: int, cut: tuple[slice, slice]) -> torch.Tensor:
    """(H, W): 0 inside a box, 1 outside; its mean is the share that an image keeps of itself."""
    share = torch.ones(height, width)
    share[cut] = 0
    return share


def mixed(
    images: torch.Tensor,
    labels: torch.Tensor,
    share: torch.Tensor | float,
    area: torch.Tensor | float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (B, C, H, W) and soft labels (B, K), each mixed with its partner's.

    share: what each pixel keeps of its own image, (H, W) or one number; area: what the label keeps,
    the mean of `share`. Both are in [0, 1].
    """
    images = images * share + partners(images) * (1 - share)
    return images, labels * area + partners(labels) * (1 - area)

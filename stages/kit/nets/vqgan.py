"""The convolutional encoder and decoder of VQGAN (arXiv 2012.09841), for square images.

Each level of resolution has residual blocks (group norm, swish, 3x3 convolution, twice); a 3x3
convolution of stride 2 leads to the next level, nearest-neighbour upsampling and a 3x3 convolution
back. Attention, if any, looks at the lowest resolution only. Departures from
CompVis/taming-transformers: the decoder has as many blocks as the encoder, there one more in each
level; attention stands alone, there between two more blocks; narrow layers have groups of four
channels, where the official 32 groups would be of one.
"""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn


class Encoder(nn.Sequential):
    """(B,3,H,W) -> (B,dim,h,w), h = H / 2^(levels - 1). widths: channels of each level."""

    def __init__(self, widths: list[int], blocks: int, dim: int, attention: bool):
        layers, channels = [nn.Conv2d(3, widths[0], 3, padding=1)], widths[0]
        for level, width in enumerate(widths):
            if level:  # padded right and below only
                down = nn.Conv2d(channels, channels, 3, stride=2)
                layers += [nn.ZeroPad2d((0, 1, 0, 1)), down]
            for _ in range(blocks):
                layers.append(Block(channels, width))
                channels = width
        layers += [Attention(channels)] if attention else []
        super().__init__(*layers, norm(channels), nn.SiLU(), nn.Conv2d(channels, dim, 1))


class Decoder(nn.Sequential):
    """(B,dim,h,w) -> (B,3,H,W): the mirror image of the encoder with the same settings."""

    def __init__(self, widths: list[int], blocks: int, dim: int, attention: bool):
        channels = widths[-1]
        layers = [nn.Conv2d(dim, channels, 3, padding=1)]
        layers += [Attention(channels)] if attention else []
        for level, width in enumerate(reversed(widths)):
            if level:
                up = nn.Conv2d(channels, channels, 3, padding=1)
                layers += [nn.UpsamplingNearest2d(scale_factor=2), up]
            for _ in range(blocks):
                layers.append(Block(channels, width))
                channels = width
        super().__init__(*layers, norm(channels), nn.SiLU(), nn.Conv2d(channels, 3, 3, padding=1))


class Block(nn.Module):
    """(B,into,h,w) -> (B,out,h,w): what two convolutions make of it is added."""

    def __init__(self, into: int, out: int):
        super().__init__()
        self.first = nn.Sequential(norm(into), nn.SiLU(), nn.Conv2d(into, out, 3, padding=1))
        self.second = nn.Sequential(norm(out), nn.SiLU(), nn.Conv2d(out, out, 3, padding=1))
        self.skip = nn.Identity() if into == out else nn.Conv2d(into, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.skip(x) + self.second(self.first(x))


class Attention(nn.Module):
    """One head over all places of (B,C,h,w); its result is added."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = norm(channels)
        self.qkv, self.proj = nn.Conv2d(channels, 3 * channels, 1), nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm(x)).flatten(2).transpose(1, 2)  # (B,hw,3C)
        found = F.scaled_dot_product_attention(*(part[:, None] for part in qkv.chunk(3, dim=2)))
        return x + self.proj(found[:, 0].transpose(1, 2).unflatten(2, x.shape[2:]))


def norm(channels: int) -> nn.GroupNorm:
    """32 groups, or fewer of four channels each."""
    most = 1 << max(0, (channels // 4).bit_length() - 1)
    return nn.GroupNorm(min(math.gcd(32, channels), most), channels, eps=1e-6)


def widths(width: int, multipliers: tuple[int, ...], stride: int) -> list[int]:
    """Channels of the levels that shrink an image `stride` times, a power of 2.

    Level i has width * multipliers[i]; where there are too few, the last one goes on.
    """
    levels = stride.bit_length()
    return [width * multipliers[min(i, len(multipliers) - 1)] for i in range(levels)]

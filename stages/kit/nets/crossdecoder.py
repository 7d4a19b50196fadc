"""The decoder of bootstrapped masked autoencoders (BootMAE, arXiv 2207.07116, section 3): blocks
over all places that also look at inner states of the encoder.

Follows LightDXY/BootMAE: queries and values have a bias, keys have none; a head has dim // heads
channels, so that all of them together may be narrower than `dim`; only mask tokens get a position.
Weights are xavier-uniform, those of the cross-attention's keys and values as one matrix.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm, Mlp
from torch import nn

from stages.kit.nets.init import xavier_init
from stages.kit.nets.masks import take
from stages.kit.nets.positions import sincos_2d


class Attention(nn.Module):
    """Tokens (B,n,dim) look at a context (B,m,width), which may be themselves -> (B,n,dim)."""

    def __init__(self, dim: int, width: int, heads: int):
        super().__init__()
        self.heads, inner = heads, dim // heads * heads
        self.q = nn.Linear(dim, inner)
        self.k = nn.Linear(width, inner, bias=False)
        self.v = nn.Linear(width, inner)
        self.proj = nn.Linear(inner, dim)
        self.fused_attn = True  # see kit/nets/attention.py

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        seen = (self.q(x), self.k(context), self.v(context))
        q, k, v = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in seen)
        if self.fused_attn:
            found = F.scaled_dot_product_attention(q, k, v)
        else:
            scores = q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)
            found = scores.softmax(dim=-1) @ v
        return self.proj(found.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention among the tokens, then to the context if there is one, then an MLP."""

    def __init__(self, dim: int, width: int | None, heads: int, mlp_ratio: float = 4.0):
        super().__init__()
        self.norm1, self.attn = LayerNorm(dim), Attention(dim, dim, heads)
        self.norm2, self.mlp = LayerNorm(dim), Mlp(dim, int(dim * mlp_ratio))
        xavier_init(self)
        self.cross = None
        if width is not None:
            self.norm3, self.norm4 = LayerNorm(dim), LayerNorm(width)
            self.cross = Attention(dim, width, heads)
            xavier_init(self.cross)
            bound = math.sqrt(6 / (2 * self.cross.k.out_features + width))
            for layer in (self.cross.k, self.cross.v):
                nn.init.uniform_(layer.weight, -bound, bound)

    def forward(self, x: torch.Tensor, context: torch.Tensor | None) -> torch.Tensor:
        seen = self.norm1(x)
        x = x + self.attn(seen, seen)
        if self.cross is not None:
            x = x + self.cross(self.norm3(x), self.norm4(context))
        return x + self.mlp(self.norm2(x))


class CrossDecoder(nn.Module):
    """Encoded tokens of the visible patches, and a state of the encoder -> states of every patch.

    width: of the encoder; prefix: tokens before the patches; inject: whether there is a context.
    """

    def __init__(
        self, width: int, grid: int, dim: int, depth: int, heads: int, prefix: int, inject: bool
    ):
        super().__init__()
        self.prefix = prefix
        self.embed = nn.Linear(width, dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, dim))
        self.register_buffer("pos", sincos_2d(dim, grid), persistent=False)  # (N,dim)
        context = width if inject else None
        self.blocks = nn.ModuleList([Block(dim, context, heads) for _ in range(depth)])
        self.norm = LayerNorm(dim)
        xavier_init(self.embed)
        nn.init.trunc_normal_(self.mask_token, std=0.02, a=-0.02, b=0.02)

    def forward(
        self, tokens: torch.Tensor, ids_restore: torch.Tensor, context: torch.Tensor | None
    ) -> torch.Tensor:
        """Tokens (B,P+n,width), places of all patches in the sequence of visible and hidden ones
        (B,N), as `masks.random_masking` gives them, context (B,P+n,width) -> (B,N,dim).
        """
        x = self.embed(tokens)
        prefix, visible = x[:, : self.prefix], x[:, self.prefix :]
        hidden = ids_restore >= visible.shape[1]  # (B,N)
        seen = take(visible, ids_restore.clamp(max=visible.shape[1] - 1))
        masks = (self.mask_token + self.pos).to(x.dtype)
        x = torch.cat([prefix, torch.where(hidden[..., None], masks, seen)], dim=1)
        for block in self.blocks:
            x = block(x, context)
        return self.norm(x)[:, self.prefix :]

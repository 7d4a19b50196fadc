"""MILAN's prompting decoder (arXiv 2208.06049): only the tokens of hidden patches are updated.

Follows zejiangh/MILAN (models_milan.py). What the encoder gave stays as it entered the decoder, in
every block: keys and values for the hidden patches, without a norm. So the encoder must finish what
it says of visible patches by itself; their prediction is a linear reading of it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm, Mlp
from torch import nn

from stages.kit.nets.init import xavier_init
from stages.kit.nets.positions import sincos_2d


class PromptedBlock(nn.Module):
    """x + attention(queries: norm(x), keys and values: prompts and norm(x)), then x + MLP."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float = 4.0):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = LayerNorm(dim), LayerNorm(dim)
        self.q, self.kv, self.proj = (
            nn.Linear(dim, dim),
            nn.Linear(dim, 2 * dim),
            nn.Linear(dim, dim),
        )
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: torch.Tensor, prompts: torch.Tensor) -> torch.Tensor:
        """Tokens of hidden patches (B,m,D), prompts (B,P+n,D) -> (B,m,D)."""
        seen = self.norm1(x)
        both = torch.cat([prompts, seen], dim=1)  # attention does not depend on their order
        q = self.q(seen).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.kv(both).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.proj(mixed)
        return x + self.mlp(self.norm2(x))


class PromptingDecoder(nn.Module):
    """Encoded tokens -> a prediction of every token, in the sizes of kit/nets/decoder.py.

    width: of the encoded tokens; out: numbers predicted of each; grid: patches along a side;
    prefix: tokens before the patches. Initial weights and fixed positions are MAE's.
    """

    def __init__(
        self, width: int, out: int, grid: int, dim: int, depth: int, heads: int, *, prefix: int = 1
    ):
        super().__init__()
        self.prefix = prefix
        self.embed = nn.Linear(width, dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, dim))
        self.register_buffer("pos", sincos_2d(dim, grid), persistent=False)
        self.blocks = nn.ModuleList(PromptedBlock(dim, heads) for _ in range(depth))
        self.norm, self.pred = LayerNorm(dim), nn.Linear(dim, out)
        xavier_init(self)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, tokens: torch.Tensor, ids_restore: torch.Tensor) -> torch.Tensor:
        """Tokens (B,P+n,width) -> predictions (B,P+N,out): prefix, then patches in image order.

        ids_restore (B,N): where each patch is in the sequence of the n visible ones and then the
        hidden ones, as `masks.random_masking` gives it.
        """
        order, prompts = ids_restore.argsort(dim=1), self.embed(tokens)
        visible = tokens.shape[1] - self.prefix
        places = self.pos.to(prompts.dtype)[order]  # (B,N,dim), visible ones first
        prompts = torch.cat(
            [prompts[:, : self.prefix], prompts[:, self.prefix :] + places[:, :visible]], dim=1
        )
        x = self.mask_token.to(prompts.dtype) + places[:, visible:]
        for block in self.blocks:
            x = block(x, prompts)
        found = self.pred(self.norm(torch.cat([prompts, x], dim=1)))
        back = ids_restore[..., None].expand(-1, -1, found.shape[-1])
        return torch.cat([found[:, : self.prefix], found[:, self.prefix :].gather(1, back)], dim=1)

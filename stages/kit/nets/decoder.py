"""The decoder of masked autoencoders (MAE, arXiv 2111.06377, section 3): a few transformer blocks
over all places.

Initial weights as facebookresearch/mae draws them; fixed sin-cos positions, zero for the prefix.
"""

from __future__ import annotations

import torch
from timm.layers import LayerNorm
from timm.models.vision_transformer import Block
from torch import nn

from stages.kit.nets.init import xavier_init
from stages.kit.nets.masks import take
from stages.kit.nets.positions import sincos_2d


class Decoder(nn.Module):
    """Encoded tokens of the visible patches -> a prediction of every patch.

    width: of the encoded tokens; out: numbers predicted of each token; grid: patches along a side;
    prefix: tokens before the patches, which go through the blocks with them; with_cls: predict
    something of the first of these, too; drop_path: in the last block, rising to it from 0.
    """

    def __init__(
        self,
        width: int,
        out: int,
        grid: int,
        dim: int,
        depth: int,
        heads: int,
        *,
        prefix: int = 0,
        with_cls: bool = False,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
    ):
        super().__init__()
        self.prefix, self.cls = prefix, int(with_cls)
        self.embed = nn.Linear(width, dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, dim))
        positions = sincos_2d(dim, grid)
        self.register_buffer(
            "pos", torch.cat([positions.new_zeros(prefix, dim), positions]), persistent=False
        )
        rates = [drop_path * i / max(depth - 1, 1) for i in range(depth)]
        self.blocks = nn.Sequential(
            *[
                Block(
                    dim,
                    heads,
                    mlp_ratio=mlp_ratio,
                    qkv_bias=True,
                    drop_path=rate,
                    norm_layer=LayerNorm,
                )
                for rate in rates
            ]
        )
        self.norm = LayerNorm(dim)
        self.pred = nn.Linear(dim, out)
        xavier_init(self)
        nn.init.normal_(self.mask_token, std=0.02)

    @staticmethod
    def of(config, width: int, out: int, grid: int, **kw) -> Decoder:
        """In the sizes of a Config that is a checks.Decoder."""
        sizes = (config.decoder_dim, config.decoder_depth, config.decoder_heads)
        return Decoder(width, out, grid, *sizes, **kw)

    def forward(self, tokens: torch.Tensor, ids_restore: torch.Tensor) -> torch.Tensor:
        """Tokens (B,P+n,width) -> predictions (B,N,out) in the order of the image, before them the
        class token's if `with_cls`.

        ids_restore (B,N): where each patch is in the sequence of the n visible ones and then the
        hidden ones, as `masks.random_masking` gives it.
        """
        x = self.embed(tokens)
        prefix, visible = x[:, : self.prefix], x[:, self.prefix :]
        hidden = self.mask_token.to(x.dtype).expand(
            len(x), ids_restore.shape[1] - visible.shape[1], -1
        )
        x = torch.cat([prefix, take(torch.cat([visible, hidden], dim=1), ids_restore)], dim=1)
        x = self.blocks(x + self.pos)
        if self.prefix > self.cls:
            x = torch.cat([x[:, : self.cls], x[:, self.prefix :]], dim=1)
        return self.pred(self.norm(x))

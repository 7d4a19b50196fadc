"""Plain vision transformers: timm's VisionTransformer, and its Beit for methods of that line.

The sizes are those of the entry under `models`. Which positions and initial weights it has is up to
the method:

- "timm": learnt absolute positions, timm's initial weights;
- "sincos": MAE's (arXiv 2111.06377), fixed sin-cos positions, zero for the prefix, xavier weights;
- "beit": BEiT's (arXiv 2106.08254, 2208.06366), timm's Beit with one table of relative positions
  that all blocks share and no absolute ones, weights cut at one deviation of 0.02, what block n
  adds divided by sqrt(2 n), layer scale. A method may ask for other weights (`init`, see `start`).

With `absolute_positions` a "beit" has learnt absolute positions, too. They start as the class token
does, and neither is decayed (`encoders.embeddings`). The other styles have them anyway, so that one
entry makes encoders of different methods alike. `args: {use_abs_pos_emb: true}` does the same, but
fits no other style: timm's ViT does not know it.

Tokens are ordered prefix (class token, registers) first, then patches row by row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timm.models.beit import Beit
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from stages.kit.nets import timm_model
from stages.kit.nets.init import (
    beit_init,
    beit_std,
    scale_by_depth,
    sincos_init,
    trunc_init,
    xavier_patches,
)
from stages.kit.nets.masks import take
from stages.kit.nets.patches import patchify, project
from workflow import checks

CAN = {"drop", "mask", "cls", "taps", "attention", "sizes", "plain"}
NAMES = r"(flexi)?vit_|deit|beit"
CLASSES = ("VisionTransformer", "VisionTransformerDistilled")
BEIT = "beitv2_base_patch16_224"


@dataclass(frozen=True)
class Config(checks.Encoder):
    depth: int = 12  # blocks
    num_heads: int = 3
    absolute_positions: bool = False  # learnt ones in style "beit", which has none of its own

    def __post_init__(self):
        super().__post_init__()
        checks.within(self, "[1, inf)", "depth", most=checks.MOST_DEPTH)
        checks.within(self, "[1, inf)", "num_heads")
        if self.embed_dim % self.num_heads:
            raise ValueError(
                f"embed_dim: found {self.embed_dim}, expected a multiple of num_heads "
                f"{self.num_heads}"
            )


def create(spec, style: str = "timm", *, drop_path=0.0, layer_scale=None, **kw) -> nn.Module:
    """A fresh encoder without a head. `kw` overrides timm's arguments."""
    model = spec.model
    name, cls = model.name, VisionTransformer
    args = {"global_pool": "token", "drop_path_rate": drop_path}
    if layer_scale is not None:
        args["init_values"] = layer_scale
    if style == "beit":
        name, cls = BEIT, Beit
        args = {
            "use_shared_rel_pos_bias": True,
            "use_rel_pos_bias": False,
            "use_abs_pos_emb": model.absolute_positions,
            "init_values": 0.1,
        } | args
    sizes = {"depth": model.depth, "num_heads": model.num_heads, "embed_dim": model.embed_dim}
    encoder = timm_model.create(spec, name, cls, {**args, **sizes}, kw)
    if style == "sincos":
        sincos_init(encoder)
    elif style == "beit":
        trunc_init(encoder)
        scale_by_depth(encoder.blocks)
        for token in (encoder.cls_token, encoder.pos_embed):
            if token is not None:
                nn.init.trunc_normal_(token, std=0.02, a=-0.02, b=0.02)
    return encoder


def start(encoder: Beit, init: str) -> None:
    """Draws the weights of a Beit's blocks and patch embedding again, as checks.BeitStart says.

    Published weights were made for a width of 768. At 128 their blocks, behind a layer scale of
    0.1, add 2 % of what they get; MAE's add 131 %. init: "xavier" or "width".
    """
    beit_init(encoder.blocks, encoder.embed_dim, init)
    if init == "xavier":
        xavier_patches(encoder.patch_embed.proj)
    else:
        std = beit_std(encoder.embed_dim)
        trunc_init(encoder.patch_embed, std, std)


# --- forward passes --------------------------------------------------------------------------


def visible(
    encoder: nn.Module,
    images: torch.Tensor,
    ids: torch.Tensor,
    *,
    taps: tuple = (),
    fusion=None,
    attend=None,
) -> tuple[torch.Tensor, dict]:
    """Only the patches `ids` go through the encoder; see kit/nets/encoders.py."""
    embed = encoder.patch_embed
    patches = patchify(images, embed.patch_size[0]).repeat(len(ids) // len(images), 1, 1)
    tokens = embed.norm(project(embed.proj, take(patches, ids)))
    if encoder.pos_embed is not None:
        positions = encoder.pos_embed[:, -embed.num_patches :]
        tokens = tokens + take(positions.expand(len(ids), -1, -1), ids)
    bias = shared_bias(encoder, ids)
    return run_blocks(encoder, with_prefix(encoder, tokens), bias, taps, attend)


def masked(
    encoder: nn.Module,
    images: torch.Tensor,
    mask=None,
    token=None,
    *,
    taps: tuple = (),
    attend=None,
    attention: bool = False,
) -> tuple[torch.Tensor, dict]:
    """All patches go through the encoder, those of `mask` as `token`; see kit/nets/encoders.py."""
    tokens, bias = patch_tokens(encoder, images, mask, token), shared_bias(encoder)
    tokens = with_prefix(encoder, tokens)
    return run_blocks(encoder, tokens, bias, taps, attend, attention)


def patch_tokens(encoder: nn.Module, images: torch.Tensor, mask=None, token=None) -> torch.Tensor:
    """Images (B,3,H,W) -> patch tokens (B,N,D) before the blocks, with absolute positions if any.

    Where the bool mask (B,N) is True, token (1,1,D) stands in the patch's place; its position is
    added to it as to any other.
    """
    tokens = encoder.patch_embed(images)
    # with images of several sizes timm leaves the patches on their grid
    tokens = tokens.flatten(1, 2) if tokens.ndim == 4 else tokens
    if mask is not None:
        tokens = torch.where(mask[..., None], token, tokens)
    if encoder.pos_embed is not None:
        tokens = tokens + encoder.pos_embed[:, -tokens.shape[1] :]
    return tokens


def with_prefix(encoder: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Puts class and register tokens, with positions, before the patches: (B,n,D) -> (B,P+n,D)."""
    if encoder.num_prefix_tokens == 0:
        return tokens
    both = (encoder.cls_token, getattr(encoder, "reg_token", None))
    prefix = torch.cat([token for token in both if token is not None], dim=1)
    if (
        encoder.pos_embed is not None
        and encoder.pos_embed.shape[1] > encoder.patch_embed.num_patches
    ):
        prefix = prefix + encoder.pos_embed[:, : prefix.shape[1]]
    return torch.cat([prefix.to(tokens.dtype).expand(len(tokens), -1, -1), tokens], dim=1)


def shared_bias(encoder: nn.Module, ids: torch.Tensor | None = None) -> torch.Tensor | None:
    """The shared relative-position bias, (1,heads,1+N,1+N), or (B,heads,1+n,1+n) for the patches
    `ids` (B,n). None for an encoder without one. ValueError for a part of the patches where each
    block has a table of its own.
    """
    module = getattr(encoder, "rel_pos_bias", None)
    if module is None:
        if ids is not None and any(own_bias(block) is not None for block in encoder.blocks):
            raise ValueError("blocks with tables of relative positions cannot run on some patches")
        return None
    if ids is None:
        return module()[None]
    ids = F.pad(ids + 1, (1, 0))  # place 0 is the class token
    index = module.relative_position_index[ids[:, :, None], ids[:, None, :]]
    return module.relative_position_bias_table[index].permute(0, 3, 1, 2)


def own_bias(block: nn.Module) -> torch.Tensor | None:
    """The relative-position bias of a block that has a table of its own, (1,heads,1+N,1+N)."""
    own = getattr(block.attn, "relative_position_bias_table", None) is not None
    return block.attn._get_rel_pos_bias() if own else None


def run_blocks(
    encoder: nn.Module,
    tokens: torch.Tensor,
    bias: torch.Tensor | None,
    taps: tuple,
    attend: torch.Tensor | None,
    attention: bool = False,
) -> tuple[torch.Tensor, dict]:
    """All blocks on tokens (B,P+n,D) -> (output before the last norm, {"taps", "bias"}).

    attend: bool (B,P+n,P+n), which keys a query may see; None: all. attention: give the last
    block's "attention", too.
    """
    scores = bias
    if attend is not None:
        closed = torch.zeros(attend.shape, dtype=tokens.dtype, device=tokens.device)
        closed = closed.masked_fill_(~attend, -torch.inf)[:, None]
        scores = closed if bias is None else bias + closed
    name = "shared_rel_pos_bias" if isinstance(encoder, Beit) else "attn_mask"
    extra = {} if scores is None else {name: scores}
    tokens = getattr(encoder, "norm_pre", nn.Identity())(encoder.pos_drop(tokens))
    found = {"taps": {}, "bias": bias}
    for number, block in enumerate(encoder.blocks, start=1):
        if attention and number == len(encoder.blocks):
            found["attention"] = block_attention(block, tokens, scores)
        tokens = block(tokens, **extra)
        if number in taps:
            found["taps"][number] = tokens
    return tokens, found


def block_attention(
    block: nn.Module, tokens: torch.Tensor, scores: torch.Tensor | None
) -> torch.Tensor:
    """A block's attention probabilities (B,heads,P+n,P+n) for its input (B,P+n,D), in float32.

    Row = query, column = key. scores: what is added to the logits before the softmax.
    """
    attn, x = block.attn, block.norm1(tokens)
    qkv_bias = attn.qkv.bias
    if qkv_bias is None and getattr(attn, "q_bias", None) is not None:
        qkv_bias = torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])
    q, k, _ = (
        F.linear(x, attn.qkv.weight, qkv_bias)
        .reshape(*x.shape[:2], 3, attn.num_heads, -1)
        .unbind(2)
    )
    q, k = q.transpose(1, 2), k.transpose(1, 2)
    if hasattr(attn, "q_norm"):
        q, k = attn.q_norm(q), attn.k_norm(k)
    logits = (q * attn.scale @ k.transpose(-2, -1)).float()
    for term in (scores, own_bias(block)):
        logits = logits if term is None else logits + term
    return logits.softmax(dim=-1)

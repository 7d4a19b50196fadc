"""Initial weights as the papers' official codes draw them."""

from __future__ import annotations

import math

import torch
from torch import nn

from stages.kit.nets.positions import sincos_2d


def xavier_init(module: nn.Module) -> None:
    """MAE's (arXiv 2111.06377): xavier-uniform weights (a fused qkv as one matrix) and zero biases
    of the linear layers below `module`; norms at 1 and 0.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.LayerNorm) and layer.elementwise_affine:
            nn.init.ones_(layer.weight)
            nn.init.zeros_(layer.bias)


def trunc_init(module: nn.Module, std: float = 0.02, cut: float = 0.02) -> None:
    """BEiT's (arXiv 2106.08254): weights of linear and convolution layers below `module` normal
    with deviation `std`, cut at +-`cut`; their biases zero.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            nn.init.trunc_normal_(layer.weight, std=std, a=-cut, b=cut)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def beit_init(blocks: nn.Module, width: int, how: str, first: int = 1) -> None:
    """Weights of BEiT's blocks, of which the first is number `first`, for encoders of any `width`.

    The published deviation 0.02, cut there, was made for 768 channels. how "width": deviation and
    cut are 0.02 * sqrt(768 / width), so that a layer's outputs have the size that they have there;
    outputs are divided by sqrt(2 n), as published. "xavier": MAE's, which follow the width by
    themselves and are not divided.
    """
    if how == "xavier":
        xavier_init(blocks)
        return
    trunc_init(blocks, beit_std(width), beit_std(width))
    scale_by_depth(blocks, first)


def beit_std(width: int) -> float:
    """BEiT's deviation of 0.02 at 768 channels, for another width."""
    return 0.02 * math.sqrt(768 / width)


def xavier_patches(projection: nn.Conv2d) -> None:
    """Xavier-uniform weights of a patch embedding, as the linear layer that it is."""
    weight = projection.weight
    nn.init.xavier_uniform_(weight.view(weight.shape[0], -1))


@torch.no_grad()
def scale_by_depth(blocks, first: int = 1) -> None:
    """Divides both output projections of block n, counted from `first`, by sqrt(2 n), as BEiT's
    code does.
    """
    for number, block in enumerate(blocks, start=first):
        block.attn.proj.weight.div_(math.sqrt(2 * number))
        block.mlp.fc2.weight.div_(math.sqrt(2 * number))


def sincos_init(encoder: nn.Module) -> None:
    """Gives a timm ViT MAE's initial weights and fixed sin-cos positions, zero for the prefix."""
    xavier_init(encoder.blocks)
    xavier_patches(encoder.patch_embed.proj)
    for token in (encoder.cls_token, encoder.reg_token):
        if token is not None:
            nn.init.normal_(token, std=0.02)
    if encoder.pos_embed is None:
        raise ValueError(
            "model.args.pos_embed: found 'none', expected 'learn' (for sin-cos positions)"
        )
    table = sincos_2d(encoder.embed_dim, encoder.patch_embed.grid_size)
    with torch.no_grad():
        encoder.pos_embed.zero_()[0, -len(table) :].copy_(table)
    encoder.pos_embed.requires_grad_(False)


@torch.no_grad()
def xavier_qkv(blocks: nn.Module) -> None:
    """Draws query, key and value of a ViT's blocks again, as three xavier-uniform matrices: where a
    paper's code has three layers instead of a fused one.
    """
    for block in blocks:
        for matrix in block.attn.qkv.weight.chunk(3):
            nn.init.xavier_uniform_(matrix)


@torch.no_grad()
def moco_init(encoder: nn.Module) -> None:
    """Makes a ViT that starts as MAE's start as MoCo v3's (arXiv 2104.02057, its official code).

    Query, key and value are three xavier-uniform matrices instead of one, the class token has the
    deviation 1e-6, and the patch embedding has no bias at first. The rest is the same.
    """
    xavier_qkv(encoder.blocks)
    nn.init.normal_(encoder.cls_token, std=1e-6)
    nn.init.zeros_(encoder.patch_embed.proj.bias)

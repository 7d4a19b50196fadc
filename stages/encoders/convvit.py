"""ConvViT: masked convolutions before a ViT, as in ConvMAE and DMJD (kit/nets/hybrid.py).

    model: {name: convvit_tiny_patch8_64, patch_size: 8, embed_dim: 192, depth: 8, num_heads: 3,
            args: {conv_dims: [48, 96], conv_depths: [1, 1]}}

Convolutions mix neighbouring patches, so hidden ones are dropped and not replaced: a mask token
would leak into the others. It has no class token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from stages.kit.nets import timm_model
from stages.kit.nets.hybrid import ConvViT, Fusion
from stages.kit.nets.init import sincos_init
from workflow import checks

CAN = {"drop"}
NAMES = r"convvit_"
CLASSES = ("ConvViT",)


@dataclass(frozen=True)
class Config(checks.Encoder):
    name: str = "convvit_tiny_patch8_64"
    patch_size: int = 8
    depth: int = 8  # blocks of the transformer
    num_heads: int = 3

    def __post_init__(self):
        super().__post_init__()
        checks.within(self, "[1, inf)", "depth", most=checks.MOST_DEPTH)
        checks.within(self, "[1, inf)", "num_heads")
        if self.embed_dim % self.num_heads:
            raise ValueError(
                f"embed_dim: found {self.embed_dim}, expected a multiple of num_heads "
                f"{self.num_heads}"
            )
        if self.patch_size % 4:
            raise ValueError(f"patch_size: found {self.patch_size}, expected a multiple of 4")

    @property
    def styles(self) -> tuple[str, ...]:
        return ("timm", "sincos")  # it has no relative positions


def create(spec, style: str = "timm", *, drop_path=0.0, layer_scale=None, **kw) -> nn.Module:
    """A fresh ConvViT in style "timm" or "sincos"."""
    model = spec.model
    args = {
        "global_pool": "avg",
        "drop_path_rate": drop_path,
        "depth": model.depth,
        "num_heads": model.num_heads,
        "embed_dim": model.embed_dim,
    }
    encoder = timm_model.create(spec, model.name, ConvViT, args, kw)
    if style == "sincos":
        sincos_init(encoder)
    return encoder


def fusion(encoder: ConvViT) -> Fusion:
    """The multi-scale fusion of pretraining, which is not exported."""
    return Fusion(encoder)


def visible(
    encoder: ConvViT, images: torch.Tensor, ids: torch.Tensor, *, taps=(), fusion=None, attend=None
) -> tuple[torch.Tensor, dict]:
    """Only the patches `ids` go through the encoder; see kit/nets/encoders.py."""
    return encoder.encode(images, ids, fusion, norm=False), {"taps": {}}

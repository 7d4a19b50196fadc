"""Swin transformers (arXiv 2103.14030) and SwinV2 (2111.09883) of timm, with merging stages.

Each stage after the first halves the grid and doubles the width; patch_size, embed_dim and
window_size are those of the first one:

    model: {name: swin_tiny_patch4_window7_224, patch_size: 2, embed_dim: 48, depth: [2, 2, 4],
            num_heads: [3, 6, 12], window_size: 4}   # 32 px: grids of 16, 8, 4; last width 192

Windows grow and shrink with the images: an encoder that is trained on images of 192 pixels in
windows of 6 sees images of 224 pixels in windows of 7, as in SimMIM's and FastMIM's code, and its
tables of relative positions are resized. A Swin V2 has none; the network that computes its
positions is told the windows of its pretraining (2111.09883, section 3.3). Where that is no whole
number, windows stay as they are.

There is one kind of Swin, whatever style a method asks for. It has no class token. Its windows need
all patches of their place, so hidden ones are replaced and not dropped.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from torch import nn

from stages.kit.nets import timm_model
from workflow import checks

CAN = {"mask", "taps", "sizes"}
NAMES = r"swin(v2)?_"
CLASSES = ("SwinTransformer", "SwinTransformerV2")


@dataclass(frozen=True)
class Config(checks.Encoder):
    name: str = "swin_tiny_patch4_window7_224"
    patch_size: int = 4
    embed_dim: int = 96
    depth: tuple[int, ...] = (2, 2, 6, 2)  # blocks of each stage
    num_heads: tuple[int, ...] = (3, 6, 12, 24)  # in each stage
    window_size: int = 7  # side of a window in tokens

    def __post_init__(self):
        super().__post_init__()
        checks.within(self, "[1, inf)", "depth", most=checks.MOST_DEPTH)
        checks.within(self, "[1, inf)", "num_heads", "window_size")
        if not self.depth:
            raise ValueError("depth: found no stages, expected one or more")
        if len(self.depth) != len(self.num_heads):
            raise ValueError(
                f"num_heads: found {len(self.num_heads)} stages, expected {len(self.depth)} as in "
                "depth"
            )
        for stage, heads in enumerate(self.num_heads):
            width = self.embed_dim * 2**stage
            if width % heads:
                raise ValueError(
                    f"embed_dim: found {self.embed_dim}, which makes stage {stage + 1} {width} "
                    f"wide, expected a multiple of its {heads} heads (num_heads)"
                )

    @property
    def stride(self) -> int:
        """Side in pixels of a token of the last stage."""
        return self.patch_size * 2 ** (len(self.depth) - 1)

    @property
    def follow(self) -> tuple[str, ...]:
        return ("window_size",)

    def check(self, image_size: int) -> None:
        super().check(image_size)
        for stage in range(len(self.depth)):
            grid = image_size // (self.patch_size * 2**stage)
            if grid > self.window_size and grid % self.window_size:
                raise ValueError(
                    f"window_size: found {self.window_size}, expected a divisor of the {grid} "
                    f"tokens per side in stage {stage + 1}"
                )


def resized(args: dict, size: int) -> dict:
    """Arguments of timm for images of `size` pixels, by those of an exported encoder."""
    old, window = args["img_size"][0], args["window_size"]
    found = {"window_size": checks.scaled(window, old, size)}
    if "swinv2" in args["name"] and found["window_size"] != window:
        found["pretrained_window_sizes"] = [
            min(window, old // (args["patch_size"] * 2**stage))
            for stage in range(len(args["depths"]))
        ]
    return found


def create(spec, style: str = "timm", *, drop_path=0.0, layer_scale=None, **kw) -> nn.Module:
    """A fresh Swin with timm's initial weights; `style` and `layer_scale` do not apply to it."""
    model = spec.model
    args = {
        "global_pool": "avg",
        "window_size": model.window_size,
        "drop_path_rate": drop_path,
        "embed_dim": model.embed_dim,
        "depths": model.depth,
        "num_heads": model.num_heads,
    }
    return timm_model.create(spec, model.name, (SwinTransformer, SwinTransformerV2), args, kw)


def masked(
    encoder: nn.Module, images: torch.Tensor, mask=None, token=None, *, taps=(), attend=None
) -> tuple[torch.Tensor, dict]:
    """All patches go through the encoder, those of `mask` as `token`; see kit/nets/encoders.py.

    The mask lies on the grid of the first stage; tokens and taps are those of their stage.
    """
    x = encoder.patch_embed(images)  # (B,rows,columns,D)
    if mask is not None:
        x = torch.where(mask.view(*x.shape[:3], 1), token, x)
    number, tapped = 0, {}
    for stage in encoder.layers:
        x = stage.downsample(x)  # merges 2x2 patches; nothing before the first stage
        for block in stage.blocks:
            x, number = block(x), number + 1
            if number in taps:
                tapped[number] = x.flatten(1, 2)
    return x.flatten(1, 2), {"taps": tapped}

"""PVTv2: pyramid vision transformers with overlapping patches (arXiv 2106.13797), of timm.

Each stage after the first halves the grid by a convolution of 3 x 3 pixels; its width and heads are
its own. Keys and values are pooled to the grid of the last stage, as published, and a depthwise
convolution in each MLP takes the place of positions, so any size of image will do:

    model: {name: pvt_v2_any, patch_size: 2, embed_dim: 32, depth: [1, 1, 2], num_heads: [1, 2, 4]}
                                    # 32 px: grids of 16, 8, 4; last width 128
    model: {name: pvt_v2_any, patch_size: 4, embed_dim: 64, embed_dims: [64, 128, 320, 512],
            depth: [3, 4, 6, 3], num_heads: [1, 2, 5, 8], mlp_ratios: [8, 8, 4, 4]}   # B2

pvt_v2_any is timm's PyramidVisionTransformerV2 whose stages are called `layers` and whose last norm
stands alone, as in timm's Swin, and whose first convolution may have another stride than 4 (its
kernel is then 2 strides less 1 wide). There is one kind, whatever style a method asks for. It has
no class token.

Patches overlap, so a mask token alone would not hide what stands behind it: the patches beside it
see its pixels. Where a method replaces patches (`masked`), their pixels are therefore zero.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.pvt_v2 import OverlapPatchEmbed, PyramidVisionTransformerV2
from torch import nn

from stages.kit.nets import timm_model
from workflow import checks

CAN = {"mask", "taps", "sizes"}
NAMES = r"pvt_v2_any"
CLASSES = ("PVT",)

default_cfgs = generate_default_cfgs({"pvt_v2_any": {"classifier": "head"}})


@dataclass(frozen=True)
class Config(checks.Encoder):
    name: str = "pvt_v2_any"
    patch_size: int = 4  # stride of the first convolution
    embed_dim: int = 64  # width of the first stage
    # width of each stage; empty: twice the one before
    embed_dims: tuple[int, ...] = ()
    depth: tuple[int, ...] = (2, 2, 2, 2)  # blocks of each stage
    num_heads: tuple[int, ...] = (1, 2, 4, 8)  # in each stage
    mlp_ratios: tuple[float, ...] = ()  # of each stage's MLPs; empty: mlp_ratio

    def __post_init__(self):
        super().__post_init__()
        checks.within(self, "[1, inf)", "depth", most=checks.MOST_DEPTH)
        checks.within(self, "[1, inf)", "num_heads")
        checks.within(self, "[1, inf)", "embed_dims", most=checks.MOST_WIDTH)
        checks.within(self, "(0, inf)", "mlp_ratios", most=100)
        if not self.depth:
            raise ValueError("depth: found no stages, expected one or more")
        for key in ("num_heads", "embed_dims", "mlp_ratios"):
            count = len(getattr(self, key))
            if count != len(self.depth) and (count or key == "num_heads"):
                raise ValueError(
                    f"{key}: found {count} stages, expected {len(self.depth)} as in depth"
                )
        if self.widths[0] != self.embed_dim:
            raise ValueError(
                f"embed_dims: found {self.widths[0]} first, expected embed_dim {self.embed_dim}"
            )
        for width, heads in zip(self.widths, self.num_heads, strict=True):
            if width % heads:
                raise ValueError(
                    f"embed_dims: found {width}, expected a multiple of its {heads} heads "
                    "(num_heads)"
                )
        if self.patch_size < 2:
            raise ValueError(
                f"patch_size: found {self.patch_size}, expected 2 or more, as patches overlap"
            )

    @property
    def widths(self) -> tuple[int, ...]:
        """Of each stage."""
        doubled = tuple(self.embed_dim * 2**stage for stage in range(len(self.depth)))
        return self.embed_dims or doubled

    @property
    def stride(self) -> int:
        """Side in pixels of a token of the last stage."""
        return self.patch_size * 2 ** (len(self.depth) - 1)


class PVT(PyramidVisionTransformerV2):
    """timm's, with the names of timm's Swin: `layers`, `norm`, tokens (B,rows,columns,D)."""

    def __init__(self, img_size=224, patch_size: int = 4, in_chans: int = 3, **kw):
        # sizes of images may change: there are no positions, so nothing has to follow them
        kw.pop("dynamic_img_size", None)
        depths = kw["depths"]
        pooled = tuple(2 ** (len(depths) - 1 - stage) for stage in range(len(depths)))
        super().__init__(in_chans=in_chans, **{"sr_ratios": pooled, **kw})
        self.layers = self._modules.pop("stages")
        last = self.layers[-1]
        self.norm, last.norm = last.norm, nn.Identity()
        self.embed_dim = kw["embed_dims"][0]
        if patch_size != 4:
            sizes = {"in_chans": in_chans, "embed_dim": self.embed_dim}
            self.patch_embed = OverlapPatchEmbed(2 * patch_size - 1, patch_size, **sizes)
            self.patch_embed.apply(self._init_weights)
        side = img_size if isinstance(img_size, int) else img_size[0]
        self.patch_embed.stride = patch_size
        self.patch_embed.num_patches = (side // patch_size) ** 2

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """(B,3,H,W) -> (B,rows,columns,D), after the last norm."""
        return self.norm(self.layers(self.patch_embed(x)).permute(0, 2, 3, 1))

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        x = self.head_drop(x.mean(dim=(1, 2)) if self.global_pool else x)
        return x if pre_logits else self.head(x)


def checkpoint_filter_fn(state: dict, model: PVT) -> dict:
    """timm's hook on loading: weights of timm's own pvt_v2 models fit, too."""
    final = f"layers.{len(model.layers) - 1}.norm."
    found = {}
    for name, value in state.items():
        name = re.sub(r"^stages\.", "layers.", name)
        found["norm." + name[len(final) :] if name.startswith(final) else name] = value
    return found


@register_model
def pvt_v2_any(pretrained: bool = False, **kw) -> PVT:
    return build_model_with_cfg(
        PVT, "pvt_v2_any", pretrained, pretrained_filter_fn=checkpoint_filter_fn, **kw
    )


def create(spec, style: str = "timm", *, drop_path=0.0, layer_scale=None, **kw) -> nn.Module:
    """A fresh PVTv2 with timm's initial weights; `style` and `layer_scale` do not apply to it."""
    model = spec.model
    args = {
        "global_pool": "avg",
        "drop_path_rate": drop_path,
        "embed_dims": model.widths,
        "depths": model.depth,
        "num_heads": model.num_heads,
        "mlp_ratios": model.mlp_ratios or (model.mlp_ratio,) * len(model.depth),
    }
    return timm_model.create(spec, model.name, PVT, args, kw, without=("mlp_ratio",))


def masked(
    encoder: nn.Module, images: torch.Tensor, mask=None, token=None, *, taps=(), attend=None
) -> tuple[torch.Tensor, dict]:
    """All patches go through the encoder, those of `mask` as `token`; see kit/nets/encoders.py.

    The mask lies on the grid of the first stage; tokens and taps are those of their stage.
    """
    if mask is not None:
        side = images.shape[-1] // encoder.patch_embed.stride
        hidden = F.interpolate(mask.view(-1, 1, side, side).float(), size=images.shape[-2:]) > 0
        images = images.masked_fill(hidden, 0.0)
    x = encoder.patch_embed(images)  # (B,rows,columns,D)
    if mask is not None:
        x = torch.where(mask.view(*x.shape[:3], 1), token, x)
    number, tapped = 0, {}
    for stage in encoder.layers:
        if stage.downsample is not None:
            x = stage.downsample(x.permute(0, 3, 1, 2))
        grid, x = x.shape[1:3], x.flatten(1, 2)
        for block in stage.blocks:
            x, number = block(x, grid), number + 1
            if number in taps:
                tapped[number] = x
        x = stage.norm(x).unflatten(1, grid)  # the last stage's is the encoder's own
    return x.flatten(1, 2), {"taps": tapped}

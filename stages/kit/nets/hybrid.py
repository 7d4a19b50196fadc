"""ConvViT: convolutions at 1/4 and 1/8 of the image, a ViT at 1/16, and masks that do not leak
through.

The encoder of ConvMAE (arXiv 2205.03892; Alpha-VL/ConvMAE) in the wider form of DMJD (arXiv
2301.00230; mx-mark/DMJD). It is timm's VisionTransformer with another patch embedding: `ConvStem`,
two stages of convolution blocks on grids 4 and 2 times as fine as the grid of tokens, so 1/4, 1/8
and 1/16 at patch size 16 (patch 8: 1/2, 1/4, 1/8; patch 4: 1, 1/2, 1/4). Everything that works on a
ViT works on it: export, k-NN, linear probe, fine-tuning, layer-wise rate decay (the whole stem
counts as the embedding, as in the official code).

How a method uses it, here with V views of each image, as any other encoder:

    encoder = encoders.create(spec, "sincos")      # model.name: convvit_tiny_patch8_64
    fusion = encoders.fusion(encoder)              # belongs to pretraining and is not exported
    seen = encoders.visible(encoder, images, ids_keep, fusion=fusion)
    seen["patch"]                                  # (B,3,H,W), (V*B,n) -> (V*B,n,D)

Row v*B + b of `ids_keep` lists the visible patches of view v of image b, in any order, and the
tokens come in that order, after the last norm. There is no class token. For a mask (1 = hidden)
with n visible patches in each row, `ids_keep = masks.hidden_ids(~mask, n)`. All of this is
`encoder.encode`, which without ids and fusion is the plain convolution network, `forward_features`.

Hidden patches are dropped before the first layer. All layers but one work inside a patch (a
convolution whose kernel equals its stride, or of size 1, is a linear layer on the pixels of a
patch), so they run on visible patches alone. The depthwise 5x5 convolution is the only one that
looks across: it sees zeros where patches are hidden. That is what the official code computes by
multiplying its input with the visibility map, for a share of the cost, and without `0 * infinity`.

Departures that change no value: visible patches alone are computed, and the first embedding for
each view, not once for each image (no more work while V * n <= N). Ours: patch sizes other than 16
(the first embedding has kernel and stride patch_size / 4); frozen features pass the pretrained last
norm, which in pretraining saw the fused sum, where official probing puts a norm without weights
after the mean. Fine-tuning drops both that norm and the fusion, as there. Sizes:
convvit_base_patch16_224 and convvit_large_patch16_224 are DMJD's (ConvMAE: conv_mlp_ratio 4),
convvit_tiny_patch8_64 is ours.

Exported folders name a model that timm has only once this file is imported. Without mimlab, copy
the file (it needs torch and timm alone), `import hybrid`, and
`timm.create_model("local-dir:FOLDER", pretrained=True)` works.
"""

from __future__ import annotations

import torch
from timm.layers import DropPath, resample_abs_pos_embed, to_2tuple
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer
from torch import nn

FINER = (4, 2)  # cells per side of a patch in the two stages of convolutions


def merge(cells: torch.Tensor, by: int) -> torch.Tensor:
    """(B,n,s,s,C) -> (B,n,s/by,s/by,by*by*C), inside a merged cell by row, column, channel."""
    return cells.unflatten(3, (-1, by)).unflatten(2, (-1, by)).transpose(3, 4).flatten(4)


class Embed(nn.Module):
    """A convolution whose kernel and stride are `by`, LayerNorm over the channels, GELU."""

    def __init__(self, inner: int, outer: int, by: int):
        super().__init__()
        self.by = by
        self.proj, self.norm, self.act = (
            nn.Linear(by * by * inner, outer),
            nn.LayerNorm(outer),
            nn.GELU(),
        )

    def forward(self, cells: torch.Tensor) -> torch.Tensor:
        """(B,n,s,s,inner) -> (B,n,s/by,s/by,outer)."""
        return self.act(self.norm(self.proj(merge(cells, self.by))))


class ConvBlock(nn.Module):
    """x + conv1x1(depthwise5x5(conv1x1(LN(x)))), then x + MLP(LN(x)); the depthwise sees hidden
    cells as 0.
    """

    def __init__(self, dim: int, mlp_ratio: float, drop_path: float):
        super().__init__()
        hidden = int(dim * mlp_ratio)
        self.norm1, self.conv1, self.conv2 = (
            nn.LayerNorm(dim),
            nn.Linear(dim, dim),
            nn.Linear(dim, dim),
        )
        self.depthwise = nn.Conv2d(dim, dim, 5, padding=2, groups=dim)
        self.norm2, self.fc1, self.fc2 = (
            nn.LayerNorm(dim),
            nn.Linear(dim, hidden),
            nn.Linear(hidden, dim),
        )
        self.act, self.drop_path1, self.drop_path2 = (
            nn.GELU(),
            DropPath(drop_path),
            DropPath(drop_path),
        )

    def forward(
        self, cells: torch.Tensor, grid: tuple[int, int], ids: torch.Tensor | None
    ) -> torch.Tensor:
        """Cells (B,n,s,s,C) of the patches ids (B,n), None: of all; grid of patches (rows,
        columns).
        """
        near = self.across(self.conv1(self.norm1(cells)), grid, ids)
        cells = cells + self.drop_path1(self.conv2(near))
        return cells + self.drop_path2(self.fc2(self.act(self.fc1(self.norm2(cells)))))

    def across(
        self, cells: torch.Tensor, grid: tuple[int, int], ids: torch.Tensor | None
    ) -> torch.Tensor:
        """The depthwise convolution on the map of all patches; patches that are not in `ids` are 0
        there.
        """
        (batch, _, side, _, dim), (rows, columns) = cells.shape, grid
        patches = cells.flatten(2)
        if ids is not None:
            places = ids[..., None].expand_as(patches)
            patches = patches.new_zeros(batch, rows * columns, patches.shape[2]).scatter(
                1, places, patches
            )
        image = patches.view(batch, rows, columns, side, side, dim).transpose(2, 3)
        image = image.reshape(batch, rows * side, columns * side, dim)
        image = self.depthwise(image.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        patches = (
            image.reshape(batch, rows, side, columns, side, dim)
            .transpose(2, 3)
            .flatten(1, 2)
            .flatten(2)
        )
        if ids is not None:
            patches = patches.gather(1, places)
        return patches.view(cells.shape)


class ConvStem(nn.Module):
    """The patch embedding: two stages of convolution blocks, then one token for each patch."""

    def __init__(
        self,
        img_size,
        patch_size: int,
        in_chans: int,
        embed_dim: int,
        dims: tuple[int, int],
        mlp_ratio: float,
        rates: tuple[list[float], list[float]],
    ):
        super().__init__()
        if patch_size % FINER[0]:
            raise ValueError(
                f"patch_size: found {patch_size}, expected a multiple of {FINER[0]} (the first "
                "stage of convolutions has 4 x 4 cells in a patch)"
            )
        self.patch_size = to_2tuple(patch_size)
        self.set_input_size(img_size)
        self.embed1 = Embed(in_chans, dims[0], patch_size // FINER[0])
        self.stage1 = nn.ModuleList([ConvBlock(dims[0], mlp_ratio, rate) for rate in rates[0]])
        self.embed2 = Embed(dims[0], dims[1], FINER[0] // FINER[1])
        self.stage2 = nn.ModuleList([ConvBlock(dims[1], mlp_ratio, rate) for rate in rates[1]])
        self.embed3 = Embed(dims[1], embed_dim, FINER[1])
        self.proj = nn.Linear(embed_dim, embed_dim)

    def set_input_size(self, img_size=None, patch_size=None) -> None:
        """Another image size (timm's VisionTransformer.set_input_size calls this); the weights do
        not change.
        """
        if patch_size not in (None, self.patch_size[0], self.patch_size):
            raise ValueError(
                f"patch_size: a ConvStem of {self.patch_size} cannot become one of {patch_size}"
            )
        self.img_size = to_2tuple(img_size or self.img_size)
        self.grid_size = self.dynamic_feat_size(self.img_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]

    def dynamic_feat_size(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """The grid of patches (rows, columns) of an image (height, width)."""
        return img_size[0] // self.patch_size[0], img_size[1] // self.patch_size[1]

    def init_weights(self) -> None:
        """As the official code, whose convolutions start as torch starts them, the last and `proj`
        excepted.
        """
        for layer in self.modules():
            if isinstance(layer, (nn.Linear, nn.Conv2d)):
                layer.reset_parameters()
        nn.init.xavier_uniform_(self.embed3.proj.weight)
        nn.init.xavier_uniform_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)

    def stages(self, images: torch.Tensor, ids: torch.Tensor | None = None) -> list[torch.Tensor]:
        """Images (B,3,H,W) -> cells after stage 1 (B',n,4,4,C1), after stage 2 (B',n,2,2,C2),
        tokens (B',n,D).

        ids (V*B,n): which patches, in which order; row v*B + b belongs to image b. None: all, B' =
        B.
        """
        if tuple(images.shape[-2:]) != self.img_size:
            raise ValueError(
                f"images: found {tuple(images.shape[-2:])} pixels, expected {self.img_size}"
            )
        batch, side, grid = len(images), self.patch_size[0], self.grid_size
        pixels = images.unflatten(3, (grid[1], side)).unflatten(2, (grid[0], side))
        pixels = pixels.permute(0, 2, 4, 3, 5, 1).flatten(1, 2)  # (B,N,side,side,3)
        if ids is not None:
            if len(ids) % batch:
                raise ValueError(
                    f"ids: found {len(ids)} rows, expected a multiple of the {batch} images"
                )
            pixels = pixels[torch.arange(len(ids), device=ids.device)[:, None] % batch, ids]
        first = self.embed1(pixels)
        for block in self.stage1:
            first = block(first, grid, ids)
        second = self.embed2(first)
        for block in self.stage2:
            second = block(second, grid, ids)
        return first, second, self.proj(self.embed3(second).flatten(2))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(B,3,H,W) -> (B,N,D), patches row by row."""
        return self.stages(images)[-1]


class ConvViT(VisionTransformer):
    """timm's VisionTransformer behind a `ConvStem`, without a class token.

    depth, num_heads, mlp_ratio, embed_dim: of the transformer; conv_dims, conv_depths: channels and
    blocks of the two stages of convolutions, conv_mlp_ratio: of their MLPs.
    """

    def __init__(
        self,
        img_size=224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        depth: int = 11,
        conv_dims: tuple[int, int] = (256, 384),
        conv_depths: tuple[int, int] = (2, 2),
        conv_mlp_ratio: float = 8.0,
        drop_path_rate: float = 0.0,
        **kw,
    ):
        rates = torch.linspace(0, drop_path_rate, sum(conv_depths) + depth, device="cpu").tolist()
        cut = conv_depths[0], sum(conv_depths)
        stem = ConvStem(
            img_size,
            patch_size,
            in_chans,
            embed_dim,
            conv_dims,
            conv_mlp_ratio,
            (rates[: cut[0]], rates[cut[0] : cut[1]]),
        )
        super().__init__(
            img_size=img_size,
            patch_size=patch_size,
            in_chans=in_chans,
            embed_dim=embed_dim,
            depth=depth,
            class_token=False,
            embed_layer=lambda **_: stem,
            **kw,
        )
        for block, rate in zip(self.blocks, rates[cut[1] :], strict=True):
            block.drop_path1, block.drop_path2 = DropPath(rate), DropPath(rate)

    def encode(
        self,
        images: torch.Tensor,
        ids: torch.Tensor | None = None,
        fusion: Fusion | None = None,
        norm: bool = True,
    ) -> torch.Tensor:
        """Images (B,3,H,W) -> tokens of the patches ids (V*B,n), (V*B,n,D), in that order, after
        the last norm (or before it).

        Row v*B + b of ids belongs to image b. None: all patches, (B,N,D). With `fusion`, what it
        makes of the stages of convolutions is added before the norm. Nothing depends on a patch
        that is not in its row.
        """
        first, second, tokens = self.patch_embed.stages(images, ids)
        positions = self.pos_embed if ids is None else self.pos_embed[0][ids]
        tokens = self.blocks(self.pos_drop(tokens + positions))
        if fusion is not None:
            tokens = tokens + fusion(first, second)
        return self.norm(tokens) if norm else tokens


class Fusion(nn.Module):
    """Multi-scale fusion of pretraining: each stage's cells of a patch, by a convolution, as one
    more token.
    """

    def __init__(self, encoder: ConvViT):
        super().__init__()
        stem, dim = encoder.patch_embed, encoder.embed_dim
        dims = stem.embed1.norm.normalized_shape[0], stem.embed2.norm.normalized_shape[0]
        self.first, self.second = (
            nn.Linear(s * s * inner, dim) for s, inner in zip(FINER, dims, strict=True)
        )

    def forward(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """(B,n,4,4,C1), (B,n,2,2,C2) -> (B,n,D)."""
        return self.first(first.flatten(2)) + self.second(second.flatten(2))


# --- timm ---------------------------------------------------------------------------------------


def checkpoint_filter_fn(state: dict, model: ConvViT) -> dict:
    """timm's hook on loading: positions are resized to the model's grid; all else has no size."""
    positions = state.get("pos_embed")
    if positions is not None and positions.shape != model.pos_embed.shape:
        resized = resample_abs_pos_embed(
            positions, model.patch_embed.grid_size, num_prefix_tokens=0
        )
        state = {**state, "pos_embed": resized}
    return state


def _build(variant: str, pretrained: bool, sizes: dict, changes: dict) -> ConvViT:
    # an encoder's tokens are normalised; a classifier has a norm of its own after the mean, as in
    # fine-tuning
    head = changes.get("num_classes", 1000) > 0
    args = {"global_pool": "avg", "fc_norm": head, **sizes, **changes}
    return build_model_with_cfg(
        ConvViT,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": 3, "feature_cls": "getter"},
        **args,
    )


default_cfgs = generate_default_cfgs(
    {
        name: {
            "input_size": (3, size, size),
            "num_classes": 1000,
            "pool_size": None,
            "first_conv": None,
            "classifier": "head",
        }
        for name, size in (
            ("convvit_tiny_patch8_64", 64),
            ("convvit_base_patch16_224", 224),
            ("convvit_large_patch16_224", 224),
        )
    }
)


@register_model
def convvit_tiny_patch8_64(pretrained: bool = False, **kw) -> ConvViT:
    sizes = {
        "img_size": 64,
        "patch_size": 8,
        "embed_dim": 192,
        "depth": 8,
        "num_heads": 3,
        "conv_dims": (48, 96),
        "conv_depths": (1, 1),
    }
    return _build("convvit_tiny_patch8_64", pretrained, sizes, kw)


@register_model
def convvit_base_patch16_224(pretrained: bool = False, **kw) -> ConvViT:
    return _build("convvit_base_patch16_224", pretrained, {"depth": 11, "num_heads": 12}, kw)


@register_model
def convvit_large_patch16_224(pretrained: bool = False, **kw) -> ConvViT:
    sizes = {"embed_dim": 1024, "depth": 23, "num_heads": 16, "conv_dims": (384, 768)}
    return _build("convvit_large_patch16_224", pretrained, sizes, kw)

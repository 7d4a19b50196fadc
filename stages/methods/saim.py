"""SAIM: exploring stochastic autoregressive image modeling (arXiv 2212.01610).

Every image gets an order of its patches, and each patch is predicted from those before it. Nothing
is dropped and there is no mask token: an attention mask hides what comes later. A content stream,
the ViT that is exported, lets a patch see itself and the earlier ones. A query stream, which starts
from positions alone, sees the content of strictly earlier patches by cross-attention: one decoder
block beside each encoder block, or each second or third one. It regresses the patch's pixels after
a small blur, each patch normalised. This is XLNet's idea of two streams for images.

Follows qiy20/SAIM, orders other than the random one skyoux/SemAIM. Departures:
- the class token's query is left out. Nothing reads it there: its prediction is cut off and no
  other query sees it;
- the last norm before the head is the encoder's own, as in the official checkpoint, in which the
  decoder's norm has the encoder's name. The encoder's stream itself has none in pretraining;
- orders are ranks, pure functions of seed, step and sample. Two equal random numbers, which there
  would see each other's content, are put in some order;
- with `query_depth` below the depth and shared weights the query stream uses the first blocks, as
  there; a `query_depth` that does not divide the depth is refused, where the official code fails or
  leaves the last blocks untrained;
- `order: fixed` is ours: one random order for all images and steps. So is the saliency of `order:
  attention`, the likeness of each patch of the whole image to the mean patch, which is SemAIM's for
  average pooling, of the student itself: its class token learns nothing of images;
- defaults are for small images; PUBLISHED is the recipe for ImageNet and ViT-B/16. Its weight decay
  is that of the official code and of SemAIM; the README's command has 0.5.
The class token sees itself alone while pretraining, so it says nothing of an image until a transfer
lets it look; probe the mean of the patches, too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from timm.layers import LayerNorm, Mlp
from timm.models.vision_transformer import Block
from torch import nn

from stages.kit.data.views import View
from stages.kit.nets import encoders, orders
from stages.kit.nets.init import xavier_init, xavier_qkv
from stages.kit.nets.patches import normalise_patches, patch_statistics, patchify, unpatchify
from stages.kit.nets.pictures import contact_sheet, heat, paint
from workflow import checks

TARGET = None
NEEDS = {"mask", "cls", "taps", "attention"}
LABELS = False
TRAINS = True
PUBLISHED = {
    "epochs": 800,
    "batch_size": 2048,
    "order": "stochastic",
    "query_depth": 12,
    "shared": False,
    "head": "mlp",
    "norm_pix": True,
    "blur": 9,
    "blur_sigma": 1.0,
    "crop_min": 0.2,
    "lr": 0.0002,
    "lr_per": 256,
    "min_lr": 0.0,
    "warmup": 0.0375,
    "weight_decay": 0.05,
    "betas": [0.9, 0.95],
    "clip": None,
}


@dataclass(frozen=True)
class Config(checks.Optimiser, checks.SizedCrop):
    order: Literal[
        "stochastic", "raster", "boustrophedon", "fixed", "centre", "random-centre", "attention"
    ] = "stochastic"
    query_depth: int | None = None  # blocks of the query stream; None: as many as the encoder's
    shared: bool = False  # both streams have the same blocks
    head: Literal["mlp", "linear"] = "mlp"
    norm_pix: bool = True  # each patch's pixels at mean 0 and variance 1 are the target
    blur: int | None = 5  # side of the Gaussian kernel in pixels, odd; None: no blur
    blur_sigma: float = 1.0  # its deviation in pixels
    loss: Literal["l2", "l1"] = "l2"
    crop_min: float = 0.4
    lr: float = 1e-3
    lr_per: int | None = 512
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float | None = 3.0

    def __post_init__(self):
        super().__post_init__()
        checks.within(self, "[1, inf)", "query_depth")
        checks.within(self, "(0, inf)", "blur_sigma")
        if self.blur is not None and not (self.blur > 0 and self.blur % 2):
            raise ValueError(f"blur: found {self.blur}, expected an odd number of pixels, or null")

    def check(self, image_size: int, model) -> None:
        if self.query_depth and model.depth % self.query_depth:
            raise ValueError(
                f"query_depth: found {self.query_depth}, expected a divisor of model.depth "
                f"{model.depth}"
            )
        if model.grid(image_size) < 2:
            raise ValueError(
                f"model.patch_size: found one patch of {model.patch_size} pixels, expected several"
            )
        checks.sincos(model)


def views(config: Config, spec) -> dict[str, View]:
    return {"view": View(size=spec.image_size, scale=(config.crop_min, 1.0), flip=config.flip)}


class Method(nn.Module):
    """The content stream, which is exported, and the query stream with its head."""

    def __init__(self, config: Config, spec, target=None):
        super().__init__()
        self.config, self.spec, model = config, spec, spec.model
        self.patches = spec.grid**2  # N
        config.check(spec.image_size, model)
        self.encoder = encoders.create(spec, "sincos")
        if not encoders.has_cls(self.encoder):
            raise ValueError(
                "model: found no class token, expected one, which the first patch sees"
            )
        xavier_qkv(self.encoder.blocks)
        depth, width = config.query_depth or model.depth, model.embed_dim
        step = model.depth // depth
        self.read = tuple(range(step, model.depth + 1, step))  # encoder blocks that queries read
        if config.shared:
            self.query_blocks = list(self.encoder.blocks[:depth])  # not registered twice
        else:
            how = {"mlp_ratio": model.mlp_ratio, "qkv_bias": True, "norm_layer": LayerNorm}
            self.query_blocks = nn.ModuleList(
                [Block(width, model.num_heads, **how) for _ in range(depth)]
            )
            xavier_init(self.query_blocks)
            xavier_qkv(self.query_blocks)
        out, hidden = 3 * spec.patch**2, int(width * model.mlp_ratio)
        self.head = nn.Linear(width, out) if config.head == "linear" else Mlp(width, hidden, out)
        xavier_init(self.head)
        self.register_buffer("kernel", gaussian(config.blur or 1, config.blur_sigma), False)
        if config.order == "fixed":
            self.register_buffer("fixed", torch.randperm(self.patches))

    def forward(self, batch: dict, progress) -> dict[str, torch.Tensor]:
        """{"view": (B,3,H,W) in [0,1]} -> {"loss": mean error of all patches, "early", "late": of
        the first and last quarter of the order, which are alike if what came before is no help}.
        """
        images = self.spec.normalise(batch["view"])
        ranks = self.ranks(images, progress.uniform)
        error = self.predict(images, ranks).float() - self.target(images)  # (B,N,3*patch^2)
        error = error.abs() if self.config.loss == "l1" else error.square()
        of_patch, quarter = error.mean(dim=-1), max(1, self.patches // 4)
        found = of_patch.detach().gather(1, ranks.argsort(dim=1))
        return {
            "loss": of_patch.mean(),
            "early": found[:, :quarter].mean(),
            "late": found[:, -quarter:].mean(),
        }

    def ranks(self, images: torch.Tensor, uniform) -> torch.Tensor:
        """The order of each sample's patches, (B,N) of 0..N-1; uniform(name, *shape) as in
        kit/nets/orders.py.
        """
        kind, grid = self.config.order, self.spec.grid
        if kind == "stochastic":
            return orders.stochastic(uniform, grid)
        if kind == "fixed":
            return self.fixed.expand(len(images), -1)
        if kind in ("raster", "boustrophedon"):
            return orders.raster(len(images), grid, kind == "boustrophedon", images.device)
        if kind == "attention":
            return orders.from_peak(uniform, grid, self.saliency(images))
        return orders.centre_out(uniform, grid, kind == "random-centre")

    @torch.no_grad()
    def saliency(self, images: torch.Tensor) -> torch.Tensor:
        """Cosine of each patch, as the encoder has it of the whole image, and their mean: (B,N)."""
        patch = encoders.masked(self.encoder, images, None, None)["patch"].float()
        return F.cosine_similarity(patch, patch.mean(dim=1, keepdim=True), dim=-1)

    def predict(
        self, images: torch.Tensor, ranks: torch.Tensor, known: int | None = None
    ) -> torch.Tensor:
        """Normalised images, ranks (B,N) -> each patch's pixels (B,N,3*patch^2), from those before
        it and, with `known`, only from the first so many of the order.
        """
        content, queries = attends(ranks, self.encoder.num_prefix_tokens, known)
        how = {"taps": self.read, "attend": content, "norm": False}
        states = encoders.masked(self.encoder, images, None, None, **how)["taps"]
        x = self.encoder.pos_embed[:, -self.patches :].expand(len(images), -1, -1)
        for number, block in zip(self.read, self.query_blocks, strict=True):
            x = cross(block, x, states[number], queries)
        return self.head(self.encoder.norm(x))

    def target(self, images: torch.Tensor) -> torch.Tensor:
        """Normalised images -> patches of their blurred copy (B,N,3*patch^2), float32, normalised
        if norm_pix.
        """
        patches = patchify(self.blurred(images.float()), self.spec.patch)
        return normalise_patches(patches) if self.config.norm_pix else patches

    def blurred(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B,3,H,W) after the Gaussian, with zeros beyond the border."""
        if self.config.blur is None:
            return images
        kernel = self.kernel.to(images.dtype).expand(3, 1, -1, -1)
        return F.conv2d(images, kernel, padding=self.config.blur // 2, groups=3)

    @torch.no_grad()
    def pictures(self, batch: dict) -> dict[str, np.ndarray]:
        """Of at most 8 images: original | its order, bright is first | the first quarter of the
        order | what the model adds to it, another quarter at a time, from all that stands there.

        With norm_pix the predicted patches get the mean and deviation of the TRUE patch, which the
        model does not know: only their structure is its own.
        """
        pixels = batch["view"][:8]
        images, count = self.spec.normalise(pixels), self.patches
        generator = torch.Generator().manual_seed(0)

        def uniform(name: str, *shape: int) -> torch.Tensor:
            return torch.rand(len(pixels), *shape, generator=generator).to(pixels.device)

        ranks = self.ranks(images, uniform)
        mean, deviation = patch_statistics(patchify(self.blurred(images), self.spec.patch))
        ends = [max(1, count * quarter // 4) for quarter in range(1, 5)]
        shown = [pixels, heat(1 - ranks / (count - 1), pixels.shape[-1])]
        shown.append(paint(pixels, ranks >= ends[0]))
        for known, end in zip(ends, ends[1:], strict=False):
            predicted = self.predict(images, ranks, known).float()
            if self.config.norm_pix:
                predicted = predicted * deviation + mean
            added = unpatchify(predicted, self.spec.patch)
            images = paint(images, (ranks >= known) & (ranks < end), added)
            shown.append(paint(self.spec.denormalise(images), ranks >= end))
        return {"completion": contact_sheet(shown)}


def attends(
    ranks: torch.Tensor, prefix: int, known: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ranks (B,N) -> who sees whom, row = who looks: content (B,P+N,P+N), queries (B,N,P+N), bool.

    Patches see the prefix; of the patches the content sees itself and earlier ones, the queries
    strictly earlier ones (and with `known` among the first so many). The prefix sees itself alone.
    """
    before = ranks[:, None, :] < ranks[:, :, None]
    same = torch.eye(ranks.shape[1], dtype=torch.bool, device=ranks.device)
    content = F.pad(before | same, (prefix, 0, prefix, 0), value=True)
    content[:, :prefix, prefix:] = False
    if known is not None:
        before = before & (ranks < known)[:, None, :]
    return content, F.pad(before, (prefix, 0), value=True)


def cross(
    block: nn.Module, queries: torch.Tensor, keys: torch.Tensor, attend: torch.Tensor
) -> torch.Tensor:
    """A block of a ViT with attention from queries (B,N,D) to keys (B,M,D) in the place of its
    self-attention; attend: bool (B,N,M). Its first norm is applied to both.
    """
    attn, width = block.attn, queries.shape[-1]
    weight = attn.qkv.weight.split([width, 2 * width])
    bias = (None, None) if attn.qkv.bias is None else attn.qkv.bias.split([width, 2 * width])
    q = F.linear(block.norm1(queries), weight[0], bias[0])
    k, v = F.linear(block.norm1(keys), weight[1], bias[1]).chunk(2, dim=-1)
    q, k, v = (x.unflatten(2, (attn.num_heads, -1)).transpose(1, 2) for x in (q, k, v))
    q, k = attn.q_norm(q), attn.k_norm(k)
    if attn.fused_attn:
        found = F.scaled_dot_product_attention(q, k, v, attn_mask=attend[:, None])
    else:
        scores = (q * attn.scale @ k.transpose(-2, -1)).masked_fill(~attend[:, None], -torch.inf)
        found = scores.softmax(dim=-1) @ v
    queries = queries + block.ls1(attn.proj(found.transpose(1, 2).flatten(2)))
    return queries + block.ls2(block.mlp(block.norm2(queries)))


def gaussian(size: int, sigma: float) -> torch.Tensor:
    """The kernel (size,size) of a Gaussian of deviation `sigma`, of sum 1; size is odd."""
    place = torch.arange(size, dtype=torch.float64, device="cpu") - size // 2
    line = (-place.square() / (2 * sigma**2)).exp()
    return (torch.outer(line, line) / line.sum().square()).float()

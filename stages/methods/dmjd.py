"""DMJD: disjoint masking with joint distillation (arXiv 2301.00230).

Every image is encoded under several masks, each of which hides first what the others showed, so
that one image gives a prediction of (nearly) every patch. From each view's visible tokens a decoder
predicts the target of the hidden patches, and a small MLP predicts the target of the visible ones.
The target is a run's `target`: hog (as published), pixels, or a teacher's features.

Follows mx-mark/DMJD, with a ConvViT (model.name: convvit_...) as there. There is no official code
for a plain ViT: here it is MAE's encoder (arXiv 2111.06377), whose class token takes part in the
encoder and in neither branch. Departures:
- The official visible branch compares predictions in the order of the list of visible patches with
  targets in raster order, which pairs nearly all with another patch's. Here they are aligned;
  `vis_align: raster` pairs them as there.
- There may be any number of masks, and they may be independent of each other, for comparison
  (kit/nets/masks.py).
- The official rate counts what `predict_ratio` promises, ours what the masks hide. The two agree
  wherever n_masks * mask_ratio reaches it; for one mask ours is MAE's plain rule.
- A teacher's features are normalised per token (ours; the official code knows HOG only).
- Defaults are for small images; PUBLISHED is the recipe for ImageNet and ConvViT-B (400 epochs of
  two masks are 800 effective ones; ConvViT-L: clip 3).
As there, the norms of the visible branch have eps 1e-6, as those of encoder and decoder do. Only
one-dimensional parameters get no weight decay; the mask token gets it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from stages.kit.data.views import View
from stages.kit.nets import encoders
from stages.kit.nets.decoder import Decoder
from stages.kit.nets.init import xavier_init
from stages.kit.nets.masks import disjoint_masking, take
from stages.kit.nets.pictures import contact_sheet, paint, principal_colours
from workflow import checks

TARGET = {"patch"}
NEEDS = {"drop"}
LABELS = False
TRAINS = True
PUBLISHED = {
    "epochs": 400,
    "batch_size": 512,
    "n_masks": 2,
    "mask_ratio": 0.6,
    "predict_ratio": 1.0,
    "cell": 2,
    "vis_weight": 1.0,
    "decoder_dim": 512,
    "decoder_depth": 8,
    "decoder_heads": 16,
    "decoder_mlp_ratio": 8.0,
    "lr": 0.0006,
    "lr_per": 256,
    "min_lr": 0.0,
    "warmup": 0.05,
    "weight_decay": 0.05,
    "betas": [0.9, 0.95],
}
BETA = 2.0  # of the smooth L1 loss of the visible branch
EPS = 1e-6  # of the visible branch's norms, as of all norms of the transformer


@dataclass(frozen=True)
class Config(checks.Optimiser, checks.Crop, checks.Decoder):
    n_masks: int = 2  # of each image
    disjoint: bool = True  # each mask hides first what the others showed; False: independent masks
    mask_ratio: float = 0.6  # share of the cells that a mask hides ("corruption rate")
    # share of the cells that at least one mask should hide ("prediction rate"), if disjoint
    predict_ratio: float = 1.0
    cell: int = 2  # patches along a side of a cell: 2 is the paper's "block" mode, 1 its "rand"
    vis_weight: float = 1.0  # of the visible branch's loss ("theta"); 0: no such branch
    # which target a visible token learns: its own patch's, or as the released code pairs them
    vis_align: Literal["aligned", "raster"] = "aligned"
    norm_target: bool | None = None  # each token's target standardised; None: if a network made it
    decoder_mlp_ratio: float = 4.0  # decoder_dim is the width of both branches
    crop_min: float = 0.5
    lr_rule: Literal["content", "views", "images"] = "content"  # see `lr_factor`
    lr: float = 6e-4
    lr_per: int | None = 256
    betas: tuple[float, float] = (0.9, 0.95)

    def __post_init__(self):
        super().__post_init__()
        checks.within(self, "(0, 1]", "mask_ratio", "predict_ratio")
        checks.within(self, "[1, inf)", "n_masks", "cell")
        checks.within(self, "[0, inf)", "vis_weight")
        checks.within(self, "(0, inf)", "decoder_mlp_ratio")
        if self.predict_ratio < self.mask_ratio:
            raise ValueError(
                f"predict_ratio: found {self.predict_ratio}, expected at least mask_ratio "
                f"{self.mask_ratio}"
            )

    @property
    def views_per_image(self) -> int:
        """Each mask makes a view of its own, which effective epochs count."""
        return self.n_masks

    @property
    def predicted(self) -> float:
        """Share of an image's patches that at least one mask hides, before rounding to cells."""
        if self.disjoint:
            return min(self.predict_ratio, self.n_masks * self.mask_ratio, 1.0)
        return 1 - (1 - self.mask_ratio) ** self.n_masks

    @property
    def lr_factor(self) -> float:
        """Factor of the rate, by `lr_rule`.

        "content": the distinct content that a step predicts, in units of what one mask hides (the
        paper's adaptive rule); "views": the number of masks; "images": 1.
        """
        content = self.predicted / self.mask_ratio
        return {"content": content, "views": float(self.n_masks), "images": 1.0}[self.lr_rule]

    def check(self, image_size: int, model) -> None:
        side = model.grid(image_size)
        if side % self.cell:
            raise ValueError(
                f"cell: {self.cell} patches do not divide the {side} patches of a side"
            )
        checks.keep_count((side // self.cell) ** 2, self.mask_ratio, "cells")
        checks.sincos(model)


def views(config: Config, spec) -> dict[str, View]:
    return {"view": View(size=spec.image_size, scale=(config.crop_min, 1.0), flip=config.flip)}


class Method(nn.Module):
    def __init__(self, config: Config, spec, target):
        super().__init__()
        self.config, self.spec, self.teacher = config, spec, target
        network = next(target.open.parameters(), None) is not None
        self.norm_target = network if config.norm_target is None else config.norm_target
        self.cells = (spec.grid // config.cell) ** 2
        self.encoder = encoders.create(spec, "sincos")
        self.fusion = encoders.fusion(self.encoder)  # of a ConvViT
        width, dim, out = self.encoder.embed_dim, config.decoder_dim, target.sizes["patch"]
        mlp_ratio = config.decoder_mlp_ratio
        self.decoder = Decoder.of(config, width, out, spec.grid, mlp_ratio=mlp_ratio)
        self.projector = self.predictor = None
        if config.vis_weight:
            self.projector = nn.Sequential(
                *(nn.Linear(width, dim), nn.LayerNorm(dim, eps=EPS), nn.GELU()),
                *(nn.Linear(dim, dim), nn.LayerNorm(dim, eps=EPS), nn.GELU()),
                *(nn.Linear(dim, dim), nn.LayerNorm(dim, eps=EPS, elementwise_affine=False)),
            )
            self.predictor = nn.Linear(dim, out)
            xavier_init(self.projector)
            xavier_init(self.predictor)

    def forward(self, batch: dict, progress) -> dict[str, torch.Tensor]:
        """{"view": (B,3,H,W) in [0,1]} -> {"loss", "hidden_loss", and perhaps "visible_loss"}."""
        images = batch["view"]
        truth = self.truth(images)
        ids_keep, ids_hide = self.masks(progress.uniform("mask", self.config.n_masks, self.cells))
        tokens = self.encode(images, ids_keep)
        error = self.predict_hidden(tokens, ids_keep, ids_hide).float() - pick(truth, ids_hide)
        # every row hides as many patches, so this is their mean
        out = {"hidden_loss": error.square().mean()}
        out["loss"] = out["hidden_loss"]
        if self.predictor is not None:
            # the released code pairs predictions in the list's order with targets in raster order
            places = ids_keep if self.config.vis_align == "aligned" else ids_keep.sort(dim=1).values
            predicted = self.predict_visible(tokens).float()
            out["visible_loss"] = F.smooth_l1_loss(predicted, pick(truth, places), beta=BETA)
            out["loss"] = out["loss"] + self.config.vis_weight * out["visible_loss"]
        return out

    def truth(self, images: torch.Tensor) -> torch.Tensor:
        """Images in [0,1] -> what is to be predicted of each patch, (B,N,T) in float32."""
        truth = self.teacher(images, "patch")["patch"].float()
        return F.layer_norm(truth, truth.shape[-1:], eps=1e-6) if self.norm_target else truth

    def masks(self, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Noise (B,V,cells) -> visible, hidden patches (V*B,n); row v*B + b: mask v of image b."""
        predict = self.config.predict_ratio if self.config.disjoint else None
        config = self.config
        ids_keep, ids_hide = disjoint_masking(noise, config.mask_ratio, predict, config.cell)
        return ids_keep.transpose(0, 1).flatten(0, 1), ids_hide.transpose(0, 1).flatten(0, 1)

    def encode(self, images: torch.Tensor, ids_keep: torch.Tensor) -> torch.Tensor:
        """Images in [0,1] -> encoded visible patches (V*B,n,D), in the order of ids_keep."""
        images = self.spec.normalise(images)
        return encoders.visible(self.encoder, images, ids_keep, fusion=self.fusion)["patch"]

    def predict_hidden(
        self, tokens: torch.Tensor, ids_keep: torch.Tensor, ids_hide: torch.Tensor
    ) -> torch.Tensor:
        """The decoder: encoded visible patches (V*B,n,D) -> predictions (V*B,h,T) at ids_hide."""
        ids_restore = torch.cat([ids_keep, ids_hide], dim=1).argsort(dim=1)
        return take(self.decoder(tokens, ids_restore), ids_hide)

    def predict_visible(self, tokens: torch.Tensor) -> torch.Tensor:
        """Encoded visible patches (V*B,n,D) -> predictions (V*B,n,T) of them."""
        return self.predictor(self.projector(tokens))

    @torch.no_grad()
    def pictures(self, batch: dict) -> dict[str, np.ndarray]:
        """Two contact sheets of at most 8 images.

        views: image | what each mask leaves | how often a patch is hidden, from white (never) to
        black (always). predictions: target | for each mask the decoder's prediction of the hidden
        patches, and the visible branch's of the others.
        """
        images, grid = batch["view"][:8], self.spec.grid
        generator = torch.Generator().manual_seed(0)
        noise = torch.rand(len(images), self.config.n_masks, self.cells, generator=generator)
        ids_keep, ids_hide = self.masks(noise.to(images.device))
        tokens, truth = self.encode(images, ids_keep), self.truth(images)
        maps = truth.repeat(self.config.n_masks, 1, 1)
        place(maps, ids_hide, self.predict_hidden(tokens, ids_keep, ids_hide))
        if self.predictor is not None:
            place(maps, ids_keep, self.predict_visible(tokens))
        truth, *maps = self.draw([truth, *maps.split(len(images))], images)
        hidden = torch.zeros(len(ids_hide), grid**2, device=images.device)
        hidden = hidden.scatter(1, ids_hide, 1.0).bool().split(len(images))
        never = 1 - torch.stack(hidden).float().mean(0).view(-1, 1, grid, grid)
        never = F.interpolate(never, size=images.shape[-2:], mode="nearest").expand_as(images)
        predictions = [truth]
        for shown, mask in zip(maps, hidden, strict=True):
            predictions.append(paint(shown, ~mask))
            if self.predictor is not None:
                predictions.append(paint(shown, mask))
        seen = [paint(images, mask) for mask in hidden]
        return {
            "views": contact_sheet([images, *seen, never]),
            "predictions": contact_sheet(predictions),
        }

    def draw(self, maps: list[torch.Tensor], images: torch.Tensor) -> list[torch.Tensor]:
        """Targets or predictions, each (B,N,T), as pictures (B,3,H,W).

        The target draws them if it can; else they are principal components, with the same colours
        for all.
        """
        if self.teacher.open.render and not self.norm_target:
            return [self.teacher.open.render(x, images) for x in maps]
        colours = principal_colours(torch.cat(maps))
        shown = F.interpolate(colours, size=images.shape[-2:], mode="nearest")
        return list(shown.split(len(images)))


def pick(truth: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """(B,N,T) at the patches ids (V*B,n), row v*B + b of image b -> (V*B,n,T)."""
    return truth[torch.arange(len(ids), device=ids.device)[:, None] % len(truth), ids]


def place(maps: torch.Tensor, ids: torch.Tensor, values: torch.Tensor) -> None:
    """Writes values (B,n,T) to the patches ids (B,n) of maps (B,N,T)."""
    maps.scatter_(1, ids[..., None].expand_as(values), values.to(maps.dtype))

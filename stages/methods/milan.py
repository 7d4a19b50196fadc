"""MILAN: masked image pretraining on language assisted representation (arXiv 2208.06049).

MAE's encoder sees a quarter of the patches and learns, for every token of the whole image, the
direction of a frozen teacher's feature: class token, visible and hidden patches alike. The teacher
knows language (stages/targets/clip.py with `normalise: imagenet`), or is any target with features.
Two things go with such targets:
- `sampling: attention`: a patch stays visible with a probability that follows the teacher's
  attention to it, without replacement, so that the encoder sees what matters;
- `decoder: prompting`: only the tokens of hidden patches are updated (kit/nets/prompting.py).

With `decoder: mae, sampling: random, predict: hidden` this is what open-mmlab calls EVA in MAE's
style, up to the factor of the loss.

Follows zejiangh/MILAN, with these departures:
- drawing without replacement with weights a is the order of E / a for independent exponential E,
  so that a mask is a pure function of seed, step and teacher; a weight is at least 1e-8;
- a vector of length zero does not divide by zero;
- a target without a class token is learnt at the patches alone;
- defaults are for small images; PUBLISHED is the recipe for ImageNet and ViT-B/16. Its linear probe
  takes the class token, which the loss trains directly.
The released script hands its teacher an argument that makes a classifier of it and stops; that of
its linear probe does not, and is followed. As in MAE, class and mask tokens do get weight decay.
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
from stages.kit.nets.masks import random_masking
from stages.kit.nets.pictures import contact_sheet, paint, principal_colours
from stages.kit.nets.prompting import PromptingDecoder
from workflow import checks

TARGET = {"patch"}
NEEDS = {"drop", "cls", "plain"}
LABELS = False
TRAINS = True
PUBLISHED = {
    "epochs": 400,
    "batch_size": 4096,
    "mask_ratio": 0.75,
    "sampling": "attention",
    "decoder": "prompting",
    "predict": "all",
    "decoder_dim": 512,
    "decoder_depth": 8,
    "decoder_heads": 16,
    "crop_min": 0.2,
    "lr": 0.00015,
    "lr_per": 256,
    "min_lr": 0.0,
    "warmup": 0.1,
    "weight_decay": 0.05,
    "betas": [0.9, 0.95],
}
LEAST = 1e-8  # weight of a patch that the teacher does not look at


@dataclass(frozen=True)
class Config(checks.Optimiser, checks.Crop, checks.Decoder):
    mask_ratio: float = 0.75  # share of the patches that is dropped
    sampling: Literal["attention", "random"] = "attention"  # what decides which ones stay
    decoder: Literal["prompting", "mae"] = "prompting"
    predict: Literal["all", "hidden"] = "all"  # every token, or hidden patches alone
    crop_min: float = 0.4
    lr_per: int | None = 512
    warmup: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)

    def __post_init__(self):
        super().__post_init__()
        checks.within(self, "(0, 1)", "mask_ratio")

    @property
    def also_needs(self) -> set[str]:
        """What these settings need of the target, besides TARGET."""
        return {"attention"} if self.sampling == "attention" else set()

    def check(self, image_size: int, model) -> None:
        checks.keep_count(model.grid(image_size) ** 2, self.mask_ratio)
        checks.sincos(model)


def views(config: Config, spec) -> dict[str, View]:
    return {"view": View(size=spec.image_size, scale=(config.crop_min, 1.0), flip=config.flip)}


class Method(nn.Module):
    def __init__(self, config: Config, spec, target):
        super().__init__()
        self.config, self.spec, self.teacher = config, spec, target
        self.patches = spec.grid**2
        self.keep = checks.keep_count(self.patches, config.mask_ratio)
        self.encoder = encoders.create(spec, "sincos")
        self.with_cls = "cls" in target.sizes
        how = {"prefix": self.encoder.num_prefix_tokens}
        if config.decoder == "mae":
            how |= {"with_cls": True}
        kind = Decoder if config.decoder == "mae" else PromptingDecoder
        sizes = (config.decoder_dim, config.decoder_depth, config.decoder_heads)
        width, out = self.encoder.embed_dim, target.sizes["patch"]
        self.decoder = kind(width, out, spec.grid, *sizes, **how)

    def forward(self, batch: dict, progress) -> dict[str, torch.Tensor]:
        """{"view": (B,3,H,W) in [0,1]} -> {"loss": 2 - 2 cosine over the tokens that count, and the
        mean cosine of each kind: "cls" (if the target has one), "seen", "hidden"; "importance": the
        share of the teacher's attention that is visible (if it gives one)}.
        """
        images = batch["view"]
        target, weights = self.look(images)
        ids_keep, ids_restore, mask = self.sample(progress.uniform("mask", self.patches), weights)
        predicted = self.predict(images, ids_keep, ids_restore).float()  # (B,C+N,E)
        cosine = F.cosine_similarity(predicted, target, dim=-1)
        first = int(self.with_cls)
        counts = torch.ones_like(cosine)
        if self.config.predict == "hidden":
            counts = F.pad(mask, (first, 0))
        found, patches = {}, cosine[:, first:].detach()
        if self.with_cls:
            found["cls"] = cosine[:, 0].detach().mean()
        found["seen"] = (patches * (1 - mask)).sum() / (1 - mask).sum()
        found["hidden"] = (patches * mask).sum() / mask.sum()
        if weights is not None:
            share = weights / weights.sum(dim=1, keepdim=True).clamp(min=LEAST)
            found["importance"] = (share * (1 - mask)).sum(dim=1).mean()
        return {"loss": ((2 - 2 * cosine) * counts).sum() / counts.sum(), **found}

    def look(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The teacher's tokens (B,C+N,E), class token first, and its attention (B,N), the mean over
        the heads, or None where nothing asks for it.
        """
        wanted = ["cls", "patch"] if self.with_cls else ["patch"]
        wanted += ["attention"] if self.config.sampling == "attention" else []
        found = self.teacher(images, *wanted)
        cls = [found["cls"][:, None]] if self.with_cls else []
        weights = found["attention"].mean(dim=1) if "attention" in found else None
        return torch.cat([*cls, found["patch"]], dim=1).float(), weights

    def sample(self, noise: torch.Tensor, weights: torch.Tensor | None) -> tuple:
        """Noise (B,N) in [0,1), attention (B,N) -> what kit/nets/masks.random_masking gives."""
        if weights is not None:
            noise = -torch.log1p(-noise) / weights.clamp(min=LEAST)
        return random_masking(noise, self.keep)

    def predict(self, images, ids_keep, ids_restore) -> torch.Tensor:
        """Images in [0,1], of which the patches ids_keep are seen -> (B,C+N,E)."""
        seen = encoders.visible(self.encoder, self.spec.normalise(images), ids_keep)
        found = self.decoder(seen["tokens"], ids_restore)
        prefix = found.shape[1] - self.patches
        return torch.cat([found[:, : int(self.with_cls)], found[:, prefix:]], dim=1)

    @torch.no_grad()
    def pictures(self, batch: dict) -> dict[str, np.ndarray]:
        """features, of at most 8 images: image | the teacher's attention | what is seen | the
        teacher's features | predicted ones.

        Attention is shown if it decides what is seen. Features have unit length, colours are three
        principal components, the same for both columns.
        """
        images = batch["view"][:8]
        noise = torch.rand(len(images), self.patches, generator=torch.Generator().manual_seed(0))
        target, weights = self.look(images)
        ids_keep, ids_restore, mask = self.sample(noise.to(images.device), weights)
        predicted = self.predict(images, ids_keep, ids_restore).float()
        both = F.normalize(torch.cat([target, predicted])[:, int(self.with_cls) :], dim=-1)
        size = images.shape[-2:]
        colours = F.interpolate(principal_colours(both), size=size, mode="nearest").chunk(2)
        columns = [images, paint(images, mask), *colours]
        if weights is not None:
            grid, most = self.spec.grid, weights.amax(dim=1, keepdim=True).clamp(min=LEAST)
            heat = (weights / most).view(-1, 1, grid, grid).expand(-1, 3, -1, -1)
            columns.insert(1, F.interpolate(heat, size=size, mode="nearest"))
        return {"features": contact_sheet(columns)}

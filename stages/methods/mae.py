"""MAE: masked autoencoders are scalable vision learners (arXiv 2111.06377).

A uniformly random part of the patches is dropped; a ViT encodes the rest, without mask tokens. A
small decoder gets the encoded patches back in their places, one learnt token everywhere else, and
regresses the pixels of the dropped patches.

What other methods do as well lies in the kit: `random_masking` orders the patches by random numbers
and keeps the first (kit/nets/masks.py); encoder, decoder and loss are kit/parts/autoencoder.py's.

Follows facebookresearch/mae, with these departures:
- masks are a pure function of seed, step and sample, so that a step can be repeated;
- the number of visible patches, patches * (1 - mask_ratio), is cut to an integer in exact
  arithmetic, where the official code uses floats;
- defaults are for small images; PUBLISHED is the recipe for ImageNet and ViT-B/16.

`uniformity` adds U-MAE's term (arXiv 2210.08344): the mean squared cosine between the class tokens
that the encoder has of the images' visible patches (without a class token: their means), over all
pairs of the batch (kit/parts/uniformity.py). Published with 0.01; 0, the default, is MAE.

With a ConvViT (model.name: convvit_...) this is ConvMAE (arXiv 2205.03892), with a decoder as
configured here. As there, class and mask tokens do get weight decay.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from stages.kit.data.views import View
from stages.kit.nets.masks import random_masking
from stages.kit.nets.pictures import contact_sheet, paint
from stages.kit.parts.autoencoder import Autoencoder
from stages.kit.parts.uniformity import REASON, uniformity
from workflow import checks

TARGET = None
NEEDS = {"drop"}
LABELS = False
TRAINS = True
PUBLISHED = {
    "epochs": 1600,
    "batch_size": 4096,
    "mask_ratio": 0.75,
    "norm_pix": True,
    "decoder_dim": 512,
    "decoder_depth": 8,
    "decoder_heads": 16,
    "crop_min": 0.2,
    "lr": 0.00015,
    "lr_per": 256,
    "min_lr": 0.0,
    "warmup": 0.025,
    "weight_decay": 0.05,
    "betas": [0.9, 0.95],
}


@dataclass(frozen=True)
class Config(checks.Optimiser, checks.SizedCrop, checks.Decoder):
    mask_ratio: float = 0.75  # share of the patches that is dropped
    norm_pix: bool = True  # each patch's pixels at mean 0 and variance 1 are the target
    uniformity: float = 0.0  # weight of U-MAE's term
    crop_min: float = 0.4
    lr: float = 1.5e-3
    lr_per: int | None = 512
    betas: tuple[float, float] = (0.9, 0.95)

    def __post_init__(self):
        super().__post_init__()
        checks.within(self, "(0, 1)", "mask_ratio")
        checks.within(self, "[0, inf)", "uniformity")

    def check(self, image_size: int, model) -> None:
        checks.keep_count(model.grid(image_size) ** 2, self.mask_ratio)
        checks.sincos(model)


def views(config: Config, spec) -> dict[str, View]:
    return {"view": View(size=spec.image_size, scale=(config.crop_min, 1.0), flip=config.flip)}


class Method(Autoencoder):
    def __init__(self, config: Config, spec, target=None):
        super().__init__(config, spec)
        self.keep = checks.keep_count(self.patches, config.mask_ratio)
        if config.uniformity:
            self.whole_batch = REASON

    def forward(self, batch: dict, progress) -> dict[str, torch.Tensor]:
        """{"view": (B,3,H,W) in [0,1]} -> {"loss"}, the mean squared error of dropped patches.

        With `uniformity` that is "pixels", and the term is "uniformity".
        """
        images = self.spec.normalise(batch["view"])
        noise = progress.uniform("mask", self.patches)
        ids_keep, ids_restore, mask = random_masking(noise, self.keep)  # mask (B,N), 1 = dropped
        encoded = self.encode(images, ids_keep)
        predicted = self.decode(encoded, ids_restore)  # (B,N,3*patch^2)
        pixels = self.error(predicted, images, mask)
        if not self.config.uniformity:
            return {"loss": pixels}
        alike = uniformity(encoded["cls"])
        loss = pixels + self.config.uniformity * alike
        return {"loss": loss, "pixels": pixels, "uniformity": alike}

    @torch.no_grad()
    def pictures(self, batch: dict) -> dict[str, np.ndarray]:
        """Of at most 8 images: original | what the encoder sees | its reconstruction (`filled`)."""
        pixels = batch["view"][:8]
        noise = torch.rand(len(pixels), self.patches, generator=torch.Generator().manual_seed(0))
        ids_keep, ids_restore, mask = random_masking(noise.to(pixels.device), self.keep)
        predicted = self.reconstruct(self.spec.normalise(pixels), ids_keep, ids_restore)
        columns = [pixels, paint(pixels, mask), self.filled(pixels, predicted, mask)]
        return {"reconstruction": contact_sheet(columns)}

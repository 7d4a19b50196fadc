"""MAE: masked autoencoders are scalable vision learners (arXiv 2111.06377).

A uniformly random part of the patches is dropped; a ViT encodes the rest, without mask tokens. A
small decoder gets the encoded patches back in their places, one learnt token everywhere else, and
regresses the pixels of the dropped patches.

Follows facebookresearch/mae, with these departures:
- the masks come from keyed random numbers, so that a step can be repeated, instead of from the
  device's generator;
- patches kept = patches * (1 - mask_ratio) cut to an integer in exact arithmetic, where the
  official code uses floats;
- defaults are for small images (width 128 and depth 2 of the decoder, crops not below 40 % of the
  area, learning rate 1.5e-3 at batch 512). As published, for ImageNet and ViT-B/16: decoder_dim
  512, decoder_depth 8, decoder_heads 16, crop_min 0.2, lr 1.5e-4 with lr_per 256 at batch 4096, 800
  or 1600 epochs of which 40 warm up.
With a ConvViT (model.name: convvit_...) this is ConvMAE (arXiv 2205.03892), with a decoder as
configured here. As there, the class and mask tokens do get weight decay, and only one-dimensional
parameters do not.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from stages.kit.data.views import View
from stages.kit.nets import encoders, hybrid
from stages.kit.nets.decoder import Decoder
from stages.kit.nets.masks import random_masking
from stages.kit.nets.patches import (
    contact_sheet,
    normalise_patches,
    paint,
    patch_statistics,
    patchify,
    unpatchify,
)
from workflow import checks

TARGET = None
ENCODERS = ("vit", "convvit")
LABELS = False
TRAINS = True


@dataclass(frozen=True)
class Config:
    mask_ratio: float = 0.75  # share of the patches that is dropped
    norm_pix: bool = True  # targets normalised per patch
    decoder_dim: int = 128
    decoder_depth: int = 2
    decoder_heads: int = 4
    crop_min: float = 0.4  # smallest share of the image's area in a crop
    flip: float = 0.5
    optimizer: str = "adamw"
    lr: float = 1.5e-3  # at batch lr_per
    lr_per: int | None = 512
    min_lr: float = 0.0
    warmup: float = 0.05  # share of all steps
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float | None = None

    def __post_init__(self):
        checks.within(self, "(0, 1)", "mask_ratio")
        checks.within(self, "(0, 1]", "crop_min")
        checks.decoder(self)

    def check(self, image_size: int, model: dict) -> None:
        checks.keep_count((image_size // model["patch_size"]) ** 2, self.mask_ratio)
        checks.sincos(model)


def views(config: Config, spec) -> dict[str, View]:
    return {"view": View(size=spec.image_size, scale=(config.crop_min, 1.0), flip=config.flip)}


class Method(nn.Module):
    def __init__(self, config: Config, spec, target=None):
        super().__init__()
        self.config, self.spec = config, spec
        self.patch = spec.model["patch_size"]
        self.patches = spec.grid**2
        self.keep = checks.keep_count(self.patches, config.mask_ratio)
        self.encoder = encoders.sincos_vit(spec)
        self.fusion = (
            hybrid.Fusion(self.encoder) if isinstance(self.encoder, hybrid.ConvViT) else None
        )
        self.decoder = Decoder(
            self.encoder.embed_dim,
            3 * self.patch**2,
            spec.grid,
            config.decoder_dim,
            config.decoder_depth,
            config.decoder_heads,
            prefix=self.encoder.num_prefix_tokens,
        )

    def forward(self, batch: dict, progress) -> dict[str, torch.Tensor]:
        """{"view": (B,3,H,W) in [0,1]} -> {"loss"}, the mean squared error over the dropped
        patches.
        """
        images = self.spec.normalise(batch["view"])
        ids_keep, ids_restore, mask = random_masking(
            progress.uniform("mask", self.patches), self.keep
        )
        predicted = self.decode(self.encode(images, ids_keep), ids_restore)
        error = (predicted.float() - self.target(images)).square().mean(dim=-1)  # (B, N)
        return {"loss": (error * mask).sum() / mask.sum()}

    def encode(self, images: torch.Tensor, ids_keep: torch.Tensor) -> torch.Tensor:
        """Normalised images -> encoded prefix and kept patches (B, P+keep, D)."""
        return encoders.visible(self.encoder, images, ids_keep, self.fusion)

    def decode(self, encoded: torch.Tensor, ids_restore: torch.Tensor) -> torch.Tensor:
        """Encoded tokens (B, P+keep, D) -> pixels of every patch (B, N, 3*patch^2)."""
        return self.decoder(encoded, ids_restore)

    def target(self, images: torch.Tensor) -> torch.Tensor:
        """Normalised images -> their patches (B, N, 3*patch^2) in float32, each normalised if
        norm_pix.
        """
        patches = patchify(images.float(), self.patch)
        return normalise_patches(patches) if self.config.norm_pix else patches

    @torch.no_grad()
    def pictures(self, batch: dict) -> dict[str, np.ndarray]:
        """A contact sheet of at most 8 images: original | what the encoder sees | its
        reconstruction.

        Visible patches are copied from the image, since nothing trains their prediction. With
        norm_pix the predicted patches get the mean and deviation of the TRUE patch, which the model
        does not know: only their structure is its own.
        """
        pixels = batch["view"][:8]
        images = self.spec.normalise(pixels)
        noise = torch.rand(len(images), self.patches, generator=torch.Generator().manual_seed(0))
        ids_keep, ids_restore, mask = random_masking(noise.to(images.device), self.keep)
        predicted = self.decode(self.encode(images, ids_keep), ids_restore).float()
        if self.config.norm_pix:
            mean, deviation = patch_statistics(patchify(images, self.patch))
            predicted = predicted * deviation + mean
        filled = paint(pixels, mask, self.spec.denormalise(unpatchify(predicted, self.patch)))
        return {"reconstruction": contact_sheet([pixels, paint(pixels, mask), filled])}

"""MAE: masked autoencoders are scalable vision learners (arXiv 2111.06377).

A uniformly random part of the patches is dropped; a ViT encodes the rest, without mask tokens. A
small decoder gets the encoded patches back in their places, one learnt token everywhere else, and
regresses the pixels of the dropped patches.

Three calls hold what other methods do as well: `random_masking` orders the patches by random
numbers and keeps the first (kit/nets/masks.py), `encoders.visible` encodes those that are kept
(kit/nets/encoders.py), `Decoder` puts the tokens back in order and decodes (kit/nets/decoder.py).

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
from torch import nn

from stages.kit.data.views import View
from stages.kit.nets import encoders
from stages.kit.nets.decoder import Decoder
from stages.kit.nets.masks import random_masking
from stages.kit.nets.patches import normalise_patches, patch_statistics, patchify, unpatchify
from stages.kit.nets.pictures import contact_sheet, paint
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


class Method(nn.Module):
    """The encoder, which is exported, and the decoder, which only pretraining needs."""

    def __init__(self, config: Config, spec, target=None):
        super().__init__()
        self.config, self.spec = config, spec
        self.patches = spec.grid**2  # N
        self.keep = checks.keep_count(self.patches, config.mask_ratio)
        self.encoder = encoders.create(spec, "sincos")
        self.fusion = encoders.fusion(self.encoder)  # of a ConvViT; a ViT has none
        width, prefix = self.encoder.embed_dim, self.encoder.num_prefix_tokens
        self.decoder = Decoder.of(config, width, 3 * spec.patch**2, spec.grid, prefix=prefix)
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
        error = (predicted.float() - self.target(images)).square().mean(dim=-1)  # (B,N)
        pixels = (error * mask).sum() / mask.sum()
        if not self.config.uniformity:
            return {"loss": pixels}
        alike = uniformity(encoded["cls"])
        loss = pixels + self.config.uniformity * alike
        return {"loss": loss, "pixels": pixels, "uniformity": alike}

    def encode(self, images, ids_keep) -> dict[str, torch.Tensor]:
        """Normalised images -> what the encoder has of the kept patches (kit/nets/encoders.py)."""
        return encoders.visible(self.encoder, images, ids_keep, fusion=self.fusion)

    def decode(self, encoded: dict, ids_restore) -> torch.Tensor:
        """What the encoder has -> pixels of every patch (B,N,3*patch^2)."""
        return self.decoder(encoded["tokens"], ids_restore)

    def reconstruct(self, images, ids_keep, ids_restore) -> torch.Tensor:
        """Normalised images -> pixels of every patch (B,N,3*patch^2), from the kept ones alone."""
        return self.decode(self.encode(images, ids_keep), ids_restore)

    def target(self, images: torch.Tensor) -> torch.Tensor:
        """Normalised images -> their patches (B,N,3*patch^2), float32, normalised if norm_pix."""
        patches = patchify(images.float(), self.spec.patch)
        return normalise_patches(patches) if self.config.norm_pix else patches

    @torch.no_grad()
    def pictures(self, batch: dict) -> dict[str, np.ndarray]:
        """Of at most 8 images: original | what the encoder sees | its reconstruction.

        Visible patches are copied from the image, since nothing trains their prediction. With
        norm_pix the predicted patches get the mean and deviation of the TRUE patch, which the model
        does not know: only their structure is its own.
        """
        pixels = batch["view"][:8]
        images, patch = self.spec.normalise(pixels), self.spec.patch
        noise = torch.rand(len(images), self.patches, generator=torch.Generator().manual_seed(0))
        ids_keep, ids_restore, mask = random_masking(noise.to(images.device), self.keep)
        predicted = self.reconstruct(images, ids_keep, ids_restore).float()
        if self.config.norm_pix:
            mean, deviation = patch_statistics(patchify(images, patch))
            predicted = predicted * deviation + mean
        filled = paint(pixels, mask, self.spec.denormalise(unpatchify(predicted, patch)))
        return {"reconstruction": contact_sheet([pixels, paint(pixels, mask), filled])}

"""dBOT: masked knowledge distillation with bootstrapped teachers (arXiv 2209.03917).

MAE's student, which sees a quarter of the patches, regresses the standardised features that a
frozen teacher has of the whole image, at the hidden patches and at the class token. When a stage
ends, the student becomes the teacher of a new one. The first teacher may be an untrained network.
In params.yaml a chain is one run:

    random: {method: random}
    dbot: {method: dbot, target: "run:random", stages: 3}     # runs dbot-1, dbot-2, dbot-3

Any other run's encoder, or any target that gives features, may be the first teacher instead. The
features of an encoder are the last block's, before the final norm. A target that gives no class
token is learnt at the hidden patches alone; a target `dino` gives one, so it is learnt, too.

Follows liuxingbin/dbot, main branch, with these departures:
- a stage is a job: student, optimiser, schedule and randomness all begin anew. The official code
  re-initialises in place, which leaves the bias of the patch projection, and keeps AdamW's moments
  and step count from one stage to the next;
- an untrained first teacher (`random`, same seed) is the student's own starting point, as there;
  later stages draw other initial weights. `random` with depth 0 is the first teacher of the
  official ViT-L and ViT-H: patch projection and positions only;
- masks come from keyed random numbers, so that a step can be repeated;
- defaults are for small images; PUBLISHED is a stage for ImageNet and ViT-B/16, of which there are
  two, or three for dense tasks (ViT-H: drop_path 0.3; ViT-L, ViT-H: no clip).
The published CLIP-teacher results come from another code base (a BEiT-like student, block masks,
cosine loss), which is not this method. As in MAE, the class and mask tokens do get weight decay.
Its fine-tuning starts the head with a deviation of 0.01, where MAE's has 2e-5 (`head_std` of the
task finetune, as in presets/imagenet.yaml).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from stages.kit.data.views import View
from stages.kit.nets import encoders
from stages.kit.nets.decoder import Decoder
from stages.kit.nets.masks import random_masking
from stages.kit.nets.patches import normalise_patches
from stages.kit.nets.pictures import contact_sheet, paint, principal_colours
from workflow import checks

TARGET = {"patch"}
NEEDS = {"drop", "cls"}
LABELS = False
TRAINS = True
PUBLISHED = {
    "epochs": 800,
    "batch_size": 4096,
    "mask_ratio": 0.75,
    "norm_target": True,
    "teacher_norm": False,
    "beta": 2.0,
    "decoder_dim": 512,
    "decoder_depth": 8,
    "decoder_heads": 16,
    "drop_path": 0.2,
    "crop_min": 0.2,
    "lr": 0.00015,
    "lr_per": 256,
    "min_lr": 0.0,
    "warmup": 0.05,
    "weight_decay": 0.05,
    "betas": [0.9, 0.95],
    "clip": 3.0,
}


@dataclass(frozen=True)
class Config(checks.Optimiser, checks.Crop, checks.Decoder):
    mask_ratio: float = 0.75  # share of the patches that is dropped
    norm_target: bool = True  # standardise each token of the target over its channels
    teacher_norm: bool = False  # apply the teacher's own final norm first
    beta: float = 2.0  # of smooth L1: quadratic up to here
    drop_path: float = 0.0  # in the last block of encoder and decoder, rising to it from 0
    crop_min: float = 0.4
    lr_per: int | None = 512
    warmup: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float | None = 3.0

    def __post_init__(self):
        super().__post_init__()
        checks.within(self, "(0, 1)", "mask_ratio")
        checks.within(self, "(0, inf)", "beta")
        checks.within(self, "[0, 1)", "drop_path")

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
        # drawn first: with the seed of an untrained run, its encoder
        self.encoder = encoders.create(spec, "sincos", drop_path=config.drop_path)
        self.with_cls = encoders.has_cls(self.encoder) and "cls" in target.sizes
        how = {"with_cls": self.with_cls, "drop_path": config.drop_path}
        width, prefix = self.encoder.embed_dim, self.encoder.num_prefix_tokens
        out = target.sizes["patch"]
        self.decoder = Decoder.of(config, width, out, spec.grid, prefix=prefix, **how)

    def forward(self, batch: dict, progress) -> dict[str, torch.Tensor]:
        """{"view": (B,3,H,W) in [0,1]} -> {"loss", "cosine"} of class token and hidden patches."""
        images = batch["view"]
        target = self.target(images)  # (B,C+N,dim), C = 1 with a class token
        noise = progress.uniform("mask", self.patches)
        ids_keep, ids_restore, mask = random_masking(noise, self.keep)
        predicted = self.predict(images, ids_keep, ids_restore).float()
        counts = F.pad(mask, (int(self.with_cls), 0), value=1.0)  # (B,C+N)
        error = F.smooth_l1_loss(predicted, target, beta=self.config.beta, reduction="none")
        error = error.mean(dim=-1)
        cosine = F.cosine_similarity(predicted.detach(), target, dim=-1)
        return {
            "loss": (error * counts).sum() / counts.sum(),
            "cosine": (cosine * counts).sum() / counts.sum(),
        }

    def target(self, images: torch.Tensor) -> torch.Tensor:
        """Whole images (B,3,H,W) in [0,1] -> the teacher's standardised tokens (B,C+N,dim).

        They are its class token, if it is used, and its patches.
        """
        wanted = ("cls", "patch") if self.with_cls else ("patch",)
        found = self.teacher(images, *wanted, norm=self.config.teacher_norm)
        cls = [found["cls"][:, None]] if self.with_cls else []
        tokens = torch.cat([*cls, found["patch"]], dim=1).float()
        return normalise_patches(tokens) if self.config.norm_target else tokens

    def predict(self, images, ids_keep, ids_restore) -> torch.Tensor:
        """Images in [0,1], of which the patches ids_keep are seen -> (B,C+N,dim)."""
        seen = encoders.visible(self.encoder, self.spec.normalise(images), ids_keep)
        return self.decoder(seen["tokens"], ids_restore)

    @torch.no_grad()
    def pictures(self, batch: dict) -> dict[str, np.ndarray]:
        """Of at most 8 images: original | what is seen | the teacher's features | predicted ones.

        Predictions are shown where patches are hidden. Colours are three principal components, the
        same for both columns.
        """
        images = batch["view"][:8]
        noise = torch.rand(len(images), self.patches, generator=torch.Generator().manual_seed(0))
        ids_keep, ids_restore, mask = random_masking(noise.to(images.device), self.keep)
        predicted = self.predict(images, ids_keep, ids_restore).float()
        both = torch.cat([self.target(images), predicted])[:, int(self.with_cls) :]
        colours = F.interpolate(principal_colours(both), size=images.shape[-2:], mode="nearest")
        wanted, found = colours.chunk(2)
        columns = [images, paint(images, mask), wanted, paint(found, 1 - mask)]
        return {"features": contact_sheet(columns)}

"""dBOT: masked distillation with bootstrapped teachers ("Exploring Target Representations for
Masked Autoencoders", arXiv 2209.03917).

MAE's student, which sees a quarter of the patches, regresses the standardised features that a
frozen teacher has of the whole image, at the hidden patches and at the class token. When a stage
ends the student becomes the teacher of a new one; the first teacher may be an untrained network. In
params.yaml a chain is one run:

    random: {method: random}
    dbot: {method: dbot, target: "run:random", stages: 3}     # runs dbot-1, dbot-2, dbot-3

Any other run's encoder, or any target that produces features, may be the first teacher instead. The
features are the last block's, before the final norm. A target that gives patches only (not another
run's encoder) is learnt at the hidden patches alone.

Follows liuxingbin/dbot, main branch, with these departures:
- a stage is a job: student, optimiser, schedule and randomness all begin anew. The official code
  re-initialises in place, which leaves the bias of the patch projection, and keeps AdamW's moments
  and step count across the border;
- with the untrained encoder (`random`, same seed) as first teacher, this is the student's own
  starting point, as there; later stages draw other initial weights. `random` with depth 0 is the
  first teacher of the official ViT-L and ViT-H: patch projection and positions only;
- masks come from keyed random numbers, so that a step can be repeated;
- defaults are for small images. As published, for ImageNet and ViT-B/16: decoder_dim 512,
  decoder_depth 8, decoder_heads 16, drop_path 0.2 (ViT-H 0.3), crop_min 0.2, lr 1.5e-4 with lr_per
  256 at batch 4096, two stages of 800 epochs (three for dense tasks) of which 40 warm up, clip 3.0
  (ViT-L, ViT-H: none).
The published CLIP-teacher results come from another code base (a BEiT-like student, block masks,
cosine loss), which is not this method. As in MAE, the class and mask tokens do get weight decay.
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
from stages.kit.nets.patches import contact_sheet, normalise_patches, paint
from stages.kit.parts.health import principal_colours
from workflow import checks

TARGET = "features"
LABELS = False
TRAINS = True


@dataclass(frozen=True)
class Config:
    mask_ratio: float = 0.75  # share of the patches that is dropped
    norm_target: bool = True  # standardise each token of the target over its channels
    teacher_norm: bool = False  # apply the teacher's own final norm first
    beta: float = 2.0  # of smooth L1: quadratic up to here
    decoder_dim: int = 128
    decoder_depth: int = 2
    decoder_heads: int = 4
    drop_path: float = 0.0  # in the last block of encoder and decoder, rising to it from 0
    crop_min: float = 0.4  # smallest share of the image's area in a crop
    flip: float = 0.5
    optimizer: str = "adamw"
    lr: float = 1e-3  # at batch lr_per
    lr_per: int | None = 512
    min_lr: float = 0.0
    warmup: float = 0.1  # share of the steps of a stage
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float | None = 3.0

    def __post_init__(self):
        checks.within(self, "(0, 1)", "mask_ratio")
        checks.within(self, "(0, inf)", "beta")
        checks.within(self, "[0, 1)", "drop_path")
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
        if not hasattr(target, "dim"):
            raise ValueError(
                f"dbot needs a teacher (a target of features), found {type(target).__name__}"
            )
        self.config, self.spec = config, spec
        self.teacher = [target]  # in a list: frozen, neither trained nor saved with the student
        self.patches = spec.grid**2
        self.keep = checks.keep_count(self.patches, config.mask_ratio)
        # drawn first: with the seed of an untrained run, its encoder
        self.encoder = encoders.sincos_vit(spec, drop_path_rate=config.drop_path)
        self.has_cls = self.encoder.cls_token is not None and getattr(target, "has_cls", False)
        self.decoder = Decoder(
            self.encoder.embed_dim,
            target.dim,
            spec.grid,
            config.decoder_dim,
            config.decoder_depth,
            config.decoder_heads,
            prefix=self.encoder.num_prefix_tokens,
            cls=self.has_cls,
            drop_path=config.drop_path,
        )

    def forward(self, batch: dict, progress) -> dict[str, torch.Tensor]:
        """{"view": (B,3,H,W) in [0,1]} -> {"loss", "cosine"}, both over the class token and the
        dropped patches.
        """
        target = self.target(batch["view"])
        ids_keep, ids_restore, mask = random_masking(
            progress.uniform("mask", self.patches), self.keep
        )
        encoded = self.encode(self.spec.normalise(batch["view"]), ids_keep)
        predicted = self.decode(encoded, ids_restore).float()  # (B, C+N, dim)
        counts = F.pad(mask, (int(self.has_cls), 0), value=1.0)  # (B, C+N)
        error = F.smooth_l1_loss(predicted, target, beta=self.config.beta, reduction="none").mean(
            dim=-1
        )
        cosine = F.cosine_similarity(predicted.detach(), target, dim=-1)
        return {
            "loss": (error * counts).sum() / counts.sum(),
            "cosine": (cosine * counts).sum() / counts.sum(),
        }

    @torch.no_grad()
    def target(self, images: torch.Tensor) -> torch.Tensor:
        """Whole images (B,3,H,W) in [0,1] -> teacher's class token, if used, and patches
        (B,C+N,dim), standardised.
        """
        teacher = self.teacher[0]
        if hasattr(teacher, "tokens"):
            tokens = teacher.tokens(images, norm=self.config.teacher_norm)
            tokens = tokens[:, int(teacher.has_cls and not self.has_cls) :]
        else:
            tokens = teacher(images)
        expected = (len(images), int(self.has_cls) + self.patches)
        if tokens.shape[:2] != expected:
            raise ValueError(
                f"target: gave features of shape {tuple(tokens.shape)}, expected {expected} tokens"
            )
        return normalise_patches(tokens.float()) if self.config.norm_target else tokens.float()

    def encode(self, images: torch.Tensor, ids_keep: torch.Tensor) -> torch.Tensor:
        """Normalised images -> encoded prefix and kept patches (B, P+keep, D)."""
        return encoders.visible(self.encoder, images, ids_keep)

    def decode(self, encoded: torch.Tensor, ids_restore: torch.Tensor) -> torch.Tensor:
        """Encoded tokens (B, P+keep, D) -> predictions for the class token, if used, and all
        patches (B,C+N,dim).
        """
        return self.decoder(encoded, ids_restore)

    @torch.no_grad()
    def pictures(self, batch: dict) -> dict[str, np.ndarray]:
        """A contact sheet of at most 8 images: original | what the encoder sees | teacher's
        features | predicted.

        Colours are three principal components, the same for both columns; predictions at hidden
        patches only.
        """
        images = batch["view"][:8]
        noise = torch.rand(len(images), self.patches, generator=torch.Generator().manual_seed(0))
        ids_keep, ids_restore, mask = random_masking(noise.to(images.device), self.keep)
        predicted = self.decode(self.encode(self.spec.normalise(images), ids_keep), ids_restore)
        both = torch.cat([self.target(images), predicted.float()])[:, int(self.has_cls) :]
        colours = F.interpolate(principal_colours(both), size=images.shape[-2:], mode="nearest")
        wanted, found = colours.chunk(2)
        return {
            "features": contact_sheet([images, paint(images, mask), wanted, paint(found, 1 - mask)])
        }

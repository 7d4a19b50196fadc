"""SdAE: self-distillated masked autoencoder (arXiv 2208.00449).

MAE's student sees a quarter of the patches and predicts, at the hidden ones, the standardised
features that its own moving average has of them. This teacher sees hidden patches only, dealt out
into disjoint folds that are as long as the student's sequence, and each fold by itself. Once per
epoch it moves towards the student.

Follows AbrahamYabo/SdAE. Paper and code differ in the loss: the paper's is a cosine over the
channels of a token, while the released call, without an axis, takes it over the tokens of a fold,
channel by channel. `cosine_axis: channel` is the default; PUBLISHED has `token`, since the figures
presumably come from that code. Departures:
- `token` is taken over the tokens in every case; the released code falls back to channels where its
  teacher sees the whole image;
- the folds are rows k*B + b, where the official code has b*K + k;
- hidden patches that the number of folds does not divide are left out of teacher and loss, as
  officially; the other settings that drop patches or stop the official script are not there;
- `teacher_init: random` draws timm's weights, as officially; of these the class token has a
  deviation of 1e-6 (officially 0.02), beside learnt positions of 0.02, which the average turns into
  the student's fixed ones. `student` starts as a copy;
- the official warm-up of the momentum, unused in its recipe, is not there. `update: step` moves the
  teacher at every step, which wants a momentum nearer to 1; as there, it changes with the epoch;
- masks come from keyed random numbers, and counts are exact, as in methods/mae.py;
- an epoch whose last batch `train.nan_skips` leaves out does not move the teacher;
- a teacher whose features do not depend on the image stops the training (kit/parts/collapse.py);
- defaults are for small images and short runs; PUBLISHED is the recipe for ImageNet and ViT-B/16.
As in MAE, class and mask tokens get weight decay. The student's encoder is what is exported.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from stages.kit.data.views import View
from stages.kit.nets import ema, encoders
from stages.kit.nets.decoder import Decoder
from stages.kit.nets.masks import random_masking, take
from stages.kit.nets.patches import normalise_patches
from stages.kit.nets.pictures import contact_sheet, paint, principal_colours
from stages.kit.parts.collapse import FeatureWatch
from workflow import checks

TARGET = None
NEEDS = {"drop", "cls"}
LABELS = False
TRAINS = True
PUBLISHED = {
    "epochs": 300,
    "batch_size": 768,
    "mask_ratio": 0.75,
    "teacher_view": "hidden",
    "folds": 3,
    "norm_target": True,
    "cosine_axis": "token",
    "teacher_init": "random",
    "update": "epoch",
    "momentum": 0.96,
    "momentum_end": 0.99,
    "drop_path": 0.25,
    "decoder_dim": 512,
    "decoder_depth": 8,
    "decoder_heads": 16,
    "crop_min": 0.2,
    "lr": 2.666e-4,
    "lr_per": 256,
    "min_lr": 0.0,
    "warmup": 0.2,
    "weight_decay": 0.04,
    "betas": [0.9, 0.95],
}


@dataclass(frozen=True)
class Config(checks.Optimiser, checks.Crop, checks.Decoder):
    mask_ratio: float = 0.75  # share of the patches that is hidden from the student
    teacher_view: Literal["hidden", "image"] = "hidden"  # what the teacher sees
    folds: int = 3  # sequences that the hidden patches are dealt out into; 1: all in one
    norm_target: bool = True  # standardise each token of the target over its channels
    # a cosine of each token over its channels, or, as released, of each channel over a fold
    cosine_axis: Literal["channel", "token"] = "channel"
    teacher_init: Literal["student", "random"] = "random"  # a copy, or weights of its own
    update: Literal["epoch", "step"] = "epoch"  # how often the teacher moves
    momentum: float = 0.96  # of the teacher in the first epoch
    momentum_end: float = 0.99  # reached as a cosine
    drop_path: float = 0.0  # in the student's last block, rising to it from 0
    # least share of the target's mean square by which a place differs between images; a training
    # that stays below it for long is stopped. Untrained teachers have 0.7 to 0.9, blind ones up to
    # 0.02, since they see which places are in a fold
    min_variety: float = 0.05
    crop_min: float = 0.4
    lr: float = 1.5e-3
    lr_per: int | None = 512
    warmup: float = 0.2
    weight_decay: float = 0.04
    betas: tuple[float, float] = (0.9, 0.95)

    def __post_init__(self):
        super().__post_init__()
        checks.within(self, "(0, 1)", "mask_ratio")
        checks.within(self, "[1, inf)", "folds")
        checks.within(self, "[0, 1]", "momentum", "momentum_end", "min_variety")
        checks.within(self, "[0, 1)", "drop_path")

    def check(self, image_size: int, model) -> None:
        patches = model.grid(image_size) ** 2
        hidden = patches - checks.keep_count(patches, self.mask_ratio)
        if self.folds > hidden:
            raise ValueError(
                f"folds: found {self.folds}, expected at most the {hidden} hidden patches"
            )
        checks.sincos(model)


def views(config: Config, spec) -> dict[str, View]:
    return {"view": View(size=spec.image_size, scale=(config.crop_min, 1.0), flip=config.flip)}


class Method(nn.Module):
    def __init__(self, config: Config, spec, target=None):
        super().__init__()
        self.config, self.spec = config, spec
        self.patches = spec.grid**2  # N
        self.keep = checks.keep_count(self.patches, config.mask_ratio)
        self.folds = config.folds if config.teacher_view == "hidden" else 1  # K
        self.encoder = encoders.create(spec, "sincos", drop_path=config.drop_path)
        width, prefix = self.encoder.embed_dim, self.encoder.num_prefix_tokens
        self.decoder = Decoder.of(config, width, width, spec.grid, prefix=prefix)
        if config.teacher_init == "student":
            self.teacher = ema.Average(copy.deepcopy(self.encoder))
        else:
            self.teacher = ema.Average(encoders.create(spec, "timm"))
        self.watch = FeatureWatch(config.min_variety)

    def forward(self, batch: dict, progress) -> dict[str, torch.Tensor]:
        """{"view": (B,3,H,W) in [0,1]} -> {"loss", mean cosines of tokens over their channels and
        of channels over a fold, "variety": how much the target differs between images}.
        """
        images = self.spec.normalise(batch["view"])
        ids_keep, ids_restore, ids_folds = self.mask(progress.uniform("mask", self.patches))
        target = self.target(images, ids_folds)  # (K*B,n,D)
        predicted = self.predict(images, ids_keep, ids_restore).float()  # (B,N,D)
        predicted = torch.cat([take(predicted, ids) for ids in ids_folds.split(len(images))])
        cosines = {
            "channel": F.cosine_similarity(predicted, target, dim=2).mean(),
            "token": F.cosine_similarity(predicted, target, dim=1).mean(),
        }
        return {
            "loss": 1 - cosines[self.config.cosine_axis],
            **{f"{axis}_cosine": cosine for axis, cosine in cosines.items()},
            "variety": self.watch.count(target, ids_folds, self.spec.grid),
        }

    def mask(self, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Noise (B,N) -> the visible patches (B,n'), where each patch is among visible and hidden
        ones (B,N), and the folds (K*B,n): row k*B + b is fold k of image b.
        """
        ids_keep, ids_restore, _ = random_masking(noise, self.keep)
        ids_hide = ids_restore.argsort(dim=1)[:, self.keep :]  # in random order
        size = ids_hide.shape[1] // self.folds
        return ids_keep, ids_restore, torch.cat(ids_hide.split(size, dim=1)[: self.folds])

    @torch.no_grad()
    def target(self, images: torch.Tensor, ids_folds: torch.Tensor) -> torch.Tensor:
        """Normalised images -> the teacher's features (K*B,n,D) of the folds, after its last norm,
        in float32, standardised if norm_target.
        """
        teacher = self.teacher.network
        if self.config.teacher_view == "hidden":
            tokens = encoders.visible(teacher, images, ids_folds)["patch"]
        else:
            tokens = take(encoders.features(teacher, images)["patch"], ids_folds)
        return normalise_patches(tokens.float()) if self.config.norm_target else tokens.float()

    def predict(self, images, ids_keep, ids_restore) -> torch.Tensor:
        """Normalised images, of which the patches ids_keep are seen -> (B,N,D), for all patches."""
        return self.decoder(encoders.visible(self.encoder, images, ids_keep)["tokens"], ids_restore)

    def after_step(self, progress) -> None:
        if self.config.update == "step" or progress.end_of_epoch:
            self.teacher.follow(self.encoder, self.momentum(progress))
        self.watch.step(progress)

    def momentum(self, progress) -> float:
        """Of the epoch that the step is in; constant within it."""
        fraction = int(progress.epoch) / progress.epochs
        return ema.momentum(self.config.momentum, fraction, self.config.momentum_end)

    @torch.no_grad()
    def pictures(self, batch: dict) -> dict[str, np.ndarray]:
        """Of at most 8 images: image | what the student sees | for each fold: what the teacher sees
        | its features | what the student predicts of them. With teacher_view "image" the teacher
        sees all, and the one fold is what is learnt of it.

        Colours are three principal components, the same for all columns.
        """
        pixels = batch["view"][:8]
        noise = torch.rand(len(pixels), self.patches, generator=torch.Generator().manual_seed(0))
        ids_keep, ids_restore, ids_folds = self.mask(noise.to(pixels.device))
        images = self.spec.normalise(pixels)
        predicted = self.predict(images, ids_keep, ids_restore).float()
        if self.config.norm_target:  # their scale is free
            predicted = normalise_patches(predicted)
        wanted, target = predicted, self.target(images, ids_folds).split(len(images))
        folds, columns = (
            ids_folds.split(len(images)),
            [pixels, paint(pixels, hide(ids_keep, noise))],
        )
        for ids, tokens in zip(folds, target, strict=True):
            wanted = wanted.scatter(1, ids[..., None].expand_as(tokens), tokens)
        colours = principal_colours(torch.cat([wanted, predicted]))
        size = images.shape[-2:]
        both = F.interpolate(colours, size=size, mode="nearest").split(len(images))
        for ids in folds:
            columns += [paint(column, hide(ids, noise)) for column in (pixels, *both)]
        return {"folds": contact_sheet(columns)}


def hide(ids: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """bool of the shape (B,N) of `like`: all patches but ids (B,n)."""
    return torch.ones(like.shape, dtype=torch.bool, device=ids.device).scatter(1, ids, False)

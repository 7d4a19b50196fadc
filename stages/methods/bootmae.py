"""BootMAE: bootstrapped masked autoencoders (arXiv 2207.07116).

MAE's encoder sees a quarter of the patches. From what it gives, one small decoder predicts the
pixels of the hidden ones, and another the features that the encoder's own moving average has of
them in the whole image. The decoders' blocks also look at inner states of the encoder, so that its
output need not carry all details: the pixel regressor at those after the first block, the feature
predictor at those after the last. Most of the mask is blocks.

Follows LightDXY/BootMAE, with these departures:
- the encoder is timm's ViT, whose keys have a bias; it starts at zero and stays there, which is no
  bias at all (nothing depends on it anyway);
- the halves of the sin-cos positions are MAE's, the column's first, where the official code has the
  row's first: another order of channels, on which nothing depends;
- images are normalised by the data's statistics, officially by 0.5 and 0.5;
- blocks are searched for in at most 24 rounds of 64 tries, officially without an end; what is then
  missing, if anything, is random patches;
- masks are keyed by seed and step; the order is rolled by one number for all processes;
- only the encoder has a moving average; that of the decoders is never used officially;
- the decays of the average are reached at shares of the training, officially at epochs 100 and 400;
- with a feature weight of 0, where the official code stops, there is no feature predictor;
- a teacher whose features do not depend on the image stops the training (kit/parts/collapse.py);
- defaults are for small images and short runs; PUBLISHED is the recipe for ImageNet and ViT-B/16
  (ViT-L: momentum_end 0.9999, min_lr 1e-5).
As officially, losses are divided by the share of hidden patches, not by the sum of their weights:
an error of 1 gives about 1.7. With `feature_weight: 0` and `inject: none` this is an MAE with other
masks and another decoder. The student's encoder is what is exported.
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
from stages.kit.eager import eager
from stages.kit.nets import ema, encoders
from stages.kit.nets.crossdecoder import CrossDecoder
from stages.kit.nets.init import moco_init, xavier_init
from stages.kit.nets.masks import exact_block_masks, mixed_masking, surrounded
from stages.kit.nets.patches import channel_statistics
from stages.kit.nets.pictures import contact_sheet, paint, principal_colours
from stages.kit.parts.collapse import FeatureWatch
from workflow import checks

TARGET = None
NEEDS = {"drop", "mask", "taps", "cls"}
LABELS = False
TRAINS = True
PUBLISHED = {
    "epochs": 801,
    "batch_size": 4096,
    "mask_ratio": 0.75,
    "block_ratio": 0.6122,
    "min_block": 16,
    "max_block": 60,
    "roll": 3,
    "weight_mask": True,
    "feature_weight": 1.0,
    "ramp": 0.25,
    "inject": "matched",
    "momentum": 0.999,
    "momentum_middle": 0.9999,
    "momentum_end": 0.99999,
    "momentum_at": [0.1248439, 0.4993758],
    "decoder_dim": 512,
    "decoder_depth": 2,
    "crop_min": 0.2,
    "lr": 0.00015,
    "lr_per": 256,
    "min_lr": 0.0001,
    "warmup": 0.0499376,
    "schedule": "beit",
    "weight_decay": 0.05,
    "betas": [0.9, 0.95],
}
SEARCH = {"rounds": 24, "tries": 64}
EPS, PIXEL_EPS = 1e-6, 1e-5  # of the variance of features, of pixels


@dataclass(frozen=True)
class Config(checks.Optimiser, checks.Crop):
    mask_ratio: float = 0.75  # share of the patches that is hidden
    block_ratio: float = 0.6122  # share that blocks hide, rounded: 120 of 196, 39 of 64
    min_block: int = 4  # patches in the smallest block
    max_block: int = 20  # in the largest
    roll: int = 1  # patches of blocks that are shown after all, at most
    weight_mask: bool = True  # patches amid other hidden ones weigh up to twice as much
    feature_weight: float = 1.0  # of the loss of features; 0: pixels only
    ramp: float = 0.25  # share of the training until the full feature_weight
    # which states the decoders look at: pixels at the first, features at the last; or the reverse
    inject: Literal["matched", "reversed", "none"] = "matched"
    momentum: float = 0.99  # of the teacher at first
    momentum_middle: float = 0.999  # reached at the first share of the training below
    momentum_end: float = 0.9999  # and this at the second; each in a straight line
    momentum_at: tuple[float, float] = (0.125, 0.5)
    decoder_dim: int = (
        128  # of the pixel regressor; the feature predictor is as wide as the encoder
    )
    decoder_depth: int = 2  # blocks of each; they have as many heads as the encoder
    # least share of the target's mean square by which a place differs between images; a training
    # that stays below it for long is stopped
    min_variety: float = 0.05
    crop_min: float = 0.4
    lr: float = 1.5e-3
    lr_per: int | None = 512
    betas: tuple[float, float] = (0.9, 0.95)

    def __post_init__(self):
        super().__post_init__()
        checks.within(self, "(0, 1)", "mask_ratio", "block_ratio")
        checks.within(self, "[1, inf)", "min_block", "max_block")
        checks.within(self, "[0, inf)", "roll", "feature_weight", most=1e6)
        checks.within(self, "[0, 1]", "momentum", "momentum_middle", "momentum_end")
        checks.within(self, "[0, 1]", "ramp", "min_variety")
        checks.within(self, "[1, inf)", "decoder_dim", most=checks.MOST_WIDTH)
        checks.within(self, "[1, inf)", "decoder_depth", most=checks.MOST_DEPTH)
        checks.spans(self, "momentum_at")
        if self.max_block < self.min_block:
            raise ValueError(
                f"max_block: found {self.max_block}, expected at least min_block {self.min_block}"
            )
        checks.quarters(self, "decoder_dim")

    def check(self, image_size: int, model) -> None:
        patches = model.grid(image_size) ** 2
        keep = checks.keep_count(patches, self.mask_ratio)
        blocked = round(patches * self.block_ratio)
        if not 0 < blocked <= patches - keep:
            raise ValueError(
                f"block_ratio: found {self.block_ratio}, which hides {blocked} of {patches} "
                f"patches, expected at most the {patches - keep} of mask_ratio"
            )
        for key, most in (("min_block", blocked), ("roll", min(blocked, keep))):
            if (found := getattr(self, key)) > most:
                raise ValueError(f"{key}: found {found}, expected at most {most}")
        if self.decoder_dim < model.num_heads:
            least = f"at least the model's {model.num_heads} heads"
            raise ValueError(f"decoder_dim: found {self.decoder_dim}, expected {least}")
        checks.sincos(model)


def views(config: Config, spec) -> dict[str, View]:
    return {"view": View(size=spec.image_size, scale=(config.crop_min, 1.0), flip=config.flip)}


class Method(nn.Module):
    def __init__(self, config: Config, spec, target=None):
        super().__init__()
        self.config, self.spec = config, spec
        self.patches = spec.grid**2  # N
        self.keep = checks.keep_count(self.patches, config.mask_ratio)
        self.encoder = encoders.create(spec, "sincos")
        moco_init(self.encoder)
        width, heads = self.encoder.embed_dim, spec.model.num_heads
        prefix, inject = self.encoder.num_prefix_tokens, config.inject != "none"
        sizes = (config.decoder_depth, heads, prefix, inject)
        self.pixel_decoder = CrossDecoder(width, spec.grid, config.decoder_dim, *sizes)
        self.pixel_head = nn.ConvTranspose2d(config.decoder_dim, 3, spec.patch, spec.patch)
        self.feature_decoder = self.feature_head = self.teacher = None
        if config.feature_weight:
            self.feature_decoder = CrossDecoder(width, spec.grid, width, *sizes)
            self.feature_head = nn.Linear(width, width)
            xavier_init(self.feature_head)
            self.teacher = ema.Average(copy.deepcopy(self.encoder))
        self.watch = FeatureWatch(config.min_variety)

    def no_weight_decay(self) -> set[str]:
        """As officially; mask tokens are decayed."""
        return {"encoder.cls_token"}

    def forward(self, batch: dict, progress) -> dict[str, torch.Tensor]:
        """{"view": (B,3,H,W) in [0,1]} -> {"loss", "pixel_loss", and of features their "loss",
        "cosine" and "variety": how much the target differs between images}.
        """
        pixels = batch["view"]
        images = self.spec.normalise(pixels)
        ids_keep, ids_restore, mask = self.mask(progress.uniform, self.rolled(progress))
        weight = surrounded(mask) if self.config.weight_mask else mask
        weight = weight / mask.sum()  # (B,N)
        drawn, features = self.predict(images, ids_keep, ids_restore)
        error = (drawn.float() - self.pixels(pixels)[0]).square().mean(dim=1, keepdim=True)
        error = F.avg_pool2d(error, self.spec.patch).flatten(1)  # (B,N)
        out = {"pixel_loss": (error * weight).sum()}
        if features is None:
            return {"loss": out["pixel_loss"], **out}
        target, features = self.target(images), standardised(features)
        error = (features - target).square().mean(dim=2)
        out["feature_loss"] = (error * weight).sum()
        cosine = F.cosine_similarity(features.detach(), target, dim=2)
        out["cosine"] = (cosine * mask).sum() / mask.sum()
        places = torch.arange(self.patches, device=images.device).expand(len(images), -1)
        out["variety"] = self.watch.count(target, places, self.spec.grid)
        loss = out["pixel_loss"] + self.feature_weight(progress) * out["feature_loss"]
        return {"loss": loss.float(), **out}

    def mask(self, uniform, roll: torch.Tensor | int) -> tuple[torch.Tensor, ...]:
        """As masks.random_masking. `uniform(name, *shape)` as Progress.uniform."""
        config, grid = self.config, (self.spec.grid,) * 2
        count = round(self.patches * config.block_ratio)
        blocks = (grid, count, config.min_block, config.max_block)
        return mixed_masking(
            uniform, exact_block_masks(uniform, *blocks, **SEARCH), self.keep, roll
        )

    @eager  # a generator is nothing for a compiler
    def rolled(self, progress) -> torch.Tensor:
        """How far the order of patches is rolled in this step: an integer from 0 to `roll`."""
        generator = progress.generator("roll")
        return torch.randint(self.config.roll + 1, (), generator=generator).to(progress.device)

    @eager
    def feature_weight(self, progress) -> torch.Tensor:
        """It rises once per epoch, in a straight line: a float64 scalar on the CPU."""
        config, done = self.config, (1 + int(progress.epoch)) / progress.epochs
        share = min(1.0, done / config.ramp) if config.ramp else 1.0
        return torch.tensor(config.feature_weight * share, dtype=torch.float64, device="cpu")

    def pixels(self, shown: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Images in [0,1] -> target (B,3,H,W), and mean and deviation in the scale of [-1, 1]."""
        scaled = 2 * shown.float() - 1
        mean, deviation = channel_statistics(scaled, self.spec.patch, PIXEL_EPS)
        return (scaled - mean) / deviation, mean, deviation

    @torch.no_grad()
    def target(self, images: torch.Tensor) -> torch.Tensor:
        """Whole normalised images -> the teacher's patches (B,N,D) before its last norm, in
        float32, standardised.
        """
        seen = encoders.masked(self.teacher.network, images, None, None, norm=False)
        return standardised(seen["patch"])

    def predict(self, images, ids_keep, ids_restore) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Normalised images, of which the patches ids_keep are seen -> pixels (B,3,H,W), and
        features (B,N,D) if there is a predictor of them.
        """
        last = len(self.encoder.blocks)
        seen = encoders.visible(self.encoder, images, ids_keep, taps=(1, last))
        first, last = seen["taps"][1], seen["taps"][last]
        first, last = (last, first) if self.config.inject == "reversed" else (first, last)
        x = self.pixel_decoder(seen["tokens"], ids_restore, first)
        x = x.transpose(1, 2).unflatten(2, (self.spec.grid, -1))
        pixels, features = self.pixel_head(x), None
        if self.feature_decoder is not None:
            features = self.feature_head(self.feature_decoder(seen["tokens"], ids_restore, last))
        return pixels, features

    @torch.no_grad()
    def before_step(self, progress) -> None:
        """The keys' bias stays at zero."""
        for block in self.encoder.blocks:
            if block.attn.qkv.bias.grad is not None:
                block.attn.qkv.bias.grad.chunk(3)[1].zero_()

    def after_step(self, progress) -> None:
        if self.teacher is not None:
            self.teacher.follow(self.encoder, self.momentum(progress))
            self.watch.step(progress)

    def momentum(self, progress) -> float:
        """Of the epoch that the step is in."""
        config, done = self.config, int(progress.epoch) / progress.epochs
        first, second = config.momentum_at
        points = (config.momentum, config.momentum_middle, config.momentum_end)
        return float(np.interp(done, (0.0, first, second), points))

    @torch.no_grad()
    def pictures(self, batch: dict) -> dict[str, np.ndarray]:
        """Of at most 8 images: original | what is seen | pixels, predicted where hidden, with the
        true mean and deviation of each patch | the teacher's features | predicted ones, where
        hidden. Colours of features are three principal components, the same for both columns.
        """
        shown = batch["view"][:8]
        generator = torch.Generator().manual_seed(0)

        def drawn(name: str, *shape: int) -> torch.Tensor:
            return torch.rand(len(shown), *shape, generator=generator).to(shown.device)

        ids_keep, ids_restore, mask = self.mask(drawn, 0)
        images = self.spec.normalise(shown)
        pixels, features = self.predict(images, ids_keep, ids_restore)
        _, mean, deviation = self.pixels(shown)
        pixels = (pixels.float() * deviation + mean + 1) / 2
        columns = [shown, paint(shown, mask), paint(shown, mask, pixels)]
        if features is not None:
            both = principal_colours(torch.cat([self.target(images), standardised(features)]))
            wanted, found = F.interpolate(both, size=shown.shape[-2:], mode="nearest").chunk(2)
            columns += [wanted, paint(found, 1 - mask)]
        return {"predictions": contact_sheet(columns)}


def standardised(tokens: torch.Tensor) -> torch.Tensor:
    """Each token (..., D) at mean 0 and biased variance 1, in float32."""
    return F.layer_norm(tokens.float(), tokens.shape[-1:], eps=EPS)

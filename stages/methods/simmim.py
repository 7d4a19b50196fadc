"""SimMIM: a simple framework for masked image modeling (arXiv 2111.09886).

Squares of pixels, larger than patches, are hidden: one learnt token takes the place of their patch
embeddings. All tokens go through the encoder, a ViT or a Swin, and a single linear layer on each
token that comes out predicts the pixels of its place; the loss is the mean absolute error over
hidden pixels.

Follows microsoft/SimMIM, the target normalised by a sliding window microsoft/Swin-Transformer. Its
ViT is BEiT's: one relative-position table shared by all blocks, layer scale 0.1, no absolute
positions; its class token is carried along without a loss of its own. Departures:
- three defaults, since the published ones learn little at small width in few steps; PUBLISHED has
  those. Tables of relative positions have 20 times the rate (`rel_pos_rate`) and are not decayed
  (`rel_pos_decay`), a Swin's, too. A ViT's blocks and patch embedding start as MAE's (`init:
  xavier`); a Swin keeps its own initial weights whatever `init` says. Why: methods/beitv2.py, whose
  encoder is the same;
- masks are pure functions of seed, step and sample; the official ones come from the loader's numpy
  generators;
- ceil(mask_ratio * units) is taken in exact arithmetic instead of floats;
- the count of hidden pixels, never 0, is divided by as it is, not with 1e-5 added: a batch may be
  cut into micro batches;
- crops are resized bicubically, not bilinearly;
- the rate warms up from 0 and ends at min_lr. Officially it starts at a 200th of its peak, lags a
  step behind, and its cosine is not shifted by the warm-up (`schedule: simmim`, `warmup_from`, both
  in PUBLISHED; kit/train/schedule.py). presets/imagenet.yaml fine-tunes by the same schedule;
- without the final norm (`final_norm: false`) the exported encoder still normalises its tokens,
  with weights 1 and 0;
- defaults are for small images: mask_unit is a quarter of the image (8 at 32 px, 16 at 64 px).
  PUBLISHED is the recipe for ImageNet and Swin-B at 192 px over 100 epochs. Over 800 epochs, and
  for ViT-B/16 at 224 px (drop_path 0.1), lr is 1e-4, min_lr 1e-5, warmup 0.0125, lr_drops [0.875].
  SwinV2 has local_norm 47.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from stages.kit.data.views import View
from stages.kit.nets import encoders
from stages.kit.nets.masks import unit_masks
from stages.kit.nets.pictures import contact_sheet, paint
from workflow import checks

TARGET = None
NEEDS = {"mask"}
LABELS = False
TRAINS = True
PUBLISHED = {
    "epochs": 100,
    "batch_size": 2048,
    "mask_ratio": 0.6,
    "mask_unit": 32,
    "init": "published",
    "rel_pos_rate": 1.0,
    "rel_pos_decay": True,
    "crop_min": 0.67,
    "lr": 0.0002,
    "lr_per": 512,
    "min_lr": 4e-05,
    "warmup": 0.1,
    "warmup_from": 0.005,
    "schedule": "simmim",
    "weight_decay": 0.05,
    "betas": [0.9, 0.999],
    "clip": 5.0,
}


@dataclass(frozen=True)
class Config(checks.Optimiser, checks.SizedCrop, checks.BeitEncoder, checks.UnitMasks):
    masked_only: bool = True  # loss over hidden pixels; False: over all
    local_norm: int | None = None  # side of the window that normalises the target; None: raw pixels
    final_norm: bool = True  # the encoder's last norm stands before the head
    drop_path: float = 0.0
    crop_min: float = 0.67
    lr_per: int | None = 512
    min_lr: float = 1e-5
    clip: float | None = 5.0

    def __post_init__(self):
        super().__post_init__()
        checks.within(self, "[0, 1)", "drop_path")
        if self.local_norm is not None and (self.local_norm < 3 or self.local_norm % 2 == 0):
            raise ValueError(
                f"local_norm: found {self.local_norm}, expected an odd number of pixels from 3"
            )


def views(config: Config, spec) -> dict[str, View]:
    return {"view": View(size=spec.image_size, scale=(config.crop_min, 1.0), flip=config.flip)}


class Method(nn.Module):
    def __init__(self, config: Config, spec, target=None):
        super().__init__()
        self.config, self.spec = config, spec
        unit, self.patch = config.unit(spec.image_size), spec.patch
        self.units = spec.image_size // unit  # per side
        self.cell = unit // self.patch  # patches per side of a unit
        self.count = checks.unit_count(self.units**2, config.mask_ratio)
        how = {"init": config.init, "layer_scale": config.layer_scale}
        self.encoder = encoders.create(spec, "beit", drop_path=config.drop_path, **how)
        self.encoder.norm.requires_grad_(config.final_norm)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, self.encoder.embed_dim))
        # the head has torch's initial weights
        self.head = nn.Conv2d(self.encoder.num_features, 3 * spec.stride**2, kernel_size=1)
        self.staged = len(encoders.depths(self.encoder)) > 1  # a Swin
        cut = 2.0 if self.staged else 0.02
        nn.init.trunc_normal_(self.mask_token, std=0.02, a=-cut, b=cut)

    def no_weight_decay(self) -> set[str]:
        """Besides one-dimensional parameters. As run officially, a ViT's mask token is decayed, a
        Swin's is not, nor are a ViT's class token and its absolute positions, where it has any.
        Tables of relative positions, which are decayed officially, are with `rel_pos_decay`.
        """
        names = set() if self.staged else encoders.embeddings(self.encoder)
        if not self.config.rel_pos_decay:
            names |= encoders.relative_positions(self.encoder)
        return {f"encoder.{name}" for name in names} | ({"mask_token"} if self.staged else set())

    def rates(self) -> dict[str, float]:
        """Factors of learning rates: of the tables of relative positions."""
        tables = encoders.relative_positions(self.encoder)
        return {f"encoder.{name}": self.config.rel_pos_rate for name in tables}

    def forward(self, batch: dict, progress) -> dict[str, torch.Tensor]:
        """{"view": (B,3,H,W) in [0,1]} -> {"loss"}, the mean absolute error of (hidden) normalised
        pixels.
        """
        images = self.spec.normalise(batch["view"])
        mask = self.mask(progress.uniform("mask", self.units**2))
        predicted = self.decode(self.encode(images, mask))
        return {"loss": self.loss(predicted.float(), images, mask)}

    def mask(self, noise: torch.Tensor) -> torch.Tensor:
        """Uniform noise (B, units^2) -> bool (B,N) on the grid of the patch embedding, True =
        hidden.
        """
        return unit_masks(noise, self.count, self.cell)

    def encode(self, images: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Normalised images (B,3,H,W), mask (B,N) -> features (B,D,h,w) of all places, h = w =
        spec.grid.
        """
        norm, grid = self.config.final_norm, self.spec.grid
        seen = encoders.masked(self.encoder, images, mask, self.mask_token, norm=norm)
        return seen["patch"].transpose(1, 2).unflatten(2, (grid, grid))

    def decode(self, features: torch.Tensor) -> torch.Tensor:
        """Features (B,D,h,w) -> predicted pixels (B,3,H,W); channel c s^2 + i s + j is pixel (i,j)
        of colour c.
        """
        return F.pixel_shuffle(self.head(features), self.spec.stride)

    def loss(
        self, predicted: torch.Tensor, images: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        """Mean of |predicted - target| over the hidden pixels and the colours; images (B,3,H,W)
        normalised.
        """
        error = (predicted - self.target(images.float())[0]).abs()
        if not self.config.masked_only:
            return error.mean()
        hidden = self.pixels(mask)
        return (error * hidden).sum() / hidden.sum() / error.shape[1]

    def target(
        self, images: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | float, torch.Tensor | float]:
        """Normalised images (B,3,H,W) -> what is predicted, and the mean and deviation taken out of
        them.
        """
        if self.config.local_norm is None:
            return images, 0.0, 1.0
        mean, deviation = local_statistics(images, self.config.local_norm)
        return (images - mean) / deviation, mean, deviation

    def pixels(self, mask: torch.Tensor) -> torch.Tensor:
        """Mask (B,N) of patches -> float (B,1,H,W) of pixels."""
        side = self.spec.image_size // self.patch
        grid = mask.float().unflatten(1, (1, side, side))
        return grid.repeat_interleave(self.patch, dim=2).repeat_interleave(self.patch, dim=3)

    @torch.no_grad()
    def pictures(self, batch: dict) -> dict[str, np.ndarray]:
        """A contact sheet of at most 8 images: original | what the encoder sees | its
        reconstruction.

        Visible pixels are copied from the image. With local_norm the predictions get the mean and
        deviation of the TRUE image's windows, which the model does not know: only their structure
        is its own.
        """
        pixels = batch["view"][:8]
        images = self.spec.normalise(pixels)
        noise = torch.rand(len(images), self.units**2, generator=torch.Generator().manual_seed(0))
        mask = self.mask(noise.to(images.device))
        _, mean, deviation = self.target(images)
        predicted = self.decode(self.encode(images, mask)).float() * deviation + mean
        filled = paint(pixels, mask, self.spec.denormalise(predicted))
        return {"reconstruction": contact_sheet([pixels, paint(pixels, mask), filled])}


def local_statistics(
    images: torch.Tensor, window: int, eps: float = 1e-6
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and sqrt(unbiased variance + eps) of each pixel's surroundings, per channel: two of
    images' shape (B,C,H,W).

    The surroundings are the window x window square (odd) around the pixel, as far as it lies in the
    image.
    """

    def mean(x: torch.Tensor) -> torch.Tensor:  # a rectangle's mean is the mean of its rows' means
        for kernel in ((1, window), (window, 1)):
            padding = tuple(side // 2 for side in kernel)
            x = F.avg_pool2d(x, kernel, stride=1, padding=padding, count_include_pad=False)
        return x

    def inside(size: int) -> torch.Tensor:
        place = torch.arange(size, device=images.device)
        reach = window // 2
        return (place + reach).clamp(max=size - 1) - (place - reach).clamp(min=0) + 1

    centre = mean(images)
    count = (inside(images.shape[2])[:, None] * inside(images.shape[3])).to(images.dtype)
    variance = ((mean(images.square()) - centre.square()) * count / (count - 1)).clamp(min=0)
    return centre, (variance + eps).sqrt()

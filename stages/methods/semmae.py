"""SemMAE: semantic-guided masking for learning masked autoencoders (arXiv 2206.10207).

MAE whose masks follow the parts of an image. At first the same share of every part is hidden, so
that some of each is seen; later whole parts are, and what remains are other parts. The parts are
the codes of a target: of `parts`, which learns them from a ViT as the paper does, of `heads`, its
raw attention, or of `kmeans`.

Follows ucasligang/SemMAE, with these departures:
- the parts are those of the crop that the student sees, found as it goes. The official code reads
  maps of whole images, made once, and so has no crops but flips (`crop_min: 1`, in PUBLISHED);
- masks are pure functions of seed, step and sample. Ties at the border of visible and hidden are
  decided by the patches' random order, officially by an unstable sort;
- ratio times patches is taken in exact arithmetic;
- the released model sees 196 of the 28 x 28 patches of 8 pixels of an image at a time; here all
  patches are one image's grid;
- the schedule counts the run's own epochs, where the official engine has 800 written in it.

`alpha` are the shares of the hard task at the beginning and at the end: (0, 1) as published; (0, 0)
hides the same share of every part, (1, 1) whole parts, (1, 0) goes the wrong way. `masks: random`
is MAE, and "block" has BEiT v2's blocks in the place of parts, both at the same cost. Defaults are
for small images; PUBLISHED is the recipe for ImageNet and ViT-B/16.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from math import floor
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from stages.kit.data.views import View
from stages.kit.eager import eager
from stages.kit.nets.masks import exact_block_masks, random_masking
from stages.kit.nets.pictures import colour_codes, contact_sheet, paint
from stages.kit.parts.autoencoder import Autoencoder
from stages.kit.parts.beit import shown
from workflow import checks

TARGET = {"ids"}
NEEDS = {"drop"}
LABELS = False
TRAINS = True
PUBLISHED = {
    "epochs": 800,
    "batch_size": 4096,
    "mask_ratio": 0.75,
    "alpha": [0.0, 1.0],
    "gamma": 2.0,
    "norm_pix": True,
    "decoder_dim": 512,
    "decoder_depth": 8,
    "decoder_heads": 16,
    "crop_min": 1.0,
    "lr": 0.00015,
    "lr_per": 256,
    "min_lr": 0.0,
    "warmup": 0.05,
    "weight_decay": 0.05,
    "betas": [0.9, 0.95],
}


@dataclass(frozen=True)
class Config(checks.Optimiser, checks.Crop, checks.Decoder):
    mask_ratio: float = 0.75  # share of the patches that is dropped
    masks: Literal["parts", "random", "block"] = "parts"
    alpha: tuple[float, float] = (0.0, 1.0)  # share of whole parts, at first and in the last epoch
    gamma: float = 2.0  # the share rises with this power of the epochs
    min_block: int = 4  # patches in the smallest block, for masks: block
    norm_pix: bool = True  # each patch's pixels at mean 0 and variance 1 are the target
    crop_min: float = 0.4
    lr: float = 1.5e-3
    lr_per: int | None = 512
    betas: tuple[float, float] = (0.9, 0.95)

    def __post_init__(self):
        super().__post_init__()
        checks.within(self, "(0, 1)", "mask_ratio")
        checks.within(self, "[0, 1]", "alpha")
        checks.within(self, "(0, inf)", "gamma", most=1000)
        checks.within(self, "[1, inf)", "min_block")

    def check(self, image_size: int, model) -> None:
        patches = model.grid(image_size) ** 2
        hidden = patches - checks.keep_count(patches, self.mask_ratio)
        if self.masks == "block" and self.min_block > hidden:
            raise ValueError(
                f"min_block: found {self.min_block}, expected at most the {hidden} hidden patches"
            )
        checks.sincos(model)


def views(config: Config, spec) -> dict[str, View]:
    return {"view": View(size=spec.image_size, scale=(config.crop_min, 1.0), flip=config.flip)}


class Method(Autoencoder):
    def __init__(self, config: Config, spec, target):
        super().__init__(config, spec)
        self.keep = checks.keep_count(self.patches, config.mask_ratio)
        self.parts = target  # gives "ids"

    def forward(self, batch: dict, progress) -> dict[str, Tensor]:
        """{"view": (B,3,H,W) in [0,1]} -> {"loss", "alpha", "whole"}.

        whole: of the parts that an image has, how many are hidden altogether.
        """
        ids = self.parts(batch["view"], "ids")["ids"]
        alpha = alpha_of(self.config, progress).to(ids.device)
        ids_keep, ids_restore, mask = self.masks(ids, progress.uniform, alpha)
        images = self.spec.normalise(batch["view"])
        predicted = self.reconstruct(images, ids_keep, ids_restore)
        return {
            "loss": self.error(predicted, images, mask),
            "alpha": alpha.float(),
            "whole": hidden_parts(ids, mask, self.parts.sizes["ids"]),
        }

    def masks(self, ids: Tensor, uniform: Callable[..., Tensor], alpha: Tensor | float):
        """Parts ids (B,N), `uniform` as Progress.uniform -> ids_keep, ids_restore and mask, as
        masks.random_masking gives them.
        """
        noise, config = uniform("mask", self.patches), self.config
        if config.masks == "random":
            return random_masking(noise, self.keep)
        if config.masks == "block":
            grid, count = (self.spec.grid, self.spec.grid), self.patches - self.keep
            flagged = exact_block_masks(uniform, grid, count, config.min_block)
            return chosen(flagged, noise, self.keep)
        count = self.parts.sizes["ids"]
        order = uniform("parts", count)
        return part_masking(ids, count, noise, order, config.mask_ratio, alpha, self.keep)

    @torch.no_grad()
    def pictures(self, batch: dict) -> dict[str, np.ndarray]:
        """parts: of at most 8 images: original | its parts, a colour each | what is seen in the
        first epoch, after a half and three quarters of them and in the last one | a reconstruction
        from that.
        """
        pixels, size = batch["view"][:8], batch["view"].shape[-1]
        ids = self.parts(pixels, "ids")["ids"]
        uniform, seen = shown(len(pixels)), []
        names = {"mask": (self.patches,), "parts": (self.parts.sizes["ids"],)}
        drawn = {name: uniform(name, *shape).to(pixels.device) for name, shape in names.items()}

        def same(name: str, *shape: int) -> Tensor:
            return drawn[name] if name in drawn else uniform(name, *shape).to(pixels.device)

        for share in (0.0, 0.5, 0.75, 1.0):
            alpha = torch.tensor(between(self.config, share), dtype=torch.float64)
            found = self.masks(ids, same, alpha.to(pixels.device))
            seen.append(paint(pixels, found[2]))
        predicted = self.reconstruct(self.spec.normalise(pixels), *found[:2])
        columns = [pixels, colour_codes(ids, size), *seen, self.filled(pixels, predicted, found[2])]
        return {"parts": contact_sheet(columns)}


def between(config: Config, share: float) -> float:
    """alpha when so many of the epochs are done."""
    first, last = config.alpha
    return first + (last - first) * share**config.gamma


@eager  # it reads the epoch
def alpha_of(config: Config, progress) -> Tensor:
    """alpha in this epoch, a float64 scalar on the CPU: the last epoch has the last one."""
    done = min(int(progress.epoch) + 1, progress.epochs)
    return torch.tensor(between(config, done / progress.epochs), dtype=torch.float64, device="cpu")


def part_counts(
    counts: Tensor, order: Tensor, patches: int, ratio: float, alpha: Tensor | float
) -> Tensor:
    """How many patches of each part to hide, float64 (B,P): counts (B,P) of its patches, `order`
    (B,P) noise that says which parts come first, `ratio` of all `patches`.

    By the easy task round(ratio * count) of each part; by the hard one all patches of the first
    parts until floor(ratio * patches) are hidden; alpha is the hard one's share, rounded again.
    Halves are rounded to even.
    """
    counts = counts.double()
    budget = floor(Fraction(str(ratio)) * patches)
    inside = (ratio * counts).round()
    turn = order.argsort(dim=1, stable=True)
    sorted_ = counts.gather(1, turn)
    left = (budget - (sorted_.cumsum(dim=1) - sorted_)).clamp(min=0)
    whole = torch.zeros_like(counts).scatter(1, turn, torch.minimum(sorted_, left))
    easy = 1 - alpha
    return (easy * inside + (1 - easy) * whole).round()


def part_masking(
    ids: Tensor,
    parts: int,
    noise: Tensor,
    order: Tensor,
    ratio: float,
    alpha: Tensor | float,
    keep: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Parts ids (B,N) of patches, noise (B,N) of patches and (B,P) of parts -> ids_keep,
    ids_restore and mask with exactly `keep` visible patches in each row.
    """
    shuffle = noise.argsort(dim=1, stable=True)
    labels = ids.gather(1, shuffle)
    of_part = F.one_hot(labels, parts)  # (B,N,P) in random order
    wanted = part_counts(of_part.sum(dim=1), order, ids.shape[1], ratio, alpha)
    rank = of_part.cumsum(dim=1).gather(2, labels[..., None])[..., 0]  # 1 is a part's first
    flagged = rank <= wanted.gather(1, labels)
    return chosen(torch.zeros_like(flagged).scatter(1, shuffle, flagged), noise, keep)


def chosen(flagged: Tensor, noise: Tensor, keep: int) -> tuple[Tensor, Tensor, Tensor]:
    """Patches that should be hidden, bool (B,N) -> ids_keep, ids_restore and mask: those not
    flagged come first, both by their noise, and the first `keep` are visible.
    """
    shuffle = noise.argsort(dim=1, stable=True)
    by_flag = flagged.gather(1, shuffle).to(torch.uint8).argsort(dim=1, stable=True)
    order = shuffle.gather(1, by_flag)
    ids_restore = order.argsort(dim=1)
    return order[:, :keep], ids_restore, (ids_restore >= keep).to(noise.dtype)


def hidden_parts(ids: Tensor, mask: Tensor, parts: int) -> Tensor:
    """Share of the parts that an image has of which no patch is visible; float32 scalar."""
    of_part = F.one_hot(ids, parts)
    present, visible = of_part.sum(dim=1), (of_part * (1 - mask)[..., None]).sum(dim=1)
    gone = ((present > 0) & (visible == 0)).sum(dim=1)
    return (gone / (present > 0).sum(dim=1)).float().mean()

"""mc-BEiT: multi-choice discretization for image BERT pre-training (arXiv 2203.15371).

BEiT with soft labels. A frozen tokenizer gives each patch of the whole image a distribution P over
its codes. The student's own features of all patches, compared by their cosines, give a matrix W of
which each row is a distribution over the patches; W P is a second target, in which similar patches
share their choices. At hidden patches the student must predict Q = omega W P + (1 - omega) P.

Follows lixiaotong97/mc-BEiT, as released: omega is the share of W P (0.2; in the paper it is that
of P, 0.8), W is not detached (`detach`), and its temperature is 1 (`similarity_temp`), so that W is
nearly uniform and W P close to the mean distribution of the image. Temperatures of P:
- `temp` divides the tokenizer's "logits". 4 is published, for a Gumbel VQGAN of 8192 codes. For
  others it must be found: the curve `choice` shows the entropy of P as a share of ln(codes), which
  is 0 for BEiT's hard labels and 1 where P says nothing; 0.1 to 0.6 is a good range;
- tokenizers that assign patches to the nearest code have no logits of their own. Theirs stand for
  minus the squared distance d^2 to each code, up to what is the same for all codes: P is then
  softmax(-d^2 / temp) for kmeans, and softmax(-d^2 / (2 temp)) for vqkd, whose "logits" are cosines
  of unit vectors. Fit temperatures are far below 1. This is our extension.

Departures:
- W and Q are computed for hidden patches only, against all patches as keys, and the head sees
  hidden patches only: the same loss. All of it is in float32, officially in half precision;
- the sum over hidden patches is divided by the count asked for, as in methods/beit.py; with random
  masks (published, exactly 147 of 196) that is how many are hidden;
- random masks hide mask_ratio of the patches, rounded; officially it is cut to an integer. 0.75
  gives 147 of 196, as published, `masks: block` with 0.3827 the script's default, at most 75;
- the temperature is constant, as published (the official schedule ends where it starts);
- of the encoder, its initial weights, rates and decay: as methods/beit.py, which gives reasons;
- masks and crops are pure functions of seed and step;
- the tokenizer sees the student's pixels, see methods/beit.py;
- defaults are for small images; PUBLISHED is the recipe for ImageNet and ViT-B/16 (ViT-L:
  layer_scale 1e-5).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F

from stages.kit.nets.masks import take, unit_masks
from stages.kit.nets.pictures import contact_sheet, paint
from stages.kit.parts.beit import TokenStudent, hidden, mean_over_hidden, shown, views
from workflow import checks

__all__ = ["Config", "Method", "views"]

TARGET = {"logits"}
NEEDS = {"mask", "cls"}
LABELS = False
TRAINS = True
PUBLISHED = {
    "epochs": 800,
    "batch_size": 2048,
    "masks": "random",
    "mask_ratio": 0.75,
    "temp": 4.0,
    "omega": 0.2,
    "similarity_temp": 1.0,
    "detach": False,
    "layer_scale": 0.1,
    "init": "published",
    "rel_pos_rate": 1.0,
    "rel_pos_decay": True,
    "drop_path": 0.1,
    "crop_min": 0.08,
    "jitter": 0.0,
    "lr": 0.0015,
    "lr_per": None,
    "min_lr": 1e-05,
    "warmup": 0.0125,
    "schedule": "beit",
    "weight_decay": 0.05,
    "betas": [0.9, 0.98],
    "clip": 3.0,
}


@dataclass(frozen=True)
class Config(checks.TokenPrediction):
    masks: Literal["random", "block"] = "random"  # single patches, or BEiT's blocks
    mask_ratio: float = 0.75
    temp: float = 1.0  # of the tokenizer's distribution P
    omega: float = 0.2  # share of W P in the target
    similarity_temp: float = 1.0  # of the student's similarities W
    detach: bool = False  # no gradient through W
    jitter: float = 0.0
    betas: tuple[float, float] = (0.9, 0.98)

    def __post_init__(self):
        super().__post_init__()
        checks.within(self, "(0, inf)", "temp", "similarity_temp")
        checks.within(self, "[0, 1]", "omega")

    def check(self, image_size: int, model) -> None:
        checks.hidden_count(model.grid(image_size) ** 2, self.mask_ratio)
        if self.masks == "block":
            super().check(image_size, model)


class Method(TokenStudent):
    def __init__(self, config: Config, spec, target):
        super().__init__(config, spec, target, target.sizes["logits"])
        self.start()

    def forward(self, batch: dict, progress) -> dict[str, torch.Tensor]:
        """{"view": (B,3,H,W) in [0,1]} -> {"loss"; and, means over the hidden patches: "mim_loss",
        the cross-entropy; "divergence" of the student from the target; "mim_accuracy", share whose
        likeliest code is P's; "choice", the entropy of P as a share of ln(codes)}.
        """
        images = batch["view"]
        chances = self.chances(images)  # (B,N,K), of the whole view
        mask = self.mask(progress.uniform)
        ids, weight = hidden(mask, self.count)  # (B,n) each
        features = self.features(self.spec.normalise(images), mask)  # (B,N,D)
        log_q = self.head(take(features, ids)).float().log_softmax(dim=-1)  # (B,n,K)
        wanted = self.targets(features, chances, ids)  # (B,n,K)
        entropy = -(wanted * log_q).sum(dim=-1)
        with torch.no_grad():
            own = take(chances, ids)
            right = (log_q.argmax(dim=-1) == own.argmax(dim=-1)).float()
            divergence = entropy - torch.special.entr(wanted).sum(dim=-1)
            choice = torch.special.entr(own).sum(dim=-1) / math.log(own.shape[-1])
        return {
            "loss": (entropy * weight).mean(),
            "mim_loss": mean_over_hidden(entropy.detach(), weight),
            "divergence": mean_over_hidden(divergence, weight),
            "mim_accuracy": mean_over_hidden(right, weight),
            "choice": mean_over_hidden(choice, weight),
        }

    def chances(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B,3,H,W) in [0,1] -> P, the tokenizer's distributions (B,N,K), float32."""
        logits = self.tokenizer(images, "logits")["logits"].float()
        return (logits / self.config.temp).softmax(dim=-1)

    def mask(self, uniform: Callable[..., torch.Tensor]) -> torch.Tensor:
        """Which patches are hidden, bool (B,N): exactly `count` at random, or at most in blocks."""
        if self.config.masks == "block":
            return self.blocks(uniform)
        return unit_masks(uniform("mask", self.spec.grid**2), self.count, cell=1)

    def similarity(self, features: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Features (B,N,D) -> rows `ids` (B,n) of W, (B,n,N): softmax of cosines with all patches,
        the patch itself and visible ones included.
        """
        with torch.autocast(features.device.type, enabled=False):
            unit = F.normalize(features.float(), dim=-1)
            cosines = take(unit, ids) @ unit.transpose(1, 2)
            return (cosines / self.config.similarity_temp).softmax(dim=-1)

    def targets(
        self, features: torch.Tensor, chances: torch.Tensor, ids: torch.Tensor
    ) -> torch.Tensor:
        """Features (B,N,D) and P (B,N,K) -> Q at positions ids (B,n), (B,n,K)."""
        own, omega = take(chances, ids), self.config.omega
        if not omega:
            return own
        weights = self.similarity(features.detach() if self.config.detach else features, ids)
        with torch.autocast(features.device.type, enabled=False):
            return omega * (weights @ chances) + (1 - omega) * own

    @torch.no_grad()
    def pictures(self, batch: dict) -> dict[str, np.ndarray]:
        """Of at most 8 images: those of TokenStudent.sheets, and

        choices: image | masked | at hidden patches: entropy of P | of Q, black 0, white ln(codes);
        similarity: image, one hidden patch in white | its row of W, black the least, white the
        largest of other patches | the same of the codes that P gives, sum_k P_ik P_jk.
        """
        images = batch["view"][:8]
        mask = self.mask(shown(len(images))).to(images.device)
        ids, _ = hidden(mask, self.count)
        features, chances = self.features(self.spec.normalise(images), mask), self.chances(images)
        predicted = self.head(take(features, ids)).argmax(dim=-1)
        found = self.sheets(images, chances.argmax(dim=-1), mask, ids, predicted)
        seen, columns = paint(images, mask), []
        for each in (take(chances, ids), self.targets(features, chances, ids)):
            entropy = torch.special.entr(each).sum(dim=-1) / math.log(each.shape[-1])
            shares = torch.zeros_like(mask, dtype=torch.float32).scatter(1, ids, entropy.float())
            columns.append(paint(self.map(shares), ~mask))
        found["choices"] = contact_sheet([images, seen, *columns])
        middle = ids[:, ids.shape[1] // 2, None]  # (B,1)
        place = torch.zeros_like(mask).scatter(1, middle, True)
        same = (take(chances, middle) @ chances.transpose(1, 2))[:, 0]
        rows = (self.similarity(features, middle)[:, 0], same)
        maps = [paint(self.map(between(row, place)), place, 1.0) for row in rows]
        found["similarity"] = contact_sheet([paint(images, place, 1.0), *maps])
        return found

    def map(self, values: torch.Tensor) -> torch.Tensor:
        """Numbers (B,N) of patches in [0,1] -> grey pictures (B,3,H,W)."""
        grids = values.unflatten(1, (1, *self.grid)).expand(-1, 3, -1, -1)
        return F.interpolate(grids, size=self.spec.image_size, mode="nearest")


def between(values: torch.Tensor, left_out: torch.Tensor) -> torch.Tensor:
    """values (B,N) scaled so that those where left_out (B,N) is False lie between 0 and 1."""
    low = values.masked_fill(left_out, torch.inf).amin(dim=1, keepdim=True)
    high = values.masked_fill(left_out, -torch.inf).amax(dim=1, keepdim=True)
    return ((values - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)

"""BEiT: BERT pre-training of image transformers (arXiv 2106.08254), the student.

A ViT sees the image with blocks of patches replaced by a mask token and classifies, at each hidden
patch, the code that a frozen tokenizer gives to that patch of the whole image. The published
tokenizer is DALL-E's (stages/targets/dalle.py, or dvae.py for one that is trained here); with vqkd,
kmeans or any other one it is the same student.

Follows microsoft/unilm (beit). Encoder, decay groups and `init: published` are those of its ViT-B;
kit/nets/masks.py has its masks, which hide at most, not exactly, the count asked for. Departures:
- the sum of the cross-entropies is divided by that count and the images, not by how many patches
  are hidden: at 14x14 by 75, where 74.5 are. The factor is nearly the same in every step, images
  weigh against each other as published (one with more hidden patches more), and a batch may be cut.
  `mim_loss` is the published mean;
- three defaults, since the published ones learn little at small width in few steps: `init`,
  `rel_pos_rate`, `rel_pos_decay`. methods/beitv2.py gives the reasons; PUBLISHED has those;
- the tokenizer sees the student's pixels. Officially it gets the same crop of the stored image,
  resized for itself: 112 pixels by Lanczos for 224 by a bicubic filter. A tokenizer whose own
  resolution is another makes it from the student's pixels, by Lanczos (kit/nets/resize.py);
- masks and crops are pure functions of seed and step; the official ones come from unseeded
  generators;
- colours are jittered after the crop, not before (contrast then refers to the mean grey of the
  crop);
- `mask_ratio` is rounded to a count of patches; 0.3827 gives the official 75 of 196;
- defaults are for small images; PUBLISHED is the recipe for ImageNet-1k and ViT-B/16 (ViT-L:
  layer_scale 1e-5).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from stages.kit.nets.masks import take
from stages.kit.parts.beit import TokenStudent, hidden, mean_over_hidden, shown, views
from workflow import checks

__all__ = ["Config", "Method", "views"]

TARGET = {"ids"}
NEEDS = {"mask", "cls"}
LABELS = False
TRAINS = True
PUBLISHED = {
    "epochs": 800,
    "batch_size": 2048,
    "mask_ratio": 0.3827,
    "min_block": 16,
    "layer_scale": 0.1,
    "init": "published",
    "rel_pos_rate": 1.0,
    "rel_pos_decay": True,
    "drop_path": 0.1,
    "crop_min": 0.08,
    "jitter": 0.4,
    "lr": 0.0015,
    "lr_per": None,
    "min_lr": 1e-05,
    "warmup": 0.0125,
    "schedule": "beit",
    "weight_decay": 0.05,
    "betas": [0.9, 0.999],
    "clip": 3.0,
}


@dataclass(frozen=True)
class Config(checks.TokenPrediction):
    pass


class Method(TokenStudent):
    def __init__(self, config: Config, spec, target):
        super().__init__(config, spec, target, target.sizes["ids"])
        self.start()

    def forward(self, batch: dict, progress) -> dict[str, torch.Tensor]:
        """{"view": (B,3,H,W) in [0,1]} -> {"loss", "mim_loss": mean cross-entropy over the hidden
        patches, "mim_accuracy": share of them whose code is right}.
        """
        images = batch["view"]
        codes = self.tokenizer(images, "ids")["ids"]  # (B,N), of the whole view
        mask = self.blocks(progress.uniform)
        ids, weight = hidden(mask, self.count)  # (B,n) each
        logits = self.predict(self.spec.normalise(images), mask, ids).float()
        labels = codes.gather(1, ids)
        entropy = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")  # (B,n)
        right = (logits.detach().argmax(dim=-1) == labels).float()
        return {
            "loss": (entropy * weight).mean(),
            "mim_loss": mean_over_hidden(entropy.detach(), weight),
            "mim_accuracy": mean_over_hidden(right, weight),
        }

    def predict(self, images: torch.Tensor, mask: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Normalised images, bool mask (B,N), positions ids (B,n) -> logits there (B,n,codes)."""
        return self.head(take(self.features(images, mask), ids))

    @torch.no_grad()
    def pictures(self, batch: dict) -> dict[str, np.ndarray]:
        """Of at most 8 images, see TokenStudent.sheets."""
        images = batch["view"][:8]
        mask = self.blocks(shown(len(images))).to(images.device)
        ids, _ = hidden(mask, self.count)
        predicted = self.predict(self.spec.normalise(images), mask, ids).argmax(dim=-1)
        codes = self.tokenizer(images, "ids")["ids"]
        return self.sheets(images, codes, mask, ids, predicted)

"""iBOT: image BERT pre-training with online tokenizer (arXiv 2111.07832).

DINO between crops, and masked image modelling beside it: the student sees the two global crops with
blocks of patches replaced by a learnt token; at the hidden patches its distribution over prototypes
must match that of its moving average for the same patch of the same crop, unmasked. The teacher's
head is a tokenizer that is learnt meanwhile. The teacher's encoder is what is exported.

Follows bytedance/ibot, with the departures of DINO's training (kit/parts/selfdistil.py), of the two
losses and the masks (kit/parts/ibot.py, which AttMask shares); Swin is not supported.
Defaults are for small images and short runs; they are DINO's (docs/results-dino.md), and the loss
at hidden patches has a tenth of its weight (docs/results-attmask.md). PUBLISHED is the recipe for
ImageNet and ViT-S/16. A step sees two large and n_local small crops of each image: compare it with
single-view methods by the crops seen, or by cost.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from stages.kit.parts.ibot import MaskedSelfDistillation
from stages.kit.parts.selfdistil import GLOBAL, global_views, views
from workflow import checks

__all__ = ["Config", "Method", "views"]

TARGET = None
NEEDS = {"mask", "cls", "attention", "sizes"}
LABELS = False
TRAINS = True
PUBLISHED = {
    "epochs": 800,
    "batch_size": 1024,
    "mask": "block",
    "mask_share": 0.5,
    "mask_ratio": [0.1, 0.5],
    "patch_weight": 1.0,
    "shared_head": True,
    "prototypes": 8192,
    "hidden": 2048,
    "bottleneck": 256,
    "norm_last": False,
    "freeze_last_layer": 1.0,
    "centring": "centre",
    "teacher_temp": 0.04,
    "teacher_temp_end": 0.07,
    "teacher_temp_warmup": 0.0375,
    "momentum": 0.996,
    "drop_path": 0.1,
    "n_local": 10,
    "local_size": 0.43,
    "global_scale": [0.25, 1.0],
    "local_scale": [0.05, 0.25],
    "lr": 0.0005,
    "lr_per": 256,
    "min_lr": 1e-06,
    "warmup": 0.0125,
    "schedule": "beit",
    "weight_decay": 0.04,
    "weight_decay_end": 0.4,
    "clip": 3.0,
    "clip_mode": "tensor",
    "patch_temp_end": 0.07,
}


@dataclass(frozen=True)
class Config(checks.MaskedSelfDistillation):
    mask: Literal["block", "random"] = "block"


class Method(MaskedSelfDistillation):
    def __init__(self, config: Config, spec, target=None):
        super().__init__(config, spec, most=int(spec.grid**2 * config.mask_ratio[1]))

    def forward(self, batch: dict, progress) -> dict[str, torch.Tensor]:
        """{"global1", "global2", "local1", ...: (B,3,h,w) in [0,1]} -> {"loss", its two parts,
        entropies of the teacher's distributions, "divergence" of the student from them}.
        """
        large = global_views(batch)  # (2B,3,H,W)
        masks = [self.masks(progress.uniform, view, self.config.mask_share) for view in GLOBAL]
        return self.losses(large, torch.cat(masks), self.look(large), batch, progress)

    def masks(self, uniform: Callable[..., torch.Tensor], view: str, share: float) -> torch.Tensor:
        """Which patches of a view are hidden, bool (B,N); see `drawn` of kit/parts/ibot.py."""
        return self.drawn(uniform, view, share, self.config.mask)

    @torch.no_grad()
    def pictures(self, batch: dict) -> dict[str, np.ndarray]:
        """The contact sheets of `masked_pictures`, of at most 8 images."""
        images = batch["view"][:8]
        generator = torch.Generator().manual_seed(0)

        def drawn(name: str, *shape: int) -> torch.Tensor:
            return torch.rand(len(images), *shape, generator=generator)

        return self.masked_pictures(images, self.masks(drawn, "shown", 1.0).to(images.device))

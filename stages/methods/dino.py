"""DINO: self-distillation with no labels (arXiv 2104.14294).

A student and its exponential moving average, the teacher, see different crops of an image and map
them to distributions over learnt prototypes; the student must match the teacher's centred and
sharpened distribution for another crop. Nothing is masked: this is the baseline of iBOT. The
teacher's encoder is what is exported, as the official code evaluates it.

The training, and its departures from facebookresearch/dino, are in kit/parts/selfdistil.py, which
the target of the same name shares. Defaults are for small images and short runs, which learned most
with them (docs/results-dino.md); PUBLISHED is the recipe for ImageNet and ViT-S/16. A step sees two
large and n_local small crops of each image: compare it with single-view methods by the crops seen,
or by cost.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from stages.kit.nets.pictures import contact_sheet
from stages.kit.parts.selfdistil import SelfDistillation, feature_columns, views
from workflow import checks

__all__ = ["Config", "Method", "views"]

TARGET = None
NEEDS = {"cls", "attention", "sizes"}
LABELS = False
TRAINS = True
PUBLISHED = {
    "epochs": 300,
    "batch_size": 1024,
    "prototypes": 65536,
    "hidden": 2048,
    "bottleneck": 256,
    "norm_last": False,
    "freeze_last_layer": 1.0,
    "centring": "centre",
    "teacher_temp": 0.04,
    "teacher_temp_end": 0.07,
    "teacher_temp_warmup": 0.1,
    "momentum": 0.996,
    "drop_path": 0.1,
    "n_local": 8,
    "local_size": 0.43,
    "global_scale": [0.4, 1.0],
    "local_scale": [0.05, 0.4],
    "lr": 0.0005,
    "lr_per": 256,
    "min_lr": 1e-06,
    "warmup": 0.0333,
    "schedule": "beit",
    "weight_decay": 0.04,
    "weight_decay_end": 0.4,
    "clip": 3.0,
    "clip_mode": "tensor",
}


@dataclass(frozen=True)
class Config(checks.SelfDistillation):
    pass


class Method(SelfDistillation):
    def __init__(self, config: Config, spec, target=None):
        super().__init__(config, spec)

    @torch.no_grad()
    def pictures(self, batch: dict) -> dict[str, np.ndarray]:
        """Of at most 8 images: image | principal components of patch tokens | class attention."""
        images = batch["view"][:8]
        return {"features": contact_sheet([images, *feature_columns(self.teacher, images)])}

"""MoCo v3: momentum contrast for vision transformers (arXiv 2104.02057).

Of two views of an image one makes a query, the other a key, which comes from a moving average of
the network; each query must pick the key of its own image among those of the whole batch. Nothing
is masked: this is a contrastive baseline. The encoder of the queries is what is exported.

The training, and its departures from facebookresearch/moco-v3, are in kit/parts/contrast.py, which
the target of the same name shares. Defaults are for small images and short runs; PUBLISHED is the
recipe for ImageNet and both its encoders, ViT-B/16 and a ViT-S/16 with 12 heads. Weights for 6
heads have the same shapes and mean something else: a model of this size needs `num_heads: 12`. A
step sees two views of each image: compare it with single-view methods by the views seen, or by
cost.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from stages.kit.parts import contrast
from stages.kit.parts.contrast import MomentumContrast, views
from workflow import checks

__all__ = ["Config", "Method", "views"]

TARGET = None
NEEDS = {"cls", "attention"}
LABELS = False
TRAINS = True
PUBLISHED = {
    "epochs": 300,
    "batch_size": 4096,
    "hidden": 4096,
    "dim": 256,
    "temperature": 0.2,
    "momentum": 0.99,
    "freeze_patches": True,
    "crop_min": 0.08,
    "lr": 1.5e-4,
    "lr_per": 256,
    "warmup": 0.1333,
    "schedule": "mae",
    "weight_decay": 0.1,
}


@dataclass(frozen=True)
class Config(checks.MomentumContrast):
    pass


class Method(MomentumContrast):
    def __init__(self, config: Config, spec, target=None):
        super().__init__(config, spec)

    def pictures(self, batch: dict) -> dict[str, np.ndarray]:
        """features, nearest and similarity of kit/parts/contrast.py."""
        return contrast.pictures(self.query, batch["view"], batch.get("gallery"))

"""MoCo v3: momentum contrast (arXiv 2104.02057), as a teacher that is trained here.

Of two views of an image one makes a query, the other a key, which comes from a moving average of
the network; each query must pick the key of its own image among those of the whole batch. The
encoder of the queries is what is kept. It gives its patch tokens and its class token, always after
the final norm, the attention of its class token, and states after blocks, which PeCo's tokenizer
(`perceptual`) compares pictures by.

The training, and its departures from facebookresearch/moco-v3, are in kit/parts/contrast.py, which
the method of the same name shares. Defaults are for small images and short runs; PUBLISHED is the
recipe for ImageNet and both its encoders, ViT-B/16 and a ViT-S/16 with 12 heads (`num_heads: 12`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from stages.kit.parts import contrast
from stages.kit.parts import health as measure
from stages.kit.parts.contrast import ADVICE, MomentumContrast, QueryEncoder, views
from workflow import checks

__all__ = ["Config", "Target", "Training", "health", "pictures", "views"]

PRODUCES = {"patch", "cls", "attention", "layers"}
UPSTREAM = None
NEEDS = {"cls", "attention"}
LABELS = False
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
    min_rank: float = 4.0  # effective rank of the features; below, the stage fails


Target = QueryEncoder


class Training(MomentumContrast):
    def __init__(self, config: Config, spec, upstream=None):
        super().__init__(config, spec)

    @property
    def target(self) -> QueryEncoder:
        return self.query


@torch.no_grad()
def health(target: QueryEncoder, images, config: Config) -> dict:
    """Over the validation images: effective rank and spread of patch and class tokens. And what
    the queries told of their keys at the end of the training, as a share of ln(batch size).
    """
    patches, tokens = [], []
    for batch in images:
        found = target(batch, "patch", "cls")
        patches.append(measure.sample_rows([found["patch"]]))
        tokens.append(found["cls"].cpu())
        if sum(map(len, patches)) >= measure.ROWS:
            break
    patches, tokens = torch.cat(patches)[: measure.ROWS], torch.cat(tokens)
    rank, spread = measure.effective_rank(patches), measure.spread(patches)
    information = float(target.information)
    problems = measure.feature_problems(rank, spread, config.min_rank, ADVICE)
    if config.min_information > 0 and not information >= config.min_information:
        problems.append(
            f"the queries do not know their keys: they tell {information:.4f} of ln(batch), "
            f"expected at least {config.min_information:g} (min_information). {ADVICE}"
        )
    return {
        "rank": rank,
        "spread": spread,
        "cls_rank": measure.effective_rank(tokens),
        "cls_spread": measure.spread(tokens),
        "information": information,
        "problems": problems,
    }


def pictures(target: QueryEncoder, images: torch.Tensor) -> dict[str, np.ndarray]:
    """features, nearest and similarity of kit/parts/contrast.py."""
    return contrast.pictures(target, images)

"""DINO: self-distillation with no labels (arXiv 2104.14294), as a teacher that is trained here.

A student and its exponential moving average see different crops of an image and map them to
distributions over learnt prototypes; the student must match the average's centred and sharpened
distribution for another crop. The average (the teacher) is what is kept. It gives its patch tokens
and its class token, always after the final norm, and the attention of its class token.

The training, and its departures from facebookresearch/dino, are in kit/parts/selfdistil.py, which
the method of the same name shares. Defaults are for small images and short runs, which learned most
with them (docs/results-dino.md); PUBLISHED is the recipe for ImageNet and ViT-S/16.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from stages.kit.nets.pictures import contact_sheet
from stages.kit.parts import health as measure
from stages.kit.parts.collapse import ADVICE, kind
from stages.kit.parts.selfdistil import MomentumTeacher, SelfDistillation, feature_columns, views
from workflow import checks

__all__ = ["Config", "Target", "Training", "health", "pictures", "views"]

PRODUCES = {"patch", "cls", "attention"}
UPSTREAM = None
NEEDS = {"cls", "attention", "sizes"}
LABELS = False
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

Target = MomentumTeacher  # head and centre are kept to judge its health


@dataclass(frozen=True)
class Config(checks.SelfDistillation):
    min_rank: float = 4.0  # effective rank of the features; below, the stage fails


class Training(SelfDistillation):
    def __init__(self, config: Config, spec, upstream=None):
        super().__init__(config, spec)

    @property
    def target(self) -> MomentumTeacher:
        return self.teacher


@torch.no_grad()
def health(target: MomentumTeacher, images, config: Config) -> dict:
    """Over the validation images: effective rank and spread of patch and class tokens, and of the
    prototypes' shares the mean entropy (the uniform one has ln K) and the mutual information with
    the images, in nats.
    """
    patches, tokens, shares = [], [], []
    end = config.teacher_temp_end
    temperature = config.teacher_temp if end is None else end
    for batch in images:
        found = target.features(batch)
        patches.append(measure.sample_rows([found["patch"]]))
        tokens.append(found["cls"].cpu())
        shares.append(target.centre.sharpen(target.head(found["cls"]), temperature).cpu())
        if sum(map(len, patches)) >= measure.ROWS:
            break
    patches, tokens, shares = torch.cat(patches), torch.cat(tokens), torch.cat(shares)
    patches = patches[: measure.ROWS]
    rank, spread = measure.effective_rank(patches), measure.spread(patches)
    entropy, information = measure.information(shares)
    most = float(np.log(config.prototypes))
    problems = measure.feature_problems(rank, spread, config.min_rank, ADVICE)
    if not information >= config.min_information * most:
        problems.append(
            f"the teacher's outputs have collapsed ({kind(entropy, config.prototypes)}): their "
            f"mutual information with the images is {information:.4f} nats, expected at least "
            f"{config.min_information * most:.4f} (min_information); their entropy is "
            f"{entropy:.3f} of {most:.3f}. {ADVICE}"
        )
    return {
        "rank": rank,
        "spread": spread,
        "cls_rank": measure.effective_rank(tokens),
        "cls_spread": measure.spread(tokens),
        "entropy": entropy,
        "uniform_entropy": most,
        "information": information,
        "problems": problems,
    }


@torch.no_grad()
def pictures(target: MomentumTeacher, images: torch.Tensor) -> dict[str, np.ndarray]:
    """features: images | principal components of patch tokens | attention of the class token."""
    return {"features": contact_sheet([images, *feature_columns(target, images)])}

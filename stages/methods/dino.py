"""DINO: self-distillation with no labels (arXiv 2104.14294).

A student and its exponential moving average, the teacher, see different crops of an image and map
them to distributions over learnt prototypes; the student must match the teacher's centred and
sharpened distribution for another crop. Nothing is masked: this is the baseline of iBOT. The
teacher's encoder is what is exported, as the official code evaluates it.

The training, and its departures from facebookresearch/dino, are in kit/parts/selfdistil.py, which
the target of the same name shares. Defaults are for small images; presets/dino.yaml has the
published recipe for ImageNet and ViT-S/16. A step sees two large and n_local small crops of each
image: compare it with single-view methods by the crops seen, or by cost.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from stages.kit.nets.patches import contact_sheet
from stages.kit.parts.selfdistil import SelfDistillation, feature_columns, views
from workflow import checks

__all__ = ["Config", "Method", "views"]

TARGET = None
LABELS = False
TRAINS = True


@dataclass(frozen=True)
class Config:
    prototypes: int = 2048
    hidden: int = 512
    bottleneck: int = 128
    norm_last: bool = True  # the last layer's gains stay at 1
    freeze_last_layer: float = 1.0  # epochs in which the last layer rests
    student_temp: float = 0.1
    teacher_temp: float = 0.04
    teacher_temp_end: float | None = None  # reached linearly; None: constant
    teacher_temp_warmup: float = 0.1  # share of the training until teacher_temp_end
    centre_momentum: float = 0.9
    momentum: float = (
        0.99  # of the teacher; rises to 1 as a cosine. Fewer steps per epoch want less
    )
    drop_path: float = 0.1  # of the student
    n_local: int = 4  # local crops
    local_size: float = 0.5  # side of a local crop, share of the image's, rounded to whole patches
    global_scale: tuple[float, float] = (0.4, 1.0)  # share of the area
    local_scale: tuple[float, float] = (0.1, 0.4)
    flip: float = 0.5
    jitter: tuple[float, float, float, float] = (
        0.4,
        0.4,
        0.2,
        0.1,
    )  # brightness, contrast, saturation, hue
    jitter_p: float = 0.8
    grey: float = 0.2
    solarise: float = 0.2  # of the second global view
    # always in the first global view, 10 % of the second, half of the local ones; never below 64
    # pixels
    blur: bool = True
    # that prototypes tell of an image, share of ln(prototypes); stays it below, the run stops
    min_information: float = 0.01
    lr: float = 5e-4  # at batch lr_per
    lr_per: int | None = 256
    min_lr: float = 1e-6
    warmup: float = 0.1  # share of all steps
    weight_decay: float = 0.04
    weight_decay_end: float | None = 0.4
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float | None = 3.0
    clip_mode: Literal["global", "tensor"] = "tensor"

    @property
    def views(self) -> float:
        """Crops that a step learns from, in areas of a large one; effective epochs count them."""
        return 2 + self.n_local * self.local_size**2

    def __post_init__(self):
        checks.self_distillation(self)
        checks.within(self, "[0, 1]", "drop_path")


class Method(SelfDistillation):
    def __init__(self, config: Config, spec, target=None):
        super().__init__(config, spec)

    @torch.no_grad()
    def pictures(self, batch: dict) -> dict[str, np.ndarray]:
        """Of at most 8 images: image | principal components of the patch tokens | attention of the
        class token.
        """
        images = batch["view"][:8]
        return {"features": contact_sheet([images, *feature_columns(self.teacher, images)])}

"""DINO: self-distillation with no labels (arXiv 2104.14294), as a teacher of features that is
trained in the pipeline.

A student and its exponential moving average see different crops of an image and map them to
distributions over learnt prototypes; the student must match the average's centred and sharpened
distribution for another crop. The average (the teacher) is what is kept: its patch tokens after the
final norm are the features.

The training, and its departures from facebookresearch/dino, are in kit/parts/selfdistil.py, which
the method of the same name shares. Defaults are for small images. As published, for ImageNet and
ViT-S/16 (300 epochs, batch 1024): prototypes 65536, hidden 2048, bottleneck 256, teacher_temp 0.04
rising to 0.07 over 10 % of the training, momentum 0.996, norm_last false, local_size 0.43,
local_scale (0.05, 0.4), n_local 8; blur sigma up to 2 at 224 pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from stages.kit.nets.patches import contact_sheet
from stages.kit.parts import health as measure
from stages.kit.parts.collapse import ADVICE, kind
from stages.kit.parts.selfdistil import MomentumTeacher, SelfDistillation, feature_columns, views
from workflow import checks

__all__ = ["Config", "Target", "Training", "health", "pictures", "views"]

UPSTREAM = None
PRODUCES = "features"
LABELS = False


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
    min_rank: float = (
        4.0  # effective rank of the features, over the validation images; below, the stage fails
    )
    min_information: float = (
        0.01  # that the prototypes carry about an image, as a share of ln(prototypes)
    )
    lr: float = 5e-4  # at batch lr_per
    lr_per: int | None = 256
    min_lr: float = 1e-6
    warmup: float = 0.1  # share of all steps
    weight_decay: float = 0.04
    weight_decay_end: float | None = 0.4
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float | None = 3.0
    clip_mode: Literal["global", "tensor"] = "tensor"

    def __post_init__(self):
        checks.self_distillation(self)


class Target(MomentumTeacher):
    """The teacher: images -> its patch tokens. `dim` is their width. Head and centre are kept to
    judge its health.
    """

    def __init__(self, config: Config, spec):
        super().__init__(config, spec)
        self.dim = self.encoder.embed_dim

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(B,3,H,W) in [0,1] -> patch tokens (B,N,D). ValueError for pixels outside of [0,1]."""
        return self.features(images)["patch"]


class Training(SelfDistillation):
    def __init__(self, config: Config, spec, upstream=None):
        super().__init__(config, spec, Target)

    @property
    def target(self) -> Target:
        return self.teacher


@torch.no_grad()
def health(target: Target, images, config: Config) -> dict:
    """Over the validation images: effective rank and spread of patch and class tokens; entropy of
    the prototypes' shares (nats, the uniform one has ln K) and what they tell about an image.
    """
    patches, tokens, shares = [], [], []
    temperature = (
        config.teacher_temp if config.teacher_temp_end is None else config.teacher_temp_end
    )
    for batch in images:
        found = target.features(batch)
        patches.append(measure.sample_rows([found["patch"]]))
        tokens.append(found["cls"].cpu())
        shares.append(target.centre.sharpen(target.head(found["cls"]), temperature).cpu())
        if sum(map(len, patches)) >= measure.ROWS:
            break
    patches, tokens, shares = (
        torch.cat(patches)[: measure.ROWS],
        torch.cat(tokens),
        torch.cat(shares),
    )
    rank, spread = measure.effective_rank(patches), measure.spread(patches)
    entropy, information = measure.information(shares)
    most = float(np.log(config.prototypes))
    problems = measure.feature_problems(rank, spread, config.min_rank, ADVICE)
    if not information >= config.min_information * most:
        problems.append(
            f"the teacher's outputs have collapsed ({kind(entropy, config.prototypes)}): they tell {information:.4f} nats "
            f"about an image, expected at least {config.min_information * most:.4f} (min_information); their entropy is "
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
def pictures(target: Target, images: torch.Tensor) -> dict[str, np.ndarray]:
    """features: images | principal components of the patch tokens | attention of the class token."""
    return {"features": contact_sheet([images, *feature_columns(target, images)])}

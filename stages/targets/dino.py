"""DINO: self-distillation with no labels (arXiv 2104.14294), as a teacher of features that is trained in the pipeline.

A student and its exponential moving average see different crops of an image and map them to distributions over learnt
prototypes; the student must match the average's centred and sharpened distribution for another crop. The average (the
teacher) is what is kept: its patch tokens after the final norm are the features.

Follows facebookresearch/dino. Departures:
- schedules of temperature, and the epochs in which the last layer rests, count in shares of the training and in epochs, per
  step; the official temperature changes once per epoch;
- centre and teacher move once per optimiser step, from all its micro batches (the same without gradient accumulation);
- gradients are dropped in the last layer before they are clipped, not after; clipping is per tensor, so it is the same;
- position embeddings for local crops are resized by timm, with antialiasing, which the official code does not use;
- the order of operations in a view is kit/views.py's: crop, flip, colours, grey, blur, solarise;
- defaults are for small images. As published, for ImageNet and ViT-S/16 (300 epochs, batch 1024): prototypes 65536,
  hidden 2048, bottleneck 256, teacher_temp 0.04 rising to 0.07 over 10 % of the training, momentum 0.996, norm_last false,
  local_size 0.43, local_scale (0.05, 0.4), n_local 8; blur sigma up to 2 at 224 pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from stages.kit import ema, schedule
from stages.kit import encoder as kit
from stages.kit import health as measure
from stages.kit.patches import contact_sheet
from stages.kit.prototypes import Centre, Head, multi_view_loss
from stages.kit.views import View

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
    momentum: float = 0.99  # of the teacher; rises to 1 as a cosine. Fewer steps per epoch want less
    drop_path: float = 0.1  # of the student
    n_local: int = 4  # local crops
    local_size: float = 0.5  # side of a local crop, share of the image's, rounded to whole patches
    global_scale: tuple[float, float] = (0.4, 1.0)  # share of the area
    local_scale: tuple[float, float] = (0.1, 0.4)
    flip: float = 0.5
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)  # brightness, contrast, saturation, hue
    jitter_p: float = 0.8
    grey: float = 0.2
    solarise: float = 0.2  # of the second global view
    blur: bool = True  # always in the first global view, 10 % of the second, half of the local ones; never below 64 pixels
    min_rank: float = 4.0  # effective rank of the features, over the validation images; below, the stage fails
    min_information: float = 0.01  # that the prototypes carry about an image, as a share of ln(prototypes)
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
        for key, least in (("prototypes", 2), ("hidden", 1), ("bottleneck", 1), ("n_local", 0)):
            if getattr(self, key) < least:
                raise ValueError(f"{key}: found {getattr(self, key)}, expected {least} or more")
        for key in ("student_temp", "teacher_temp", "teacher_temp_end"):
            if getattr(self, key) is not None and getattr(self, key) <= 0:
                raise ValueError(f"{key}: found {getattr(self, key)}, expected a temperature above 0")
        for key in (
            "centre_momentum",
            "momentum",
            "min_information",
            "teacher_temp_warmup",
            "flip",
            "jitter_p",
            "grey",
            "solarise",
        ):
            if not 0 <= getattr(self, key) <= 1:
                raise ValueError(f"{key}: found {getattr(self, key)}, expected a number in [0, 1]")
        if not 0 < self.local_size <= 1:
            raise ValueError(f"local_size: found {self.local_size}, expected a share in (0, 1]")
        for key in ("global_scale", "local_scale"):
            low, high = getattr(self, key)
            if not 0 < low <= high <= 1:
                raise ValueError(f"{key}: found {low}, {high}, expected 0 < low <= high <= 1")


def views(config: Config, spec) -> dict[str, View]:
    """global1, global2 and n_local smaller ones, local1, local2, ..."""
    size, patch = spec.image_size, spec.model["patch_size"]
    blur = config.blur and size >= 64
    common = {
        "flip": config.flip,
        "jitter": tuple(config.jitter),
        "jitter_p": config.jitter_p,
        "grey": config.grey,
        "blur_sigma": (0.1, max(0.2, 2 * min(1, size / 128))),
    }
    large = {**common, "size": size, "scale": tuple(config.global_scale)}
    small = {**common, "size": local_side(config, spec), "scale": tuple(config.local_scale), "blur": 0.5 * blur}
    assert small["size"] % patch == 0
    return {
        "global1": View(**large, blur=1.0 * blur),
        "global2": View(**large, blur=0.1 * blur, solarise=config.solarise),
        **{f"local{i}": View(**small) for i in range(1, config.n_local + 1)},
    }


def local_side(config: Config, spec) -> int:
    """Side of a local crop in pixels: whole patches, at least one."""
    return max(1, round(config.local_size * spec.grid)) * spec.model["patch_size"]


class Target(nn.Module):
    """The teacher: images -> its patch tokens. `dim` is their width. Head and centre are kept to judge its health."""

    def __init__(self, config: Config, spec):
        super().__init__()
        self.config, self.spec = config, spec
        self.encoder = kit.create(spec, "vit", drop_path_rate=0.0)
        self.dim = self.encoder.embed_dim
        self.head = _projector(config, self.dim)
        self.centre = Centre(config.prototypes, config.centre_momentum)
        self._check = measure.UnitRange("dino")
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Target:
        return super().train(False)

    @torch.no_grad()
    def features(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """(B,3,H,W) in [0,1] -> {"cls": (B,D), "patch": (B,N,D)}, float32, after the final norm."""
        self._check(images)
        found = kit.features(self.encoder, self.spec.normalise(images))
        return {name: value.float() for name, value in found.items()}

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(B,3,H,W) in [0,1] -> patch tokens (B,N,D). ValueError for pixels outside of [0,1]."""
        return self.features(images)["patch"]


class Training(nn.Module):
    def __init__(self, config: Config, spec, upstream=None):
        super().__init__()
        self.config, self.spec = config, spec
        self.encoder = kit.create(spec, "vit", drop_path_rate=config.drop_path, dynamic_img_size=True)  # any crop's size
        self.head = _projector(config, self.encoder.embed_dim)
        self.target = Target(config, spec)
        self.update_teacher(momentum=0.0)  # starts as a copy

    def forward(self, batch: dict, progress) -> dict[str, torch.Tensor]:
        """{"global1", "global2", "local1", ...: (B,3,h,w) in [0,1]} -> {"loss", entropy of the teacher's distributions}."""
        large = torch.cat([batch["global1"], batch["global2"]])
        with torch.no_grad():
            logits = self.target.head(self.target.features(large)["cls"])  # (2B,K)
        teacher = self.target.centre.sharpen(logits, self.temperature(progress.fraction)).unflatten(0, (2, -1))
        self.target.centre.count(logits)
        student = self.logits(large)
        local = [batch[name] for name in batch if name.startswith("local")]
        if local:
            student = torch.cat([student, self.logits(torch.cat(local))])
        loss = multi_view_loss(student.unflatten(0, (2 + len(local), -1)), teacher, self.config.student_temp)
        return {"loss": loss, "teacher_entropy": torch.special.entr(teacher).sum(dim=-1).mean()}

    def logits(self, images: torch.Tensor) -> torch.Tensor:
        """The student's logits (B,K) for images of one size."""
        return self.head(kit.features(self.encoder, self.spec.normalise(images))["cls"])

    def temperature(self, fraction: float) -> float:
        """Of the teacher, `fraction` of the training done."""
        start, end, warmup = self.config.teacher_temp, self.config.teacher_temp_end, self.config.teacher_temp_warmup
        return start if end is None else schedule.linear(fraction / warmup if warmup else 1.0, start, end)

    def before_step(self, progress) -> None:
        """The last layer rests at first: without gradients the optimiser leaves it alone, weight decay included."""
        if progress.epoch < self.config.freeze_last_layer:
            for parameter in self.head.last_layer.parameters():
                parameter.grad = None

    def after_step(self, progress) -> None:
        self.target.centre.step()
        self.update_teacher(ema.momentum(self.config.momentum, progress.fraction))

    def update_teacher(self, momentum: float) -> None:
        ema.update(self.target.encoder, self.encoder, momentum)
        ema.update(self.target.head, self.head, momentum)


def _projector(config: Config, dim: int) -> Head:
    return Head(dim, config.prototypes, config.hidden, config.bottleneck, config.norm_last)


@torch.no_grad()
def health(target: Target, images, config: Config) -> dict:
    """Over the validation images: effective rank and spread of patch and class tokens; entropy of the prototypes' shares
    (nats, the uniform one has ln K) and what they tell about an image."""
    patches, tokens, shares = [], [], []
    temperature = config.teacher_temp if config.teacher_temp_end is None else config.teacher_temp_end
    for batch in images:
        found = target.features(batch)
        patches.append(measure.sample_rows([found["patch"]]))
        tokens.append(found["cls"].cpu())
        shares.append(target.centre.sharpen(target.head(found["cls"]), temperature).cpu())
        if sum(map(len, patches)) >= measure.ROWS:
            break
    patches, tokens, shares = torch.cat(patches)[: measure.ROWS], torch.cat(tokens), torch.cat(shares)
    rank, spread = measure.effective_rank(patches), measure.spread(patches)
    entropy, information = measure.information(shares)
    most = float(np.log(config.prototypes))
    advice = (
        "Try a lower teacher_temp (0.02 to 0.04) against uniform outputs, a higher one or centre_momentum 0.9 against "
        "one prototype for all; a lower lr, longer warm-up, more epochs."
    )
    problems = measure.feature_problems(rank, spread, config.min_rank, advice)
    if not information >= config.min_information * most:
        kind = "uniform over the prototypes" if entropy > most / 2 else "one prototype for all images"
        problems.append(
            f"the teacher's outputs have collapsed ({kind}): they tell {information:.4f} nats about an image, "
            f"expected at least {config.min_information * most:.4f} (min_information); their entropy is "
            f"{entropy:.3f} of {most:.3f}. {advice}"
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
    """features: images | principal components of the patch tokens | attention of the class token, mean over heads,
    from black (its least) to white."""
    colours = measure.principal_colours(target(images))
    columns = [images, F.interpolate(colours, size=images.shape[-2:], mode="nearest")]
    if target.encoder.cls_token is not None:
        grid, prefix = target.spec.grid, target.encoder.num_prefix_tokens
        weights = kit.attention(target.encoder, target.spec.normalise(images))[:, :, 0, prefix:].mean(dim=1)
        low, high = weights.amin(dim=1, keepdim=True), weights.amax(dim=1, keepdim=True)
        weights = ((weights - low) / (high - low).clamp(min=1e-9)).view(-1, 1, grid, grid).expand(-1, 3, -1, -1)
        columns.append(F.interpolate(weights, size=images.shape[-2:], mode="nearest"))
    return {"features": contact_sheet(columns)}

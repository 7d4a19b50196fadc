"""Supervised training from scratch on the labels, by DeiT's recipe (arXiv 2012.12877).

A ViT with learnt positions, or a Swin, and a linear head on its class token (or on the mean of its
patches; a Swin has only that) minimises cross-entropy: the baseline for fine-tuning. This method
sees labels; compare it as such.

Departures from facebookresearch/deit, for small images and short runs:
- mixup, CutMix, RandAugment and random erasing are there but off by default, colour jitter is on
  instead; PUBLISHED is DeiT's recipe for ImageNet;
- no distillation, no repeated augmentation, no moving average of the weights;
- images 2j and 2j + 1 of a batch are mixed with each other, not the first with the last, so that
  partners stay together however a batch is cut into (even) micro batches; the share and the box are
  drawn once per step;
- images without a label (-1) weigh nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from stages.kit.data.views import View
from stages.kit.eager import eager
from stages.kit.nets import encoders
from stages.kit.train import mixing
from workflow import checks

TARGET = None
NEEDS = set()
LABELS = True
TRAINS = True
PUBLISHED = {
    "epochs": 300,
    "batch_size": 1024,
    "mixup": 0.8,
    "cutmix": 1.0,
    "label_smoothing": 0.1,
    "drop_path": 0.1,
    "crop_min": 0.08,
    "jitter": 0.0,
    "randaugment": "rand-m9-mstd0.5-inc1",
    "erase": 0.25,
    "lr": 0.0005,
    "lr_per": 512,
    "min_lr": 1e-05,
    "warmup": 0.0167,
    "weight_decay": 0.05,
}


@dataclass(frozen=True)
class Config(checks.Optimiser, checks.SizedCrop):
    pool: Literal["token", "avg"] = "token"  # what the head reads: class token or mean of patches
    drop_path: float = 0.1
    label_smoothing: float = 0.1
    mixup: float = 0.0  # alpha of its Beta distribution; 0: off. With both on, a coin decides
    cutmix: float = 0.0
    crop_min: float = 0.4
    jitter: float = 0.3  # of brightness, contrast and saturation
    randaugment: str | None = None  # timm's notation
    erase: float = 0.0  # probability of random erasing
    lr_per: int | None = 512
    min_lr: float = 1e-5
    warmup: float = 0.1

    def __post_init__(self):
        super().__post_init__()
        checks.within(self, "[0, 1)", "drop_path", "label_smoothing")
        checks.within(self, "[0, inf)", "mixup", "cutmix", "jitter")
        checks.within(self, "[0, 1]", "erase")


def views(config: Config, spec) -> dict[str, View]:
    jitter = (config.jitter, config.jitter, config.jitter, 0.0)
    more = {"randaugment": config.randaugment, "erase": config.erase}
    scale = (config.crop_min, 1.0)
    return {"view": View(spec.image_size, scale, flip=config.flip, jitter=jitter, **more)}


class Method(nn.Module):
    def __init__(self, config: Config, spec, target=None):
        super().__init__()
        if spec.num_classes < 2:
            raise ValueError(
                f"supervised needs 2 or more classes, the data set has {spec.num_classes}"
            )
        self.config, self.spec = config, spec
        self.encoder = encoders.create(spec, "timm", drop_path=config.drop_path)
        self.head = nn.Linear(self.encoder.num_features, spec.num_classes)
        if encoders.has_cls(self.encoder):
            nn.init.trunc_normal_(self.encoder.cls_token, std=0.02)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def no_weight_decay(self) -> set[str]:
        return {f"encoder.{name}" for name in self.encoder.no_weight_decay()}

    def forward(self, batch: dict, progress) -> dict[str, torch.Tensor]:
        """{"view": (B,3,H,W) in [0,1], "label": (B,)} -> {"loss": cross-entropy, "accuracy"}."""
        images, labels, classes = batch["view"], batch["label"], self.spec.num_classes
        soft = F.one_hot(labels.clamp(min=0), classes).float()
        soft = soft * (1 - self.config.label_smoothing) + self.config.label_smoothing / classes
        soft = (
            soft * (labels >= 0).float()[:, None]
        )  # rows without a label are zero, and weigh nothing below
        if self.config.mixup or self.config.cutmix:
            images, soft = self.mix(images, soft, progress.generator("mix"))
        features = encoders.features(self.encoder, self.spec.normalise(images))
        pooled = features["cls"] if self.config.pool == "token" else features["patch"].mean(dim=1)
        logits = self.head(pooled).float()
        weight = soft.sum().clamp(min=1e-6)
        known = soft.sum(dim=1)
        right = (logits.detach().argmax(dim=1) == soft.argmax(dim=1)).float()
        loss = -(soft * logits.log_softmax(dim=1)).sum() / weight
        return {"loss": loss, "accuracy": (right * known).sum() / weight}

    @eager  # numbers of numpy decide about shapes
    def mix(self, images: torch.Tensor, soft: torch.Tensor, generator: torch.Generator):
        """Mixup or CutMix of images (B,3,H,W) and soft labels (B,K) -> the same, mixed."""
        if len(images) % 2:
            raise ValueError(
                f"train.micro_batch: found {len(images)} images, expected an even number, as mixup "
                "and cutmix pair them"
            )
        draw = np.random.default_rng(int(torch.randint(2**62, (1,), generator=generator)))
        cut = self.config.cutmix > 0 and (self.config.mixup == 0 or draw.random() < 0.5)
        share = draw.beta(*(self.config.cutmix if cut else self.config.mixup,) * 2)
        if not cut:
            return mixing.mixed(images, soft, share, share)
        side = images.shape[-1]
        place = mixing.box(side, side, *draw.integers(side, size=2).tolist(), share)
        rows, columns = (part.stop - part.start for part in place)
        kept = mixing.outside(side, side, place).to(images.device)
        return mixing.mixed(images, soft, kept, 1 - rows * columns / side**2)

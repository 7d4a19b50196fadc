"""iBOT: image BERT pre-training with online tokenizer (arXiv 2111.07832).

DINO between crops, and masked image modelling beside it: the student sees the two global crops with
blocks of patches replaced by a learnt token; at the hidden patches its distribution over prototypes
must match that of its moving average for the same patch of the same crop, unmasked. The teacher's
head is a tokenizer that is learnt meanwhile. The teacher's encoder is what is exported.

Follows bytedance/ibot, with what kit/parts/selfdistil.py says of DINO's training, and these
departures:
- masks are pure functions of seed and step, where the official ones come from the loader's
  generators; a view with a ratio r hides at most r of its patches, by the same rule;
- the student's head sees no more patches than can be hidden; those at which nothing is hidden weigh
  nothing, as there;
- shared_head is one setting for student and teacher; the official code has two, both true in the
  published recipe;
- teacher and student start equal in all that they share, also where the last layers are two;
- Swin is not supported.
Defaults are for small images; PUBLISHED is the recipe for ImageNet and ViT-S/16. A step sees two
large and n_local small crops of each image: compare it with single-view methods by the crops seen,
or by cost.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from stages.kit.nets import encoders
from stages.kit.nets.masks import block_masks, hidden_ids, random_masks, take
from stages.kit.nets.pictures import colour_codes, contact_sheet, paint, windows
from stages.kit.parts.collapse import Watch
from stages.kit.parts.prototypes import Centre, cross_entropy
from stages.kit.parts.selfdistil import SelfDistillation, feature_columns, global_views, views
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
    "shared_head": True,
    "prototypes": 8192,
    "hidden": 2048,
    "bottleneck": 256,
    "norm_last": False,
    "freeze_last_layer": 1.0,
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
    "weight_decay": 0.04,
    "weight_decay_end": 0.4,
    "clip": 3.0,
    "clip_mode": "tensor",
    "patch_temp_end": 0.07,
}


@dataclass(frozen=True)
class Config(checks.Optimiser, checks.SelfDistillation):
    mask: Literal["block", "random"] = "block"
    mask_share: float = 0.5  # of the global views that are masked, on average
    mask_ratio: tuple[float, float] = (0.1, 0.5)  # of the patches of those views, drawn for each
    cls_weight: float = 1.0  # of the loss between class tokens, DINO's
    patch_weight: float = 1.0  # of the loss at hidden patches
    shared_head: bool = True  # False: patches have prototypes of their own
    prototypes: int = 1024
    teacher_temp_end: float | None = 0.06
    patch_temp_end: float | None = 0.06  # for patches, which also start at teacher_temp
    lr: float = 5e-4
    lr_per: int | None = 256
    min_lr: float = 1e-6
    warmup: float = 0.1
    weight_decay: float = 0.04
    weight_decay_end: float | None = 0.4
    clip: float | None = 3.0
    clip_mode: Literal["global", "tensor"] = "tensor"

    def __post_init__(self):
        super().__post_init__()
        checks.within(self, "[0, inf)", "cls_weight", "patch_weight")
        checks.within(self, "(0, inf)", "patch_temp_end")
        checks.within(self, "[0, 1]", "mask_share")
        checks.spans(self, "mask_ratio")

    def check(self, image_size: int, model) -> None:
        patches = model.grid(image_size) ** 2
        if int(patches * self.mask_ratio[1]) < 1:
            raise ValueError(
                f"mask_ratio: {self.mask_ratio[1]} of {patches} patches never hides one"
            )


class Method(SelfDistillation):
    def __init__(self, config: Config, spec, target=None):
        super().__init__(config, spec, patch_layer=not config.shared_head)
        self.mask_token = nn.Parameter(
            torch.zeros(1, 1, self.encoder.embed_dim)
        )  # the student's alone
        self.patch_centre = Centre(config.prototypes, config.centre_momentum)
        self.patch_watch = Watch(
            config.prototypes, config.min_information, "assignments of patches"
        )
        for watch, weight in (
            (self.watch, config.cls_weight),
            (self.patch_watch, config.patch_weight),
        ):
            if not weight:
                watch.least = 0.0  # a layer that no loss trains may stay silent
        self.grid = (spec.grid, spec.grid)
        self.most = int(spec.grid**2 * config.mask_ratio[1])  # patches that can be hidden in a view

    def forward(self, batch: dict, progress) -> dict[str, torch.Tensor]:
        """{"global1", "global2", "local1", ...: (B,3,h,w) in [0,1]} -> {"loss", its two parts,
        entropies of the teacher's distributions for class tokens and hidden patches, "divergence"
        of the student from them (the weighted loss above the least possible)}.
        """
        large = global_views(batch)
        mask = torch.cat(
            [
                self.masks(progress.uniform, name, self.config.mask_share)
                for name in ("global1", "global2")
            ]
        )
        with torch.no_grad():
            seen = self.teacher.features(large)
            logits, patch_logits = (
                self.teacher.head(seen["cls"]),
                self.teacher.patch_logits(seen["patch"]),
            )
        tokens = self.tokens(large, mask)
        cls_loss, entropy = self.class_loss(
            logits, self.student.head(tokens["cls"]), batch, progress
        )
        patch_loss, least, patch_entropy = self.patch_loss(
            patch_logits, tokens["patch"], mask, progress
        )
        weights = (self.config.cls_weight, self.config.patch_weight)
        return {
            "loss": weights[0] * cls_loss + weights[1] * patch_loss,
            "cls_loss": cls_loss,
            "patch_loss": patch_loss,
            "teacher_entropy": entropy,
            "patch_entropy": patch_entropy,
            "divergence": weights[0] * (cls_loss - entropy) + weights[1] * (patch_loss - least),
        }

    def masks(self, uniform, view: str, share: float) -> torch.Tensor:
        """bool (B,N): with probability 1 - share nothing, else at most a ratio of the patches that
        is uniform in mask_ratio.

        `uniform(name, *shape)` as Progress.uniform; the official rule (loader.py): blocks of at
        least (side // 3)^2 patches until no further one fits, or single patches.
        """
        (low, high), patches = self.config.mask_ratio, self.grid[0] * self.grid[1]
        chosen, ratio = uniform(f"{view}-ratio", 2).unbind(1)
        count = (low + (high - low) * ratio) * patches * (chosen < share)  # (B,), with fractions
        if self.config.mask == "random":
            return random_masks(uniform(f"{view}-mask", patches), count)
        return block_masks(
            lambda name, *shape: uniform(f"{view}-{name}", *shape),
            self.grid,
            count,
            (self.grid[0] // 3) ** 2,
        )

    def tokens(self, images: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        """The student's {"cls": (B,D), "patch": (B,N,D)} for images of full size with patches
        hidden; positions are seen.
        """
        images = self.spec.normalise(images)
        return encoders.masked(self.student.encoder, images, mask, self.mask_token)

    def patch_loss(self, teacher: torch.Tensor, tokens: torch.Tensor, mask: torch.Tensor, progress):
        """Teacher's raw logits (V,N,K), student's patch tokens (V,N,D), mask (V,N) of V views ->
        (loss, the least that it can be, the teacher's mean entropy at hidden patches).

        The loss is the cross entropy at hidden patches, averaged within each view, then over all
        views; a view without any counts as 0. All patches count for the centre.
        """
        self.patch_centre.count(teacher)
        ids = hidden_ids(
            mask, self.most
        )  # hidden ones first; the rest, where fewer are hidden, has weight 0
        hidden = mask.gather(1, ids).float()
        weight = hidden / hidden.sum(dim=1, keepdim=True).clamp(min=1) / len(mask)
        temperature = progress.scheduled(partial(self.temperature, end="patch_temp_end"))
        assigned = self.patch_centre.sharpen(take(teacher, ids), temperature)
        self.patch_watch.count(assigned)
        loss = cross_entropy(
            self.student.patch_logits(take(tokens, ids)), assigned, self.config.student_temp
        )  # (V,n)
        entropy = torch.special.entr(assigned).sum(dim=-1)
        mean = (entropy * hidden).sum() / hidden.sum().clamp(min=1)
        return (loss * weight).sum(), (entropy * weight).sum(), mean

    def after_step(self, progress) -> None:
        self.patch_centre.step()
        super().after_step(progress)
        self.patch_watch.step(progress)

    @torch.no_grad()
    def pictures(self, batch: dict) -> dict[str, np.ndarray]:
        """Of at most 8 images. tokens: image | masked | the student's prototypes at hidden patches
        | the teacher's, of the whole image | principal components of patch tokens | attention. One
        colour per prototype. prototypes: in a row the patches, with their surroundings, that the
        teacher gives to one prototype, surest first; the prototypes that most patches share.
        """
        images = batch["view"][:8]
        generator = torch.Generator().manual_seed(0)
        mask = self.masks(
            lambda name, *shape: torch.rand(len(images), *shape, generator=generator), "shown", 1.0
        )
        mask = mask.to(images.device)
        guess = self.student.patch_logits(self.tokens(images, mask)["patch"]).argmax(dim=-1)
        logits = self.teacher.patch_logits(self.teacher.features(images)["patch"])
        share, given = self.patch_centre.sharpen(
            logits, self.temperature(1.0, "patch_temp_end")
        ).max(dim=-1)
        size = images.shape[-1]
        columns = [
            images,
            paint(images, mask),
            paint(colour_codes(guess, size), ~mask),
            colour_codes(given, size),
        ]
        return {
            "tokens": contact_sheet([*columns, *feature_columns(self.teacher, images)]),
            "prototypes": self.prototype_sheet(images, given.flatten(), share.flatten()),
        }

    def prototype_sheet(
        self, images: torch.Tensor, given: torch.Tensor, share: torch.Tensor, side: int = 8
    ) -> np.ndarray:
        """Prototypes `given` (B*N,) to the patches of images, and their shares -> rows of patches
        that have the same one.
        """
        around = F.pad(
            windows(images, self.spec.patch), (0,) * 6 + (0, 1), value=1.0
        )  # the last one is white
        rows = []
        for prototype in given.bincount().topk(min(side, int(given.max()) + 1)).indices:
            found = torch.where(given == prototype, share, -1.0).topk(min(side, len(given)))
            places = torch.where(found.values >= 0, found.indices, len(given))
            rows.append(F.pad(places, (0, side - len(places)), value=len(given)))
        return contact_sheet([around[column] for column in torch.stack(rows, dim=1)])

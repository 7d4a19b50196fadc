"""AttMask: what to hide from your students, attention-guided masking (arXiv 2203.12719).

iBOT whose teacher also says what to hide. It sees the whole view anyway, and its class token's
attention to the patches, the mean over the heads of the last block, ranks them. `high` hides those
that it looks at most; `hint` does, and gives a few of the very first back; `low` hides those that
it looks at least, as a control. `random` and `block` are iBOT's own masks, from the same code, with
the same numbers: a run with these is iBOT (methods/ibot.py).

The attention is that of the last softmax over all keys, of which the class token's own is left out
and the rest not scaled up. For high, hint and low one ratio is drawn in each step, for all images;
each view is masked with the probability mask_share. How many hints there are is a second draw of
the ratio. Ties go to the first patch in raster order. No gradient passes through the choice.

Follows gkakogeorgiou/attmask, with the departures of iBOT's training (kit/parts/ibot.py) and these:
- the hints come from the first show_max of the patches, but from no more than are hidden; official
  settings never differ in this;
- the ratio is drawn by seed and step, so it is the same on all processes, as officially; coin and
  hints are drawn by seed, step and image, where every official process draws the same ones;
- steps in which no hint is due (show_max times ratio below one patch) show none; the official code
  stops there.
With `patch_weight: 0` the host is the class-token loss alone, the paper's second one. Defaults are
iBOT's, for small images and short runs; show_max is larger, since a tenth of 64 patches often gives
no hint. PUBLISHED is the recipe for ImageNet and ViT-S/16, 100 epochs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch

from stages.kit.eager import eager
from stages.kit.nets.masks import random_masks
from stages.kit.nets.pictures import contact_sheet, paint
from stages.kit.parts.ibot import MaskedSelfDistillation
from stages.kit.parts.selfdistil import GLOBAL, feature_columns, global_views, views
from workflow import checks

__all__ = ["Config", "Method", "views"]

TARGET = None
NEEDS = {"mask", "cls", "attention", "sizes"}
LABELS = False
TRAINS = True
PUBLISHED = {
    "epochs": 100,
    "batch_size": 240,
    "mask": "high",
    "mask_share": 0.5,
    "mask_ratio": [0.1, 0.5],
    "show_max": 0.1,
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
    "patch_temp_end": 0.07,
    "teacher_temp_warmup": 0.3,
    "momentum": 0.996,
    "drop_path": 0.1,
    "n_local": 10,
    "local_size": 0.43,
    "global_scale": [0.25, 1.0],
    "local_scale": [0.05, 0.25],
    "lr": 0.0005,
    "lr_per": 256,
    "min_lr": 1e-06,
    "warmup": 0.1,
    "schedule": "beit",
    "weight_decay": 0.04,
    "weight_decay_end": 0.4,
    "clip": 3.0,
    "clip_mode": "tensor",
}
Mask = Literal["high", "hint", "low", "random", "block"]


@dataclass(frozen=True)
class Config(checks.MaskedSelfDistillation):
    mask: Literal["high", "hint", "low", "random", "block"] = "high"
    show_max: float = 0.15  # share of the patches, those most attended, that hints come from

    def __post_init__(self):
        super().__post_init__()
        checks.within(self, "[0, 1]", "show_max")

    def check(self, image_size: int, model) -> None:
        super().check(image_size, model)
        patches = model.grid(image_size) ** 2
        if self.mask == "hint" and int(patches * self.show_max * self.mask_ratio[1]) < 1:
            raise ValueError(
                f"show_max: {self.show_max} of {patches} patches never gives a hint, since at most "
                f"{self.mask_ratio[1]} of them (mask_ratio) are shown"
            )


class Method(MaskedSelfDistillation):
    def __init__(self, config: Config, spec, target=None):
        super().__init__(config, spec, most=int(spec.grid**2 * config.mask_ratio[1]))

    def forward(self, batch: dict, progress) -> dict[str, torch.Tensor]:
        """{"global1", "global2", "local1", ...: (B,3,h,w) in [0,1]} -> what iBOT gives, and of the
        masked views the share of patches and of the teacher's attention that is hidden.
        """
        large = global_views(batch)  # (2B,3,H,W)
        seen = self.look(large, "attention")
        attention = seen["attention"].mean(dim=1)  # (2B,N)
        how = (progress.uniform, self.ratios(progress), self.config.mask_share, self.config.mask)
        both = zip(GLOBAL, attention.chunk(2), strict=True)
        mask = torch.cat([self.mask(view, weights, *how) for view, weights in both])
        masked = mask.any(dim=1) / mask.any(dim=1).sum().clamp(min=1)
        hidden = (attention * mask).sum(dim=1) / attention.sum(dim=1)
        return {
            **self.losses(large, mask, seen, batch, progress),
            "hidden": (mask.float().mean(dim=1) * masked).sum(),
            "hidden_attention": (hidden * masked).sum(),
        }

    @eager  # a generator is nothing for a compiler
    def ratios(self, progress) -> torch.Tensor:
        """Two draws from mask_ratio, (2,), the same for all images of the step."""
        low, high = self.config.mask_ratio
        drawn = torch.rand(2, generator=progress.generator("attmask"))
        return (low + (high - low) * drawn).to(progress.device)

    def mask(
        self,
        view: str,
        attention: torch.Tensor,
        uniform: Callable[..., torch.Tensor],
        ratios: torch.Tensor,
        share: float,
        kind: Mask,
    ) -> torch.Tensor:
        """Which patches of a view are hidden, bool (B,N), given the attention to each (B,N).

        int(N * ratios[0]) of them, or none with the probability 1 - share; for "hint" less
        int(N * show_max * ratios[1]). `uniform(name, *shape)` as Progress.uniform; its first
        number, which decides whether a view is masked, is the same for all kinds.
        """
        if kind in ("random", "block"):
            return self.drawn(uniform, view, share, kind)
        patches = attention.shape[1]
        chosen = uniform(f"{view}-ratio", 2)[:, 0] < share
        count = (patches * ratios[0]).floor()
        hidden = random_masks(attention if kind == "low" else -attention, count * chosen)
        if kind == "hint":
            pool = count.clamp(max=int(patches * self.config.show_max))
            reveal = (patches * self.config.show_max * ratios[1]).floor().minimum(pool)
            first = random_masks(-attention, pool.expand(len(attention)))
            noise = torch.where(first, uniform(f"{view}-hint", patches), 2.0)
            hidden = hidden & ~random_masks(noise, reveal.expand(len(attention)))
        return hidden

    @torch.no_grad()
    def pictures(self, batch: dict) -> dict[str, np.ndarray]:
        """Of at most 8 images the contact sheets of iBOT's `masked_pictures`, and

        masks: image | the teacher's attention | what each kind of mask leaves: high, hint, low,
        random, block, all with the mean ratio.
        """
        images = batch["view"][:8]
        generator = torch.Generator().manual_seed(0)
        numbers = torch.rand(len(images), self.spec.grid**2, generator=generator)
        blocks = torch.rand(len(images), 16, 10, 4, generator=generator)
        middle = sum(self.config.mask_ratio) / 2

        def drawn(name: str, *shape: int) -> torch.Tensor:
            if name.endswith("-ratio"):
                return torch.full((len(images), 2), 0.5, device=images.device)
            return (blocks if name.endswith("-block") else numbers).to(images.device)

        attention = self.teacher(images, "attention")["attention"].mean(dim=1)
        how = (attention, drawn, torch.full((2,), middle, device=images.device), 1.0)
        masks = {kind: self.mask("shown", *how, kind) for kind in get_args(Mask)}
        columns = [images, feature_columns(self.teacher, images)[1]]
        columns += [paint(images, mask) for mask in masks.values()]
        shown = self.masked_pictures(images, masks[self.config.mask])
        return {"masks": contact_sheet(columns), **shown}

"""EVA: masked regression of the features of a network that knows language (arXiv 2211.07636).

BEiT with a continuous target. A ViT sees the image with blocks of patches replaced by a mask token.
One linear layer on its output at a hidden patch must point where the frozen teacher's feature of
that patch points. No tokenizer, no decoder, nothing is learnt at visible patches. The published
teacher is CLIP's ViT-L/14 (stages/targets/clip.py); any target that gives features will do.

Follows baaivision/EVA (EVA-01/eva): BEiT's blocks (no bias of keys) and initial weights with learnt
absolute positions, no relative ones and no layer scale; BEiT's masks, which hide at most, not
exactly, the count asked for (105 of 256). `student: mae` is the variant of EVA-L in the same
folder: MAE's encoder and decoder, a random 75 % hidden. Departures:
- the sum of the cosines is divided by that count and the images, not by how many patches are
  hidden, as in methods/beit.py; `cosine` is the published mean. An image with more hidden patches
  weighs more, as published;
- the released loss of EVA-L has no minus sign, which its last layer makes up for. Here both
  variants have it;
- `init`: BEiT's published weights learn little at small width in few steps (methods/beitv2.py gives
  the reasons); PUBLISHED has them, with ViT-B's deviation of 0.02 (the giant's: 0.015);
- the student's images are normalised by the data set's statistics, officially by CLIP's;
- a loss that is not finite stops the job, which goes on from its last checkpoint when started
  again; officially the training itself goes back;
- masks and crops are pure functions of seed and step;
- no intermediate training on ImageNet-21k, none of the options that the published run leaves off.
Defaults are for small images; PUBLISHED is the recipe of the giant on its 30 million images, whose
rate is absolute.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from stages.kit.data.views import View
from stages.kit.nets import encoders
from stages.kit.nets.decoder import Decoder
from stages.kit.nets.init import trunc_init
from stages.kit.nets.masks import block_masks, random_masking, take
from stages.kit.nets.pictures import contact_sheet, paint, principal_colours
from stages.kit.parts.beit import hidden, mean_over_hidden, shown
from workflow import checks

TARGET = {"patch"}
NEEDS = {"mask", "drop", "cls", "plain"}
LABELS = False
TRAINS = True
PUBLISHED = {
    "epochs": 150,
    "batch_size": 4096,
    "student": "beit",
    "mask_ratio": 0.41,
    "min_block": 16,
    "layer_scale": 0.0,
    "init": "published",
    "drop_path": 0.1,
    "crop_min": 0.2,
    "lr": 0.001,
    "lr_per": None,
    "min_lr": 1e-05,
    "warmup": 0.0133,
    "warmup_from": 0.001,
    "schedule": "beit",
    "weight_decay": 0.05,
    "betas": [0.9, 0.98],
    "eps": 1e-06,
    "clip": 3.0,
}


@dataclass(frozen=True)
class Config(checks.Optimiser, checks.Crop, checks.BeitStart, checks.Decoder):
    student: Literal["beit", "mae"] = "beit"  # of EVA, or of EVA-L; only this has the decoder
    mask_ratio: float = 0.41  # share of the patches that is hidden: 26 of 64. EVA-L: 0.75
    min_block: int = 4  # patches in the smallest block, of student beit
    layer_scale: float = 0.0  # 0: none
    drop_path: float = 0.0
    lr: float = 1e-3
    min_lr: float = 1e-5
    betas: tuple[float, float] = (0.9, 0.98)
    clip: float | None = 3.0

    def __post_init__(self):
        super().__post_init__()
        checks.within(self, "(0, 1)", "mask_ratio")
        checks.within(self, "[1, inf)", "min_block")
        checks.within(self, "[0, 1)", "drop_path")

    def check(self, image_size: int, model) -> None:
        count = checks.hidden_count(model.grid(image_size) ** 2, self.mask_ratio)
        if self.student == "mae":
            checks.sincos(model)
        elif self.min_block > count:
            raise ValueError(
                f"min_block: found {self.min_block}, expected at most the {count} hidden patches"
            )


def views(config: Config, spec) -> dict[str, View]:
    return {"view": View(spec.image_size, (config.crop_min, 1.0), flip=config.flip)}


class Method(nn.Module):
    def __init__(self, config: Config, spec, target):
        super().__init__()
        self.config, self.spec, self.teacher = config, spec, target
        self.patches, width = spec.grid**2, target.sizes["patch"]
        self.count = checks.hidden_count(self.patches, config.mask_ratio)
        if config.student == "mae":
            self.encoder = encoders.create(spec, "sincos", drop_path=config.drop_path)
            prefix = self.encoder.num_prefix_tokens
            dim = self.encoder.embed_dim
            self.decoder = Decoder.of(config, dim, width, spec.grid, prefix=prefix)
            return
        how = {"init": config.init, "layer_scale": config.layer_scale}
        how |= {"use_abs_pos_emb": True, "use_shared_rel_pos_bias": False}
        self.encoder = encoders.create(spec, "beit", drop_path=config.drop_path, **how)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, self.encoder.embed_dim))
        self.head = nn.Linear(self.encoder.embed_dim, width)
        trunc_init(self.head)
        nn.init.trunc_normal_(self.mask_token, std=0.02, a=-0.02, b=0.02)

    def no_weight_decay(self) -> set[str]:
        """Besides one-dimensional parameters: of student beit its class token and positions."""
        if self.config.student == "mae":
            return set()
        return {f"encoder.{name}" for name in encoders.embeddings(self.encoder)}

    def forward(self, batch: dict, progress) -> dict[str, torch.Tensor]:
        """{"view": (B,3,H,W) in [0,1]} -> {"loss", "cosine": mean over the hidden patches}."""
        images = batch["view"]
        mask = self.masks(progress.uniform)
        ids, weight = hidden(mask, self.count)  # (B,n) each
        target = take(self.teacher(images, "patch")["patch"], ids)
        predicted = self.predict(images, mask, ids).float()
        cosine = F.cosine_similarity(predicted, target, dim=-1)  # (B,n)
        return {
            "loss": -(cosine * weight).mean(),
            "cosine": mean_over_hidden(cosine.detach(), weight),
        }

    def masks(self, uniform) -> torch.Tensor:
        """Bool (B,N); `uniform` as Progress has it."""
        if self.config.student == "mae":
            noise = uniform("mask", self.patches)
            return random_masking(noise, self.patches - self.count)[2].bool()
        grid = (self.spec.grid, self.spec.grid)
        return block_masks(uniform, grid, self.count, self.config.min_block)

    def predict(self, images: torch.Tensor, mask: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Images in [0,1], bool mask (B,N), positions ids (B,n) -> features there (B,n,E)."""
        images = self.spec.normalise(images)
        if self.config.student == "mae":
            order = mask.to(torch.uint8).argsort(dim=1, stable=True)  # visible ones first
            keep = order[:, : self.patches - self.count]
            seen = encoders.visible(self.encoder, images, keep)
            return take(self.decoder(seen["tokens"], order.argsort(dim=1)), ids)
        seen = encoders.masked(self.encoder, images, mask, self.mask_token)
        return self.head(take(seen["patch"], ids))

    @torch.no_grad()
    def pictures(self, batch: dict) -> dict[str, np.ndarray]:
        """features, of at most 8 images: image | masked | the teacher's features | predicted ones.

        Predictions are shown where patches are hidden. Features have unit length, colours are three
        principal components, the same for both columns.
        """
        images = batch["view"][:8]
        mask = self.masks(shown(len(images))).to(images.device)
        everywhere = torch.arange(self.patches, device=images.device).expand(len(images), -1)
        predicted = self.predict(images, mask, everywhere).float()
        both = torch.cat([self.teacher(images, "patch")["patch"], predicted])
        colours = principal_colours(F.normalize(both, dim=-1))
        wanted, found = F.interpolate(colours, size=images.shape[-2:], mode="nearest").chunk(2)
        columns = [images, paint(images, mask), wanted, paint(found, ~mask)]
        return {"features": contact_sheet(columns)}

"""BEiT v2: masked image modelling with vector-quantised visual tokenizers (arXiv 2208.06366), the
student.

A ViT sees the image with blocks of patches replaced by a mask token and classifies, at each hidden
patch, the code that a frozen tokenizer gives to that patch of the whole image. Patch aggregation
repeats the loss on the last class token together with the patch tokens of an early block, which
forces what lies behind that block through the class token.

Follows microsoft/unilm (beit2). Its initialisation is `init: published`; there the aggregation
blocks keep torch's default initialisation, scaled by depth, because the official code creates them
after its initialisation pass. Departures:
- three defaults, since the published ones learn little at small width in few steps; PUBLISHED has
  those. The table of relative positions, the only source of position, starts at zero, and Adam
  moves an entry by at most the sum of the rates, about 1 in 2,000 steps at 1e-3: its rate is 20
  times the others' (`rel_pos_rate`), and it is not decayed (`rel_pos_decay`). Weights start as
  MAE's (`init: xavier`), since blocks of width 128 with the published ones add 2 % of what they
  get; `init` goes for the aggregation blocks as for the encoder's. Over 500 steps at width 64, one
  seed, with clusters of patch colours as codes, the share of hidden codes that are predicted rose
  from 28 % to 37 % by the rate without decay, to 29 % by the weights and to 39 % by both;
- masks and crops are pure functions of seed and step; the official ones come from unseeded
  generators;
- colours are jittered after the crop, not before (contrast then refers to the mean grey of the
  crop);
- student and tokenizer see the same resized pixels, where the official code resizes a crop twice;
- the rate reaches its peak in the step after the warm-up, officially in the warm-up's last one
  (`schedule: beit`, which PUBLISHED has);
- `mask_ratio` is rounded to a count of patches; 0.3827 gives the official 75 of 196;
- defaults are for small images; PUBLISHED is the recipe for ImageNet and ViT-B/16 over 300 epochs
  (1600 epochs: betas 0.9, 0.999, drop_path 0.1; ViT-L: layer_scale 1e-5, early_layer 21).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from timm.layers import LayerNorm
from timm.models.beit import Block
from torch import nn

from stages.kit.data.views import View
from stages.kit.nets import encoders
from stages.kit.nets.init import beit_init, scale_by_depth, trunc_init
from stages.kit.nets.masks import exact_block_masks, hidden_ids, take
from stages.kit.nets.pictures import colour_codes, contact_sheet, paint
from workflow import checks

TARGET = {"ids"}
NEEDS = {"mask", "cls", "taps"}
LABELS = False
TRAINS = True
PUBLISHED = {
    "epochs": 300,
    "batch_size": 2048,
    "mask_ratio": 0.3827,
    "min_block": 16,
    "early_layer": 9,
    "head_depth": 2,
    "shared_head": True,
    "layer_scale": 0.1,
    "init": "published",
    "rel_pos_rate": 1.0,
    "rel_pos_decay": True,
    "drop_path": 0.0,
    "crop_min": 0.2,
    "jitter": 0.4,
    "lr": 0.0015,
    "lr_per": None,
    "min_lr": 1e-05,
    "warmup": 0.0333,
    "schedule": "beit",
    "weight_decay": 0.05,
    "betas": [0.9, 0.98],
    "clip": 3.0,
}


@dataclass(frozen=True)
class Config(checks.Optimiser, checks.Crop, checks.BeitEncoder):
    mask_ratio: float = 0.39  # share of the patches that is hidden: 25 of 64
    min_block: int = 4  # patches in the smallest block
    early_layer: int | None = None  # whose patches aggregation takes; None: 3/4 of the depth
    head_depth: int = 1  # aggregation blocks; 0: no patch aggregation
    shared_head: bool = True  # one norm and linear layer for both losses
    drop_path: float = 0.0
    jitter: float = 0.4  # of brightness, contrast and saturation
    lr: float = 1e-3
    min_lr: float = 1e-5
    betas: tuple[float, float] = (0.9, 0.98)
    clip: float | None = 3.0

    def __post_init__(self):
        super().__post_init__()
        checks.within(self, "(0, 1)", "mask_ratio")
        checks.within(self, "[1, inf)", "min_block", "early_layer")
        checks.within(self, "[0, inf)", "head_depth", "jitter", most=1000)
        checks.within(self, "[0, 1)", "drop_path")

    def early(self, depth: int) -> int:
        """The block, counted from 1, after which aggregation takes the patch tokens."""
        return max(1, 3 * depth // 4) if self.early_layer is None else self.early_layer

    def check(self, image_size: int, model) -> None:
        count = checks.hidden_count(model.grid(image_size) ** 2, self.mask_ratio)
        if self.min_block > count:
            raise ValueError(
                f"min_block: found {self.min_block}, expected at most the {count} hidden patches"
            )
        if self.head_depth and self.early(model.depth) >= model.depth:
            raise ValueError(
                f"early_layer: found {self.early(model.depth)}, expected less than model.depth "
                f"{model.depth} (or head_depth 0)"
            )


def views(config: Config, spec) -> dict[str, View]:
    jitter = (config.jitter, config.jitter, config.jitter, 0.0)
    scale = (config.crop_min, 1.0)
    return {"view": View(spec.image_size, scale, flip=config.flip, jitter=jitter)}


class Method(nn.Module):
    def __init__(self, config: Config, spec, target):
        super().__init__()
        self.config, self.spec, self.tokenizer = config, spec, target
        self.grid = (spec.grid, spec.grid)
        self.count = checks.hidden_count(spec.grid**2, config.mask_ratio)
        how = {"init": config.init, "layer_scale": config.layer_scale}
        self.encoder = encoders.create(spec, "beit", drop_path=config.drop_path, **how)
        width, codes = self.encoder.embed_dim, target.sizes["ids"]
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.head = nn.Linear(width, codes)
        self.early = config.early(spec.model.depth)
        self.aggregation = self._aggregation()
        separate = config.head_depth and not config.shared_head
        self.aggregation_norm = LayerNorm(width) if separate else None
        self.aggregation_head = nn.Linear(width, codes) if separate else None
        self._initialise()

    def _aggregation(self) -> nn.ModuleList:
        """Blocks as the encoder's, whose drop path goes on rising behind the early layer."""
        config, model, last = self.config, self.spec.model, self.early + self.config.head_depth
        rates = torch.linspace(0, config.drop_path, max(model.depth, last), device="cpu").tolist()
        shape = {"num_heads": model.num_heads, "mlp_ratio": model.mlp_ratio, "qkv_bias": True}
        shape |= {"init_values": config.layer_scale, "norm_layer": LayerNorm}
        width = self.encoder.embed_dim
        return nn.ModuleList(
            [Block(width, drop_path=rate, **shape) for rate in rates[self.early : last]]
        )

    def _initialise(self) -> None:
        """Of what is not the encoder's. As published: weights of the heads normal with deviation
        0.02, cut there, zero biases; aggregation block n's outputs over sqrt(2 n). The other kinds
        of `init` are for the aggregation blocks alone.
        """
        for part in (self.head, self.aggregation_head):
            if part is not None:
                trunc_init(part)
        nn.init.trunc_normal_(self.mask_token, std=0.02, a=-0.02, b=0.02)
        if self.config.init == "published":
            scale_by_depth(self.aggregation, first=self.early + 1)
        else:
            width = self.encoder.embed_dim
            beit_init(self.aggregation, width, self.config.init, first=self.early + 1)

    def no_weight_decay(self) -> set[str]:
        """Besides one-dimensional parameters: the class token, and absolute positions where the
        encoder has any. The mask token is decayed, the table of relative positions with
        `rel_pos_decay`.
        """
        names = encoders.embeddings(self.encoder)
        if not self.config.rel_pos_decay:
            names |= encoders.relative_positions(self.encoder)
        return {f"encoder.{name}" for name in names}

    def rates(self) -> dict[str, float]:
        """Factors of learning rates: of the tables of relative positions."""
        tables = encoders.relative_positions(self.encoder)
        return {f"encoder.{name}": self.config.rel_pos_rate for name in tables}

    def forward(self, batch: dict, progress) -> dict[str, torch.Tensor]:
        """{"view": (B,3,H,W) in [0,1]} -> {"loss", and loss and accuracy of each of the two
        predictions}.
        """
        images = batch["view"]
        codes = self.tokenizer(images, "ids")["ids"]  # (B,N), of the whole view
        mask = exact_block_masks(progress.uniform, self.grid, self.count, self.config.min_block)
        ids = hidden_ids(mask, self.count)  # (B,n)
        labels = codes.gather(1, ids).flatten()
        out = {"loss": 0.0}
        for name, logits in self.predict(self.spec.normalise(images), mask, ids).items():
            logits = logits.float().flatten(0, 1)
            out[f"{name}_loss"] = F.cross_entropy(logits, labels)
            out[f"{name}_accuracy"] = (logits.detach().argmax(dim=-1) == labels).float().mean()
            out["loss"] = out["loss"] + out[f"{name}_loss"]
        return out

    def predict(
        self, images: torch.Tensor, mask: torch.Tensor, ids: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Normalised images, bool mask (B,N), the positions ids (B,n) of its ones -> logits
        (B,n,codes): "mim" from the last block, "aggregation" from the aggregation blocks.
        """
        taps = (self.early,) if len(self.aggregation) else ()
        how = {"norm": False, "taps": taps}
        seen = encoders.masked(self.encoder, images, mask, self.mask_token, **how)
        logits = {"mim": self.head(self.encoder.norm(take(seen["patch"], ids)))}
        if taps:
            # the last class token beside the early patches, none of them normalised
            early = seen["taps"][self.early][:, 1:]
            x = torch.cat([seen["tokens"][:, :1], early], dim=1)
            for block in self.aggregation:
                x = block(x, shared_rel_pos_bias=seen["bias"])
            norm = self.aggregation_norm or self.encoder.norm
            head = self.aggregation_head or self.head
            logits["aggregation"] = head(norm(take(x[:, 1:], ids)))
        return logits

    @torch.no_grad()
    def pictures(self, batch: dict) -> dict[str, np.ndarray]:
        """Of at most 8 images: original | masked | predicted codes, where hidden | tokenizer's
        codes. One colour per code.
        """
        images = batch["view"][:8]
        generator = torch.Generator().manual_seed(0)

        def uniform(name: str, *shape: int) -> torch.Tensor:
            return torch.rand(len(images), *shape, generator=generator)

        mask = exact_block_masks(uniform, self.grid, self.count, self.config.min_block)
        mask = mask.to(images.device)
        ids, codes = hidden_ids(mask, self.count), self.tokenizer(images, "ids")["ids"]
        predicted = self.predict(self.spec.normalise(images), mask, ids)["mim"].argmax(dim=-1)
        size = self.spec.image_size
        guess = colour_codes(torch.zeros_like(codes).scatter(1, ids, predicted), size)
        columns = [images, paint(images, mask), paint(guess, ~mask), colour_codes(codes, size)]
        return {"codes": contact_sheet(columns)}

"""BEiT v2: masked image modelling with vector-quantised visual tokenizers (arXiv 2208.06366), the
student.

A ViT sees the image with blocks of patches replaced by a mask token and classifies, at each hidden
patch, the code that a frozen tokenizer gives to that patch of the whole image. Patch aggregation
repeats the loss on the last class token together with the patch tokens of an early block, which
forces what lies behind that block through the class token.

Follows microsoft/unilm (beit2), initialisation included; in particular the aggregation blocks keep
torch's default initialisation, scaled by depth, because the official code creates them after its
initialisation pass. Departures:
- masks and crops are pure functions of seed and step; the official ones come from unseeded
  generators;
- colours are jittered after the crop, not before (contrast then refers to the mean grey of the
  crop);
- student and tokenizer see the same resized pixels, where the official code resizes a crop twice;
- `mask_ratio` is rounded to a count of patches; 0.3827 gives the official 75 of 196;
- defaults are for small images. As published, for ImageNet and ViT-B/16: mask_ratio 0.3827,
  min_block 16, early_layer 9, head_depth 2, lr 1.5e-3 not scaled by the batch of 2048, 300 epochs
  (1600 with betas 0.9, 0.999 and drop_path 0.1), 10 of them warm up; ViT-L: layer_scale 1e-5,
  early_layer 21.
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
from stages.kit.nets.masks import exact_block_masks, hidden_ids, take
from stages.kit.nets.patches import colour_codes, contact_sheet, paint
from workflow import checks

TARGET = "ids"
LABELS = False
TRAINS = True


@dataclass(frozen=True)
class Config:
    mask_ratio: float = 0.39  # share of the patches that is hidden: 25 of 64
    min_block: int = 4  # patches in the smallest block
    early_layer: int | None = (
        None  # aggregation takes patches after this block; None: 3/4 of the depth
    )
    head_depth: int = 1  # aggregation blocks; 0: no patch aggregation
    shared_head: bool = True  # one norm and linear layer for both losses
    layer_scale: float = 0.1
    drop_path: float = 0.0
    crop_min: float = 0.2  # smallest share of the image's area in a crop
    flip: float = 0.5
    jitter: float = 0.4  # of brightness, contrast and saturation
    lr: float = 1e-3
    lr_per: int | None = None  # not scaled by the batch, as in the official code
    min_lr: float = 1e-5
    warmup: float = 0.05  # share of all steps
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.98)
    clip: float | None = 3.0

    def __post_init__(self):
        checks.within(self, "(0, 1)", "mask_ratio")
        checks.within(self, "[1, inf)", "min_block", "early_layer")
        checks.within(self, "[0, inf)", "head_depth")
        checks.within(self, "(0, 1]", "crop_min")
        checks.within(self, "[0, 1)", "drop_path")

    def early(self, depth: int) -> int:
        """The block, counted from 1, after which aggregation takes the patch tokens."""
        return max(1, 3 * depth // 4) if self.early_layer is None else self.early_layer

    def check(self, image_size: int, model: dict) -> None:
        count = checks.hidden_count((image_size // model["patch_size"]) ** 2, self.mask_ratio)
        if self.min_block > count:
            raise ValueError(
                f"min_block: found {self.min_block}, but only {count} patches are hidden"
            )
        if self.head_depth and self.early(model["depth"]) >= model["depth"]:
            raise ValueError(
                f"early_layer: found {self.early(model['depth'])}, expected less than "
                f"model.depth {model['depth']} (or head_depth 0)"
            )


def views(config: Config, spec) -> dict[str, View]:
    return {
        "view": View(
            size=spec.image_size,
            scale=(config.crop_min, 1.0),
            flip=config.flip,
            jitter=(config.jitter, config.jitter, config.jitter, 0.0),
        )
    }


class Method(nn.Module):
    def __init__(self, config: Config, spec, target=None):
        super().__init__()
        if not hasattr(target, "codes"):
            raise ValueError(
                f"beitv2 needs a tokenizer (a target of ids), found {type(target).__name__}"
            )
        self.config, self.spec = config, spec
        self.tokenizer = [target]  # in a list: frozen, neither trained nor saved with the student
        self.grid, self.count = (
            (spec.grid, spec.grid),
            checks.hidden_count(spec.grid**2, config.mask_ratio),
        )
        self.encoder = encoders.beit_vit(
            spec, init_values=config.layer_scale, drop_path_rate=config.drop_path
        )
        width, depth = self.encoder.embed_dim, len(self.encoder.blocks)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.head = nn.Linear(width, target.codes)
        self.early = config.early(depth)
        last = self.early + config.head_depth
        rates = torch.linspace(0, config.drop_path, max(depth, last), device="cpu").tolist()[
            self.early : last
        ]
        self.aggregation = nn.ModuleList(
            [
                Block(
                    width,
                    spec.model["num_heads"],
                    qkv_bias=True,
                    mlp_ratio=spec.model["mlp_ratio"],
                    drop_path=rate,
                    init_values=config.layer_scale,
                    norm_layer=LayerNorm,
                )
                for rate in rates
            ]
        )
        separate = config.head_depth and not config.shared_head
        self.aggregation_norm = LayerNorm(width) if separate else None
        self.aggregation_head = nn.Linear(width, target.codes) if separate else None
        self._initialise()

    def _initialise(self) -> None:
        """As the encoder: normal weights of deviation 0.02, cut there; zero biases; block n's
        outputs over sqrt(2 n).
        """
        for part in (self.head, self.aggregation_head):
            if part is not None:
                encoders.trunc_init(part)
        nn.init.trunc_normal_(self.mask_token, std=0.02, a=-0.02, b=0.02)
        encoders.scale_by_depth(self.aggregation, first=self.early + 1)

    def no_weight_decay(self) -> set[str]:
        """Besides one-dimensional parameters; the mask token and the relative-position table are
        decayed.
        """
        return {"encoder.cls_token"}

    def forward(self, batch: dict, progress) -> dict[str, torch.Tensor]:
        """{"view": (B,3,H,W) in [0,1]} -> {"loss", and loss and accuracy of each of the two
        predictions}.
        """
        images = batch["view"]
        with torch.no_grad():
            codes = self.tokenizer[0](images)  # the same view, with every patch visible
        expected = (len(images), self.grid[0] * self.grid[1])
        if codes.shape != expected:
            raise ValueError(f"target: gave ids of shape {tuple(codes.shape)}, expected {expected}")
        mask = exact_block_masks(progress.uniform, self.grid, self.count, self.config.min_block)
        ids = hidden_ids(mask, self.count)
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
        """Normalised images, bool mask (B,N), its ones' positions ids (B,n) -> logits (B,n,codes)
        by name.

        "mim" from the last block; "aggregation", if there is any, from the aggregation blocks.
        """
        tokens = encoders.patch_tokens(self.encoder, images, mask, self.mask_token)
        bias = encoders.shared_bias(self.encoder)
        taps = (self.early,) if len(self.aggregation) else ()
        x, tapped = encoders.run_blocks(
            self.encoder, encoders.with_prefix(self.encoder, tokens), taps=taps, bias=bias
        )
        logits = {"mim": self.head(self.encoder.norm(take(x[:, 1:], ids)))}
        if taps:
            x = torch.cat(
                [x[:, :1], tapped[self.early][:, 1:]], dim=1
            )  # early states enter un-normalised
            for block in self.aggregation:
                x = block(x, shared_rel_pos_bias=bias)
            norm, head = (
                self.aggregation_norm or self.encoder.norm,
                self.aggregation_head or self.head,
            )
            logits["aggregation"] = head(norm(take(x[:, 1:], ids)))
        return logits

    @torch.no_grad()
    def pictures(self, batch: dict) -> dict[str, np.ndarray]:
        """A contact sheet of at most 8 images: original | masked | predicted codes | tokenizer's
        codes.

        One colour per code. Predictions are shown at the hidden patches only.
        """
        images = batch["view"][:8]
        generator = torch.Generator().manual_seed(0)
        mask = exact_block_masks(
            lambda name, *shape: torch.rand(len(images), *shape, generator=generator),
            self.grid,
            self.count,
            self.config.min_block,
        ).to(images.device)
        ids, codes = hidden_ids(mask, self.count), self.tokenizer[0](images)
        predicted = self.predict(self.spec.normalise(images), mask, ids)["mim"].argmax(dim=-1)
        size = self.spec.image_size
        guess = paint(colour_codes(torch.zeros_like(codes).scatter(1, ids, predicted), size), ~mask)
        return {
            "codes": contact_sheet([images, paint(images, mask), guess, colour_codes(codes, size)])
        }
